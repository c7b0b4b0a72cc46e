"""An op of the pruned program as its rule sees it on the channels that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import FIXED, Axis, LabelSpace, is_labelled

__all__ = ["KeptCall"]


class KeptCall(Call):
    """An op that takes indices, seen on the raw labels of the living channels."""

    def __init__(self, name: str, args: Mapping[str, Any], out: Any, axes: Mapping[int, list[Axis]]) -> None:
        super().__init__(name, args, out, LabelSpace(), {})
        self._kept = axes
        self.results: dict[int, list[Axis]] = {}

    def axes(self, tensor: Tensor) -> list[Axis]:
        """Return the living labels of each axis."""
        return list(self._kept.get(id(tensor), [FIXED] * tensor.dim()))

    def put(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Note the axes of a result."""
        self.results[id(tensor)] = list(axes)

    def bind(self, a: Axis, b: Axis) -> Axis:
        """Return the axis that has labels."""
        return a if is_labelled(a) else b

    def freeze(self, axis: Axis, why: str = "") -> None:
        """Nothing to learn: the dense trace froze it."""
