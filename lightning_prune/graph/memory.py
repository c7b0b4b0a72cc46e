"""Tensors that share memory: what one of them is told to hold, the others hold too.

Labels are one for all views, so a write through a view needs no news. A constant has none (`ANY`): when a part of it
is overwritten, it differs by position, and every tensor over the same memory must know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled

__all__ = ["Memory", "may_be_part", "storage_of", "written_dims"]

_WRITTEN = "_lightning_prune_written"


def written_dims(tensor: Tensor) -> frozenset[int]:
    """Return the axes along which a constant was overwritten in part: their size was never compared."""
    known: frozenset[int] = getattr(tensor, _WRITTEN, frozenset())
    return known


def mark_written(tensor: Tensor, dims: frozenset[int]) -> None:
    """Note the axes along which a constant was overwritten in part."""
    setattr(tensor, _WRITTEN, dims)


def is_constant(tensor: Tensor, axes: Sequence[Axis]) -> bool:
    """Return whether a tensor is constant along some axis: writing to a part of it changes that."""
    return any(isinstance(a, str) and a == ANY and n > 1 for a, n in zip(axes, tensor.shape, strict=True))


def may_be_part(axes: Sequence[Axis]) -> bool:
    """Return whether these may be the axes of a part of a constant: no labels, and one of them is `ANY`."""
    return ANY in [a for a in axes if isinstance(a, str)] and not any(map(is_labelled, axes))


class Memory:
    """Knows the living tensors that carry an `ANY` axis, by the storage they lie in.

    Attributes:
        differs: Some constant was overwritten in part.
    """

    def __init__(self) -> None:
        self.differs = False
        self._sharing: dict[int, list[Any]] = {}

    def watch(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Remember a tensor if a write elsewhere could change what is known of its axes."""
        if is_constant(tensor, axes) and tensor.layout == torch.strided:
            sharing = self._sharing.setdefault(storage_of(tensor), [])
            if not any(known() is tensor for known in sharing):
                sharing.append(ref(tensor))

    def others(self, tensor: Tensor) -> list[Tensor]:
        """Return the other living tensors with an `ANY` axis over the same memory."""
        if tensor.layout != torch.strided:
            return []
        sharing = [known() for known in self._sharing.get(storage_of(tensor), ())]
        return [t for t in sharing if t is not None and t is not tensor]


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors over the same memory share; 0 where memory is not that of a plain tensor."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else 0


def follow(
    other: Tensor, axes: Sequence[Axis], tensor: Tensor, written: Sequence[Axis], freeze: Callable[[Axis], None]
) -> tuple[list[Axis], frozenset[int]]:
    """Return the axes of a tensor after a write through another one over the same memory.

    An `ANY` axis that the write runs along from end to end becomes what was written; any other now differs by
    position, and what was written there may not lose channels.

    Args:
        other: The tensor, with axes of before.
        axes: Its axes.
        tensor: What was written to.
        written: The axes it has after the write.
        freeze: Forbids removal along an axis.

    Returns:
        New axes, and which of them differ by position now.
    """
    result, differs, matched = list(axes), set(), set()
    for d, axis in enumerate(axes):
        if is_labelled(axis) or axis == FIXED or other.shape[d] == 1 or other.stride(d) == 0:
            continue
        k = _same_axis(other, d, tensor)
        result[d] = FIXED if k is None else written[k]
        if k is None:
            differs.add(d)
        else:
            matched.add(k)
    if differs:
        for k, axis in enumerate(written):
            if k not in matched:
                freeze(axis)
    return result, frozenset(differs)


def _same_axis(other: Tensor, d: int, tensor: Tensor) -> int | None:
    """Return the axis of a tensor that runs over the same steps of memory from end to end, None if there is none."""
    if other.element_size() != tensor.element_size():
        return None
    step, size = other.stride(d), other.shape[d]
    same = [k for k in range(tensor.dim()) if (tensor.stride(k), tensor.shape[k]) == (step, size)]
    apart = abs(int(tensor.storage_offset()) - int(other.storage_offset()))
    return same[0] if len(same) == 1 and apart // step % size == 0 else None
