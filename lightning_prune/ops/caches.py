"""Lazy caches of a model, by name: what is loaded into a model that has run must not meet tensors of its old structure.

The trace finds them (see `graph.sandbox`). Their names, and what they were when nothing was in them, go with the
structure, so that whoever loads it needs no trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["EMPTY", "GONE", "empty_caches_", "is_cache_entry", "lazy_caches", "remember_caches_"]

EMPTY = "empty"  # a container
GONE = "gone"  # no such attribute
REMEMBERED = "_lazy_caches"
_PLAIN = (bool, int, float, type(None))


def is_cache_entry(value: object) -> bool:
    """Whether a value that was read from a file says what an empty cache is: `EMPTY`, `GONE`, a number or None."""
    return value in (EMPTY, GONE) if isinstance(value, str) else isinstance(value, _PLAIN)


def remember_caches_(model: nn.Module, caches: Mapping[str, Any]) -> None:
    """Let a model know its lazy caches.

    Args:
        model: The root.
        caches: Qualified attribute -> what it was before it was filled: `EMPTY`, `GONE`, a number or None.
    """
    if caches:
        model.__dict__[REMEMBERED] = dict(caches)


def lazy_caches(model: nn.Module) -> dict[str, Any]:
    """Return qualified attribute -> what it is when nothing is in it, of all that a model and its parts know."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, value in module.__dict__.get(REMEMBERED, {}).items()
    }


def empty_caches_(model: nn.Module, caches: Mapping[str, Any]) -> None:
    """Empty lazy caches, where the model has such attributes; nothing else of it changes.

    Args:
        model: Of the same architecture as the one that knew them.
        caches: As `lazy_caches` returns them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, value in caches.items():
        prefix, _, name = path.rpartition(".")
        held = modules[prefix].__dict__ if prefix in modules else {}
        now = held.get(name, value)
        if value == EMPTY and isinstance(now, (dict, list, set)):
            now.clear()
        elif value == GONE and isinstance(now, Tensor):
            del held[name]
        elif isinstance(value, _PLAIN) and isinstance(now, (Tensor, *_PLAIN)):
            held[name] = value
