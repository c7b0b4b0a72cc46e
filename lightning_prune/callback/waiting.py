"""A bar for what takes long before the first batch, when Lightning shows nothing yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["waiting"]


@contextmanager
def waiting(words: str, *, shown: bool = True, after_s: float = 1.0, console: Console | None = None) -> Iterator[None]:
    """Show a bar with the time that has passed while the block runs; it leaves no trace, and nothing if all is quick.

    Args:
        words: What is being done.
        shown: Whether to show it at all.
        after_s: Seconds after which it appears.
        console: Where; by default standard error. One that is no terminal gets nothing.
    """
    console = console or Console(stderr=True)
    if not shown or not console.is_terminal:
        yield
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(words, total=None)  # how much there is to do shows only at the end
    timer = Timer(after_s, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be just about to start
        progress.stop()
