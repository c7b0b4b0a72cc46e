"""What a verb answers, and how tables are printed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Answer", "printed", "table"]

WIDTH = 120


@dataclass(frozen=True)
class Answer:
    """The answer of a verb.

    Args:
        data: For ``--json``.
        text: For a person.
    """

    data: Any
    text: str


def printed(value: Any) -> str:
    """Return what rich prints of a value, without colours."""
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, no_color=True).print(value)
    return stream.getvalue().rstrip()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table: the first column to the left, all others to the right."""
    found = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        found.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        found.add_row(*map(str, row))
    return printed(found)
