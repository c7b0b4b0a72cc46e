"""What a model holds, by name; and the tensors in any object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["named_tensors", "tensors_within"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under the first name it has."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    modules = [(f"{prefix}." if prefix else "", module) for prefix, module in model.named_modules()]
    parameters = [(prefix + n, t) for prefix, module in modules for n, t in module._parameters.items()]
    buffers = [(prefix + n, t) for prefix, module in modules for n, t in module._buffers.items()]
    for name, tensor in (*parameters, *buffers):
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def tensors_within(value: Any, depth: int = 8) -> list[Tensor]:
    """Return the tensors in any object: nested containers, dataclasses, plain objects; each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def walk(item: Any, level: int) -> None:
        if isinstance(item, Tensor):
            found.setdefault(id(item), item)
            return
        if level == 0 or id(item) in seen or isinstance(item, (str, bytes, int, float, type, nn.Module)):
            return
        seen.add(id(item))
        if isinstance(item, Mapping):
            children: Sequence[Any] = list(item.values())
        elif isinstance(item, (list, tuple, set)):
            children = list(item)
        elif is_dataclass(item):
            children = [getattr(item, f.name) for f in fields(item)]
        else:
            slots = [n for cls in type(item).__mro__ for n in getattr(cls, "__slots__", ()) if isinstance(n, str)]
            children = [*getattr(item, "__dict__", {}).values(), *(getattr(item, n, None) for n in slots)]
        for child in children:
            walk(child, level - 1)

    walk(value, depth)
    return list(found.values())
