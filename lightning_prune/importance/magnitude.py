"""Scores from the weights alone: plain functions from a unit to one float per channel, higher = keep."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.importance.aggregate import reduce_layers

if TYPE_CHECKING:
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["bn_scale", "l1", "l2", "random", "weight_spans"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


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
    return _norm(unit, 1, reduction, input_related)


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
    return _norm(unit, 2, reduction, input_related)


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
        We differ: norms other than batch norm count too, and a unit combines its norms.
    """
    spans = [s for s in _unique(unit, False) if isinstance(s.module, _NORMS) and s.tensor == "weight"]
    if not spans:
        raise PlanError(
            f"Got unit {unit.name!r} without a norm that has a weight; importance 'bn_scale' expects one in every "
            "unit. Use 'l1', or keep these layers with ignore=."
        )
    return _reduce(unit, spans, 1, reduction)


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


def weight_spans(unit: MutableChannelUnit, *, input_related: bool = False) -> list[Channel]:
    """Return the spans whose weights speak for a unit's channels, each once.

    Args:
        unit: Read only.
        input_related: Also the layers that read the channels.

    Returns:
        The spans of tensors with at least two axes; those with one (scales, biases) only where there is no other.
    """
    spans = _unique(unit, input_related)
    return [span for span in spans if span.full().dim() >= 2] or spans


def _unique(unit: MutableChannelUnit, input_related: bool) -> list[Channel]:
    """Return a unit's spans; a per-channel layer is listed on both sides and counts once."""
    both = [*unit.output_related, *(unit.input_related if input_related else ())]
    return list({(id(s.module), s.tensor, s.dim, s.start, s.end): s for s in reversed(both)}.values())[::-1]


def _norm(unit: MutableChannelUnit, p: int, reduction: str, input_related: bool) -> Tensor:
    spans = weight_spans(unit, input_related=input_related)
    if not spans:
        raise PlanError(f"Got unit {unit.name!r} without a weight to score; use importance 'random' or ignore= it.")
    return _reduce(unit, spans, p, reduction)


def _reduce(unit: MutableChannelUnit, spans: list[Channel], p: int, reduction: str) -> Tensor:
    layers = [_layer_norm(span, unit.num_channels, p) for span in spans]
    device = layers[0][0].device  # the layers of a unit may live on several
    scores, is_covered = [s.to(device) for s, _ in layers], [c.to(device) for _, c in layers]
    return reduce_layers(scores, is_covered, reduction)


def _layer_norm(span: Channel, num_channels: int, p: int) -> tuple[Tensor, Tensor]:
    """Return the p-norm of each channel's entries in one tensor, `[C]`, and which channels the span has, `[C]`."""
    tensor = span.full().movedim(span.dim, 0)[span.start : span.end]
    # half precision overflows in a sum of a few thousand weights
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).abs()
    powers = tensor.reshape(len(tensor), -1).pow(p).sum(1)
    # several positions of a flattened axis or of a product may belong to one channel
    index = torch.arange(len(tensor)) if span.index is None else span.index
    index = index.to(powers.device)
    total = powers.new_zeros(num_channels).index_add_(0, index, powers)
    is_covered = torch.zeros_like(total, dtype=torch.bool).index_fill_(0, index, True)
    return total.pow(1.0 / p), is_covered
