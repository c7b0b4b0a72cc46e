"""The unit that ranks its channels by the L1 norms of the weights that make them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.units.unit import MutableChannelUnit

__all__ = ["L1MutableChannelUnit", "l1_scores"]

_BLOCK = 2**18  # entries of a weight that are looked at together


class L1MutableChannelUnit(MutableChannelUnit):
    """Keeps the channels with the largest L1 norms, as `l1_scores` counts them."""

    def scores(self) -> Tensor:
        """Return `l1_scores` of the unit."""
        return l1_scores(self)


@torch.no_grad()
def l1_scores(unit: MutableChannelUnit) -> Tensor:
    """Score each channel of a unit by the L1 norm of the weights that make it.

    score[c] = mean over output-related layers of (sum |weight[c]|). Removed channels are scored too, by the values they
    have kept. Layers with a weight of one axis (norms) count only if there is no other.

    Args:
        unit: Read only.

    Returns:
        Float32 `[C]` on the CPU, >= 0; higher = keep.

    Raises:
        ConfigError: The unit has no output-related layer.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, sec. 3.
        We differ: a unit averages its layers; the paper scores one convolution alone.
    """
    members = [(channel, channel.full()) for channel in unit.output_related]
    if not members:
        raise ConfigError(f"Got unit {unit.name!r} without an output-related layer; L1 needs the weights that make it.")
    wide = [(channel, weight) for channel, weight in members if weight.dim() > 1]
    total = torch.zeros(unit.num_channels)
    for channel, weight in wide or members:
        norms = _l1_norms(weight.narrow(channel.dim, channel.start, channel.num_channels), channel.dim)
        total += channel.per_channel(norms, unit.num_channels).cpu()
    return total / len(wide or members)


def _l1_norms(weight: Tensor, dim: int) -> Tensor:
    """Return the L1 norm of each slice along an axis, block by block: blocks that fit a cache need no new memory."""
    others = [d for d in range(weight.dim()) if d != dim]
    if not others:
        return weight.abs().float()
    rows = max(1, _BLOCK // max(1, weight[0].numel()))
    buffer = weight[:rows].abs()  # one for all blocks: memory that comes and goes takes longer than the sums
    norms = [torch.abs(block, out=buffer[: len(block)]).float().sum(others) for block in weight.split(rows)]
    return torch.cat(norms) if dim == 0 else torch.stack(norms).sum(0)
