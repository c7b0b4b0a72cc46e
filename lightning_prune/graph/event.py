"""One op of the dense program, as the trace logs it and the certificate compares with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.labels import Axis
from lightning_prune.graph.rules import RuleEntry

__all__ = ["VIEWS", "Event"]

VIEWS = frozenset(
    f"aten::{n}"
    for n in (
        "view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "slice",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "split",
        "chunk",
        "split_with_sizes",
        "expand",
        "select",
    )
)


@dataclass(frozen=True)
class Event:
    """One op of the dense program.

    Args:
        name: Schema name without overload.
        entry: Its rule.
        scalars: Arguments that are neither tensors nor sizes.
        sizes: Arguments that are sizes, of an op that takes indices.
        inputs: Which value each tensor argument is.
        in_axes: Axes of each tensor argument before the op.
        out_axes: Axes of each tensor result.
        out_shapes: Shape of each tensor result.
        pins: `(tensor argument, axis)` whose size must not change though it carries no labels.
        costs: Products of axis sizes: the multiply-adds.
        widths: Bytes per element of each tensor result; 0 for views and results written in place.
        out_kinds: Dtype and device of each tensor result.
        container: List or tuple, where the op returns one of tensors alone.
        chosen: What it returned, of an op that finds places by values, on real tensors.
        number: What it returned, if that is a tensor without axes whose value is known, on fake tensors.
    """

    name: str
    entry: RuleEntry
    scalars: tuple[tuple[str, Any], ...]
    sizes: tuple[Any, ...]
    inputs: tuple[Any, ...]
    in_axes: tuple[tuple[Axis, ...], ...]
    in_shapes: tuple[tuple[int, ...], ...]
    out_axes: tuple[tuple[Axis, ...], ...]
    out_shapes: tuple[tuple[int, ...], ...]
    pins: tuple[tuple[int, int], ...]
    costs: tuple[tuple[tuple[int, Axis], ...], ...]
    widths: tuple[int, ...]
    out_kinds: tuple[tuple[torch.dtype, torch.device], ...]
    container: type | None
    chosen: tuple[Tensor, ...] = ()
    number: float | None = None
