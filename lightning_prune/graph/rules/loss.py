"""Losses, for models that compute theirs in `forward`."""

from __future__ import annotations

import torch

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import FIXED
from lightning_prune.graph.rules.normalization import renormalize
from lightning_prune.graph.rules.pointwise import broadcast_axes
from lightning_prune.graph.rules.table import rule


@rule(
    """
    mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits
    """
)
def elementwise_loss(call: Call) -> None:
    """A loss for each element; the mean or the sum of all of them unless `reduction` is 0."""
    axes = broadcast_axes(call, call.inputs, torch.broadcast_shapes(*(t.shape for t in call.inputs)))
    if call["reduction"]:
        for axis in axes:
            renormalize(call, axis)
        for tensor in call.inputs:
            for d in range(tensor.dim()):
                call.pin_unlabelled(tensor, d)
        axes = []
    call.put(call.out, axes)


@rule("nll_loss_forward nll_loss2d_forward")
def class_loss(call: Call) -> None:
    """The score of the right class: `[batch, classes, *space]` at `[batch, *space]`."""
    x, target, weight = call["self"], call["target"], call["weight"]
    axes = call.axes(x)
    classes = axes.pop(1 if x.dim() > 1 else 0)
    for axis in (classes, *(call.axes(weight) if weight is not None else ())):
        call.freeze(axis, "the classes of a loss")
    axes = [call.bind(a, b) for a, b in zip(axes, call.axes(target), strict=bool(axes))]
    if call["reduction"]:
        for axis in axes:
            renormalize(call, axis)
        for d in range(target.dim()):
            call.pin_unlabelled(target, d)
        axes = []
    first, *rest = call.outputs
    call.put(first, axes)
    for out in rest:
        call.put(out, [FIXED] * out.dim())
