"""The whole numbers of a config object, found by the path that leads to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Path", "copy_numbers_", "is_config", "numbers_of", "set_number_"]

Path = tuple[str | int, ...]  # attributes, keys and indices
_DEPTH = 3  # how deep a config may hold configs, lists and dicts


def is_config(value: Any) -> bool:
    """Return whether a value is an object that can write itself down, as configs do."""
    return hasattr(value, "__dict__") and callable(getattr(value, "to_dict", None)) and not isinstance(value, type)


def numbers_of(value: Any, depth: int = _DEPTH, least: int = 2) -> Iterator[tuple[Path, int]]:
    """Yield the path and value of every int of at least `least` in a config and in what it holds."""
    if isinstance(value, Mapping):
        items: Sequence[tuple[str | int, Any]] = [(k, v) for k, v in value.items() if isinstance(k, str)]
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif is_config(value):
        items = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    else:
        return
    for key, item in items:
        if type(item) is int and item >= least:
            yield (key,), item
        elif depth > 1:
            yield from (((key, *path), number) for path, number in numbers_of(item, depth - 1, least))


def set_number_(holder: Any, path: Path, number: int) -> None:
    """Set one number of a config; tuples on the way are made anew."""
    key, rest = path[0], path[1:]
    items: Any = holder if isinstance(holder, Mapping | list) else vars(holder)
    new: Any = number
    if rest:
        new = list(items[key]) if isinstance(items[key], tuple) else items[key]
        set_number_(new, rest, number)
        new = tuple(new) if isinstance(items[key], tuple) else new
    if items is holder:
        items[key] = new
    else:
        setattr(holder, str(key), new)


def copy_numbers_(source: Any, target: Any) -> None:
    """Give a config the numbers of another one of its kind; what only one of them has stays."""
    numbers = dict(numbers_of(target))
    for path, value in numbers_of(source, least=1):
        if path in numbers and numbers[path] != value:
            set_number_(target, path, value)
