"""The parameters and buffers of a module while it is run for its ops alone: as attributes they are stand-ins."""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Mapping, ValuesView
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

__all__ = ["Held"]


def _code(*methods: Any) -> frozenset[CodeType]:
    return frozenset(method.__code__ for method in methods if isinstance(method, FunctionType))


_AS_ATTRIBUTE = _code(nn.Module.__getattr__)
_BY_NAME = _code(nn.Module.get_parameter, nn.Module.get_buffer)  # they read an attribute, and want a parameter


class Held(dict[str, Any]):
    """Stands for `_parameters` or `_buffers` of a module.

    A dynamic op presents its kept slices as attributes alone. What a model takes out of this dict itself, as
    `named_parameters()`, `state_dict()` and `get_parameter()` do, is therefore the tensor that the module holds: the
    trace notices it and freezes it.

    Args:
        own: What the module holds.
        stand_ins: `id(tensor) -> stand-in`.
    """

    def __init__(self, own: Mapping[str, Tensor | None], stand_ins: Mapping[int, Tensor]) -> None:
        pairs = {name: stand_ins.get(id(t), t) if t is not None else None for name, t in own.items()} if own else {}
        super().__init__(pairs)
        self._pairs = [(stand_in, own[name]) for name, stand_in in pairs.items()] if own else ()
        self._stand_ins = stand_ins

    def stand_ins(self) -> dict[str, Any]:
        """Return the stand-ins in a plain dict."""
        return dict(super().items())

    def _around(self, stand_in: Any) -> Any:
        return next((tensor for given, tensor in self._pairs if given is stand_in), stand_in)

    def __getitem__(self, name: str) -> Any:
        stand_in = super().__getitem__(name)
        reader = sys._getframe(1)
        by_name = reader.f_back is not None and reader.f_back.f_code in _BY_NAME
        return stand_in if reader.f_code in _AS_ATTRIBUTE and not by_name else self._around(stand_in)

    def __setitem__(self, name: str, tensor: Any) -> None:
        super().__setitem__(name, self._stand_ins.get(id(tensor), tensor))

    def get(self, name: str, default: Any = None) -> Any:
        """Return what the module holds under a name."""
        return self._around(super().__getitem__(name)) if name in self else default

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # of a copy, and not of this very dict
        """Return the names and what the module holds."""
        return {name: self._around(stand_in) for name, stand_in in super().items()}.items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # of a copy, too
        """Return what the module holds."""
        return {name: self._around(stand_in) for name, stand_in in super().items()}.values()
