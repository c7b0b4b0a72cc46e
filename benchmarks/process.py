"""Run a function in a process of its own, which begins as a copy of this one: what is imported need not be again."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")
GIB = 2**30


def run_apart(function: Callable[..., Any], *args: Any, limit_s: float, limit_gib: float | None = None) -> Any:
    """Return what a function returns in a process of its own, on one thread.

    Args:
        function: Returns plain data.
        args: Its arguments.
        limit_s: Seconds after which the process is ended.
        limit_gib: Memory that it may take for data.

    Raises:
        RuntimeError: What went wrong there, and where; or the limit.
    """
    gc.freeze()  # or the collector of the copy would write to all that was imported, and copy its memory
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_run_here, args=(send, limit_gib, function, args))
    process.start()
    send.close()
    try:
        if not receive.poll(limit_s):
            raise RuntimeError(f"not done in {limit_s:g} s")
        found, error = receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise RuntimeError(error)
    return found


def _run_here(send: Connection, limit_gib: float | None, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run in the child; an error is told with the last places it passed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if limit_gib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * GIB), int(limit_gib * GIB)))
    try:
        send.send((function(*args), None))
    except Exception as error:
        frames = reversed(traceback.extract_tb(error.__traceback__)[-3:])
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
        text = " ".join(str(error).split())
        send.send((None, f"{type(error).__name__}: {text[:300]} ({where})"))
