"""The layers that speak for a unit, and their entries brought together by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_prune.errors import PlanError
from lightning_prune.importance.aggregate import reduce_layers

if TYPE_CHECKING:
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = [
    "all_spans",
    "by_channel",
    "channel_rows",
    "checked_weight_spans",
    "exact_dtype",
    "over_layers",
    "position_rows",
    "weight_spans",
]

LayerScore = Callable[["Channel", int], tuple[Tensor, Tensor]]
"""A span and C -> the score of each channel in that layer, `[C]`, and which channels the layer has, bool `[C]`."""


def all_spans(unit: MutableChannelUnit, *, input_related: bool = False) -> list[Channel]:
    """Return the spans of a unit, each once: a per-channel layer is listed on both sides.

    Args:
        unit: Read only.
        input_related: Also the layers that read the channels.
    """
    both = [*unit.output_related, *(unit.input_related if input_related else ())]
    return list({(id(s.module), s.tensor, s.dim, s.start, s.end): s for s in reversed(both)}.values())[::-1]


def weight_spans(unit: MutableChannelUnit, *, input_related: bool = False) -> list[Channel]:
    """Return the spans whose weights speak for a unit's channels, each once.

    Args:
        unit: Read only.
        input_related: Also the layers that read the channels.

    Returns:
        The spans of tensors with at least two axes; those with one (scales, biases) only where there is no other.
    """
    spans = all_spans(unit, input_related=input_related)
    return [span for span in spans if span.full().dim() >= 2] or spans


def checked_weight_spans(unit: MutableChannelUnit, *, input_related: bool = False) -> list[Channel]:
    """Return `weight_spans` of a unit that has some.

    Raises:
        PlanError: It has none.
    """
    spans = weight_spans(unit, input_related=input_related)
    if not spans:
        raise PlanError(f"Got unit {unit.name!r} without a weight to score; use importance 'random' or ignore= it.")
    return spans


def over_layers(unit: MutableChannelUnit, spans: Sequence[Channel], score: LayerScore, reduction: str) -> Tensor:
    """Score the layers of a unit one by one and combine them.

    Args:
        unit: Read only.
        spans: Its layers, at least one.
        score: Scores one of them.
        reduction: See `reduce_layers`.

    Returns:
        Float `[C]` on the device of the first layer: the layers of a unit may live on several.

    Raises:
        ConfigError: Unknown reduction.
    """
    layers = [score(span, unit.num_channels) for span in spans]
    device = layers[0][0].device
    return reduce_layers([s.to(device) for s, _ in layers], [c.to(device) for _, c in layers], reduction)


def by_channel(span: Channel, values: Tensor, num_channels: int) -> tuple[Tensor, Tensor]:
    """Sum values of positions into values of channels: of a flattened axis or a product several belong to one channel.

    Args:
        span: Maps its positions to channels.
        values: Float `[end - start]`.
        num_channels: C of the unit.

    Returns:
        Float `[C]`, 0 for a channel that the span does not have, and which ones it has, bool `[C]`.
    """
    index = torch.arange(len(values)) if span.index is None else span.index
    index = index.to(values.device)
    total = values.new_zeros(num_channels).index_add_(0, index, values)
    return total, torch.zeros_like(total, dtype=torch.bool).index_fill_(0, index, True)


def channel_rows(span: Channel, num_channels: int) -> tuple[Tensor, Tensor]:
    """Return each channel's entries in one tensor as a row.

    Args:
        span: Which tensor, and which of its entries.
        num_channels: C of the unit.

    Returns:
        Float `[C, n]`, at least float32; 0 for a channel that the span does not have, and where one channel has fewer
        positions than another; and which channels it has, bool `[C]`.
    """
    positions = position_rows(span)
    if span.index is None and len(positions) == num_channels:
        return positions, positions.new_ones(num_channels, dtype=torch.bool)
    index = torch.arange(len(positions)) if span.index is None else span.index
    count = torch.bincount(index, minlength=num_channels)
    order = index.argsort(stable=True)
    nth = torch.empty_like(index)  # which of its channel's positions a position is
    nth[order] = torch.arange(len(index)) - (count.cumsum(0) - count)[index[order]]
    rows = positions.new_zeros(num_channels, int(count.max()), positions.shape[1])
    rows[index, nth] = positions
    return rows.flatten(1), (count > 0).to(rows.device)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return what long sums are taken in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def position_rows(span: Channel) -> Tensor:
    """Return the entries at each position of a span, `[end - start, n]`, at least float32."""
    tensor = span.full().movedim(span.dim, 0)[span.start : span.end]
    # half precision overflows in a sum of a few thousand weights
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).reshape(len(tensor), -1)
