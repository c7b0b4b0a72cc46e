"""Scores from the size of the weights: plain functions from a unit to one float per channel, higher = keep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.importance.layers import (
    all_spans,
    by_channel,
    channel_rows,
    checked_weight_spans,
    over_layers,
    position_rows,
)

if TYPE_CHECKING:
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["NORMS", "bn_scale", "check_p", "l1", "l2", "layer_norm", "lp", "random"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def l1(unit: MutableChannelUnit, *, reduction: str = "mean", input_related: bool = False) -> Tensor:
    """Score each channel by the L1 norm of its weights: ``reduce over layers of sum |w[c]|``.

    Args:
        unit: Read only; full-size weights are read, so that a removed channel has a score too.
        reduction: Over the layers of `weight_spans`; see `reduce_layers`.
        input_related: Also count the weights that read the channel in the next layers.

    Returns:
        Float `[C]`, >= 0, on the device of the weights; no gradient flows.

    Raises:
        ConfigError: Unknown reduction.
        PlanError: The unit has no weight to score.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, sec. 3.
        We differ: a unit combines its layers; the paper scores one convolution alone.
    """
    return lp(unit, p=1, reduction=reduction, input_related=input_related)


def l2(unit: MutableChannelUnit, *, reduction: str = "mean", input_related: bool = False) -> Tensor:
    """Score each channel by the L2 norm of its weights: ``reduce over layers of sqrt(sum w[c] ** 2)``.

    Args:
        unit: Read only; full-size weights are read.
        reduction: Over the layers of `weight_spans`; see `reduce_layers`.
        input_related: Also count the weights that read the channel in the next layers.

    Returns:
        Float `[C]`, >= 0, on the device of the weights; no gradient flows.

    Raises:
        ConfigError: Unknown reduction.
        PlanError: The unit has no weight to score.

    Source: He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", 2018,
        arXiv:1808.06866, eq. 2. We differ: a unit combines its layers.
    """
    return lp(unit, p=2, reduction=reduction, input_related=input_related)


def lp(unit: MutableChannelUnit, *, p: float = 2, reduction: str = "mean", input_related: bool = False) -> Tensor:
    """Score each channel by the p-norm of its weights: ``reduce over layers of (sum |w[c]| ** p) ** (1 / p)``.

    Args:
        unit: Read only; full-size weights are read.
        p: Greater than 0; inf takes the largest weight.
        reduction: Over the layers of `weight_spans`; see `reduce_layers`.
        input_related: Also count the weights that read the channel in the next layers.

    Returns:
        Float `[C]`, >= 0, on the device of the weights; no gradient flows.

    Raises:
        ConfigError: `p` is not a number greater than 0; unknown reduction.
        PlanError: The unit has no weight to score.

    Source: He et al., arXiv:1808.06866, eq. 2, which is for any p. We differ: a unit combines its layers.
    """
    check_p(p)
    spans = checked_weight_spans(unit, input_related=input_related)
    return over_layers(unit, spans, lambda span, num_channels: layer_norm(span, num_channels, p), reduction)


def check_p(p: object) -> None:
    """Check the p of `lp`.

    Raises:
        ConfigError: It is not a number greater than 0.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not p > 0:
        raise ConfigError(f"Got p={p!r} for importance 'lp'; expected a number greater than 0.")


def bn_scale(unit: MutableChannelUnit, *, reduction: str = "mean") -> Tensor:
    """Score each channel by the scale of its normalisation: ``reduce over norms of |gamma[c]|``.

    Args:
        unit: Read only; with at least one batch, instance, group, layer or RMS norm that has a weight.
        reduction: Over the norms of the unit; see `reduce_layers`.

    Returns:
        Float `[C]`, >= 0, on the device of the weights; no gradient flows.

    Raises:
        ConfigError: Unknown reduction.
        PlanError: The unit has no such norm: a magnitude of other weights would not be comparable.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, arXiv:1708.06519.
        We differ: norms other than batch norm count too, and a unit combines its norms. The paper's one threshold for
        the whole network is over the scales as they are: ``normalizer="none"``.
    """
    spans = [s for s in all_spans(unit) if isinstance(s.module, NORMS) and s.tensor == "weight"]
    if not spans:
        raise PlanError(
            f"Got unit {unit.name!r} without a norm that has a weight; importance 'bn_scale' expects one in every "
            "unit. Use 'l1', or keep these layers with ignore=."
        )
    return over_layers(unit, spans, lambda span, num_channels: layer_norm(span, num_channels, 1), reduction)


def random(unit: MutableChannelUnit, *, seed: int = 0) -> Tensor:
    """Score channels at random: the baseline that a criterion must beat.

    The scores depend on the unit's name and the seed alone: equal on all ranks and at every firing of a schedule, and
    the global random state is left alone.

    Args:
        unit: Read only.
        seed: Another seed, other scores.

    Returns:
        Float32 `[C]` in [0, 1), on the CPU.
    """
    generator = torch.Generator().manual_seed(crc32(f"{seed} {unit.name}".encode()))
    return torch.rand(unit.num_channels, generator=generator)


def layer_norm(span: Channel, num_channels: int, p: float) -> tuple[Tensor, Tensor]:
    """Return the p-norm of each channel's entries in one tensor.

    Args:
        span: Which tensor, and which of its entries.
        num_channels: C of the unit.
        p: Greater than 0, inf too.

    Returns:
        Float `[C]`, >= 0, and which channels the span has, bool `[C]`.
    """
    if math.isinf(p):
        rows, is_covered = channel_rows(span, num_channels)
        return rows.abs().amax(1), is_covered
    total, is_covered = by_channel(span, position_rows(span).abs().pow(p).sum(1), num_channels)
    return total.pow(1.0 / p), is_covered
