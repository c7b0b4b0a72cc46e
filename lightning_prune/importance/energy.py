"""The default score: how much a channel gives to the layers that read it, judged by weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_prune.importance.layers import by_channel, checked_weight_spans, over_layers, position_rows
from lightning_prune.importance.magnitude import NORMS

if TYPE_CHECKING:
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["count_readers", "magnitude"]


def magnitude(unit: MutableChannelUnit, *, reduction: str = "mean", living: bool = False) -> Tensor:
    """Score each channel by its energy: its size times that of the weights that read it.

    ``score[c] = mean over norms of gamma[c] ** 2 * mean over readers of sum w[:, c] ** 2``, each divided by its mean
    over the channels that the layer has. Where the unit has no norm, the weights that make the channel stand for it.
    Layers that make each channel of itself alone (depthwise convolutions), and weights in front of a norm, count only
    where there is nothing else: the norm undoes their scale.

    Args:
        unit: Read only; full-size weights are read.
        reduction: Over the norms, and over the readers, instead of the mean; see `reduce_layers`.
        living: Take means over the channels that remain only.

    Returns:
        Float `[C]`, >= 0, on the device of the weights; no gradient flows.

    Raises:
        ConfigError: Unknown reduction.
        PlanError: The unit has no weight to score.

    Source: all layers of a group, Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900;
        scales of norms, Liu et al., "Network Slimming", 2017, arXiv:1708.06519.
        We differ: a product of what makes a channel and what reads it, as a signal passes one after the other, instead
        of a sum over all layers.
    """
    alive = unit.mutable.current_mask if living else torch.ones(unit.num_channels, dtype=torch.bool)

    def relative_energy(span: Channel, num_channels: int) -> tuple[Tensor, Tensor]:
        energy, is_covered = by_channel(span, position_rows(span).square().sum(1), num_channels)
        counted = energy[is_covered & alive.to(energy.device)]
        mean = counted.mean() if len(counted) else energy.new_ones(())
        return energy / torch.where(mean == 0, 1.0, mean), is_covered

    makers, readers, norms = _sides(unit)
    factors = [spans for spans in (norms or makers, readers) if spans] or [checked_weight_spans(unit)]
    size, *read = (over_layers(unit, spans, relative_energy, reduction).detach() for spans in factors)
    return size * read[0].to(size.device) if read else size


def count_readers(unit: MutableChannelUnit) -> int:
    """Return how many weights read a unit's channels, at least 1; those of norms and depthwise layers do not count."""
    return max(1, len({(id(span.module), span.tensor) for span in _sides(unit)[1]}))


def _sides(unit: MutableChannelUnit) -> tuple[list[Channel], list[Channel], list[Channel]]:
    """Return the spans of weights that make the channels, of those that read them, and of the scales of norms."""
    sides = [
        {(id(span.module), span.tensor, span.dim, span.start, span.end): span for span in side}
        for side in (unit.output_related, unit.input_related)
    ]
    norms = {k: s for side in sides for k, s in side.items() if isinstance(s.module, NORMS) and s.tensor == "weight"}
    makers, readers = (
        [span for k, span in side.items() if k not in other and k not in norms and span.full().dim() >= 2]
        for side, other in (sides, sides[::-1])
    )
    return makers, readers, list(norms.values())
