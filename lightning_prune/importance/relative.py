"""Scores that compare the channels of one unit with one another: plain functions, higher = keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_prune.importance.aggregate import share_of_rest
from lightning_prune.importance.layers import (
    by_channel,
    channel_rows,
    checked_weight_spans,
    exact_dtype,
    over_layers,
    position_rows,
)

if TYPE_CHECKING:
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["fpgm", "lamp"]


def lamp(
    unit: MutableChannelUnit, *, reduction: str = "mean", input_related: bool = False, living: bool = False
) -> Tensor:
    """Score each channel by its share of the energy that is left once all weaker channels are gone.

    With the energy ``e[c] = reduce over layers of sum w[c] ** 2``, ``score[c] = e[c] / sum of e[d] over all d with
    e[d] >= e[c]``. Of equal channels the one with the lower index counts as the stronger. The strongest channel of
    every unit has score 1, so the scores compare between units as they are.

    Args:
        unit: Read only; full-size weights are read.
        reduction: Over the layers of `weight_spans`; see `reduce_layers`.
        input_related: Also count the weights that read the channel in the next layers.
        living: Compare the channels that remain only; removed ones have score 0.

    Returns:
        Float `[C]` in [0, 1], on the device of the weights; no gradient flows.

    Raises:
        ConfigError: Unknown reduction.
        PlanError: The unit has no weight to score.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, arXiv:2010.07611.
        We differ: channels instead of single weights, and a unit combines its layers before they are compared.
    """
    spans = checked_weight_spans(unit, input_related=input_related)
    energy = over_layers(unit, spans, _energy, reduction)
    if living:
        energy = energy * unit.mutable.current_mask.to(energy.device)
    return share_of_rest(energy)


def fpgm(
    unit: MutableChannelUnit, *, reduction: str = "mean", input_related: bool = False, living: bool = False
) -> Tensor:
    """Score each channel by its distance from the others: one near their geometric median can be replaced by them.

    In one layer ``score[c] = sum over d of the Euclidean distance between w[c] and w[d]``.

    Args:
        unit: Read only; full-size weights are read.
        reduction: Over the layers of `weight_spans`; see `reduce_layers`.
        input_related: Also the weights that read the channel in the next layers.
        living: Compare the channels that remain only; removed ones have score 0.

    Returns:
        Float `[C]`, >= 0, on the device of the weights; no gradient flows.

    Raises:
        ConfigError: Unknown reduction.
        PlanError: The unit has no weight to score.

    Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", 2019,
        arXiv:1811.00250. We differ: a unit combines its layers.
    """
    spans = checked_weight_spans(unit, input_related=input_related)
    alive = unit.mutable.current_mask if living else None
    return over_layers(unit, spans, lambda span, num_channels: _distances(span, num_channels, alive), reduction)


def _energy(span: Channel, num_channels: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the squares of each channel's entries, `[C]`, and which channels the layer has, `[C]`."""
    return by_channel(span, position_rows(span).square().sum(1), num_channels)


def _distances(span: Channel, num_channels: int, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of each channel's distances to the others that the layer has, `[C]`, and which it has, `[C]`."""
    rows, is_covered = channel_rows(span, num_channels)
    counts = is_covered if alive is None else is_covered & alive.to(rows.device)
    chosen = rows[counts].to(exact_dtype(rows.device))  # `cdist` of many rows expands the square: half the digits go
    between = torch.cdist(chosen, chosen).sum(1).to(rows.dtype)
    return rows.new_zeros(num_channels).masked_scatter_(counts, between), is_covered
