"""Functions that remember their results across calls: they would hand what a trace made to a real run, and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn

__all__ = ["find_memos", "without_memos"]

Memo = functools._lru_cache_wrapper


def find_memos(model: nn.Module) -> list[Memo[Any]]:
    """Return the functions under `functools.lru_cache` that the code of a model's classes can call by name.

    Looked at are the Python modules that define the classes: their functions, classes and methods, also where another
    decorator hides the cached function.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    own = {base for base in classes if base.__module__.partition(".")[0] not in ("torch", "builtins")}
    values = [v for name in sorted({c.__module__ for c in own}) for v in vars(sys.modules.get(name, object)).values()]
    values += own
    values += [held for value in values if isinstance(value, type) for held in vars(value).values()]
    found = {id(memo): memo for value in values for memo in _unwrapped(value)}
    return list(found.values())


def _unwrapped(value: Any) -> Iterator[Memo[Any]]:
    """Yield the cached functions behind a function, method or property."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    if isinstance(function, Memo):
        yield function
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(held, Memo):
                yield held


@contextmanager
def without_memos(memos: Sequence[Memo[Any]]) -> Iterator[None]:
    """Let functions remember nothing from before, and nothing of this time afterwards."""
    _forget(memos)
    try:
        yield
    finally:
        _forget(memos)


def _forget(memos: Sequence[Memo[Any]]) -> None:
    for memo in memos:
        memo.cache_clear()
