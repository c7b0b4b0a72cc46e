"""Ints that a module keeps: in its attributes, in tuples and lists there, in a dict or a config object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

__all__ = ["Element", "integer_of", "integers_of", "is_holder"]

Element = int | str | None  # index into a tuple or list, key of a dict, attribute of an object; None for an int itself
_MENTIONED: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()


def is_holder(value: Any) -> bool:
    """Return whether a value is a dict or an object with attributes, such as a config."""
    if isinstance(value, Mapping):
        return True
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)


def integer_of(module: nn.Module, attribute: str, element: Element) -> int | None:
    """Return an int above 1 that a module keeps, alone or in a tuple or list; None where it keeps none there."""
    held = module.__dict__.get(attribute)
    own = _kept(held)
    kept = _integers_held(type(module), attribute, held) if own is None else own
    return next((value for e, value in kept if e == element and value > 1), None)


def integers_of(module: nn.Module) -> Iterator[tuple[str, Element, int]]:
    """Yield `(attribute, element, value)` of the ints above 1 that a module keeps, its own before those of a config."""
    inner: list[tuple[str, Element, int]] = []
    for attribute, value in list(module.__dict__.items()):
        if attribute.startswith("_"):
            continue
        kept = _kept(value)
        if kept is None:
            inner += ((attribute, key, v) for key, v in _integers_held(type(module), attribute, value) if v > 1)
        else:
            yield from ((attribute, element, v) for element, v in kept if v > 1)
    yield from inner


def _kept(value: Any) -> list[tuple[Element, int]] | None:
    """Return the ints that an attribute holds itself, None where it is to be looked into."""
    if isinstance(value, bool):
        return []
    if isinstance(value, Integral):  # NumPy's too
        return [(None, int(value))]
    if isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
        return list(enumerate(value))
    return None


def _integers_held(cls: type[nn.Module], attribute: str, value: Any) -> Iterator[tuple[str, int]]:
    """Yield `(key, int)` of a dict or config object, if the code of the class speaks of the key.

    Ints that it holds in a list or tuple have their place behind the key: `sizes.3`.

    Args:
        cls: The class of the module that holds it.
        attribute: Under which name.
        value: What it holds there.
    """
    if not is_holder(value):
        return
    mentioned = _mentioned(cls)
    if attribute in mentioned:
        items = value.items() if isinstance(value, Mapping) else vars(value).items()
        for key, held in items:
            if not isinstance(key, str) or key not in mentioned:
                continue
            if type(held) is int:
                yield key, held
            elif type(held) in (tuple, list) and all(type(v) is int for v in held):
                yield from ((f"{key}.{k}", v) for k, v in enumerate(held))


def _mentioned(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names and texts in the methods of a class, but for what only its constructor needs."""
    known = _MENTIONED.get(cls)
    if known is None:
        words: set[str] = set()
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] not in ("torch", "builtins"):
                functions = {name: getattr(value, "__wrapped__", value) for name, value in vars(base).items()}
                for name, function in functions.items():
                    if isinstance(function, FunctionType) and name != "__init__":
                        _collect(function.__code__, words)
        known = _MENTIONED[cls] = frozenset(words)
    return known


def _collect(code: CodeType, words: set[str]) -> None:
    words.update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            words.add(constant)
        elif isinstance(constant, CodeType):
            _collect(constant, words)
