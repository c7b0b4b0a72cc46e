"""What a structure leaves of a model: stand-ins for its tensors, and the integers that follow."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.contents import named_tensors
from lightning_prune.graph.labels import FIXED, Axis, is_labelled
from lightning_prune.graph.trace import DenseTrace
from lightning_prune.graph.walk import name_tensor

__all__ = ["pruned_integers", "pruned_tensors"]


def pruned_tensors(trace: DenseTrace, alive: BoolArray) -> dict[int, Tensor]:
    """Return `id(parameter or buffer) -> stand-in` of the sizes that are left."""
    stand_ins = {}
    for name, held in named_tensors(trace.sandbox.model).items():
        tensor = trace.sandbox.as_found(name, held)
        axes = trace.axes.get(name, (FIXED,) * tensor.dim())
        shape = [
            int(np.count_nonzero(alive[axis])) if is_labelled(axis) else size
            for axis, size in zip(axes, tensor.shape, strict=True)
        ]
        if shape == list(tensor.shape):
            stand_in = trace.sandbox.make_like(tensor)
        else:
            stand_in = trace.sandbox.make_sized(tensor, shape, partial(_kept, alive, axes))
        name_tensor(stand_in, name)
        stand_ins[id(held)] = stand_in
    return stand_ins


def _kept(alive: BoolArray, axes: Sequence[Axis], dim: int) -> Tensor:
    axis = axes[dim]
    assert is_labelled(axis), "an axis of another size has labels"
    return torch.from_numpy(np.flatnonzero(alive[axis]))


def pruned_integers(trace: DenseTrace, alive: BoolArray, followers: Sequence[Follower]) -> dict[tuple[str, str], Any]:
    """Return `(module, attribute) -> value` for the integers that follow."""
    values: dict[tuple[str, str], Any] = {}
    for follower in followers:
        key = (follower.module, follower.attribute)
        size = int(np.count_nonzero(alive[follower.labels]))
        if follower.element is None:
            values[key] = size
            continue
        if key not in values:
            values[key] = trace.sandbox.model.get_submodule(follower.module).__dict__[follower.attribute]
        values[key] = _replaced(values[key], follower.element, size)
    return values


def _replaced(holder: Any, element: int | str, value: int) -> Any:
    """Return a copy of a tuple, list, dict or object with one of its ints replaced, of the same type."""
    if isinstance(element, str):
        changed = copy.copy(holder)
        fields: Any = changed if isinstance(changed, Mapping) else vars(changed)
        name, _, place = element.rpartition(".")
        if element in fields or not name:
            fields[element] = value
        else:
            fields[name] = _replaced(fields[name], int(place), value)
        return changed
    return type(holder)([value if k == element else v for k, v in enumerate(holder)])
