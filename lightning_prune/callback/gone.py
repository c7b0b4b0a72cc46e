"""Channels that were removed before this run have no values left: they must not come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import UnitLimits

__all__ = ["alive_now", "capped", "ranked_last"]


def alive_now(mutator: ChannelMutator) -> dict[str, Tensor]:
    """Return unit name -> bool `[C]`, True where a channel is left; units that keep all are left out."""
    masks = {unit.name: unit.mutable.current_mask.clone() for unit in mutator.units}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def capped(limits: Sequence[UnitLimits], alive: Mapping[str, Tensor]) -> list[UnitLimits]:
    """Return limits under which no unit keeps more channels than it has left."""
    found = []
    for limit in limits:
        if limit.name in alive:
            most = int(alive[limit.name].sum())
            divisor = limit.divisor if most >= limit.divisor and most % limit.divisor == 0 else 1
            limit = replace(limit, ceiling=most, floor=min(limit.floor, most), divisor=divisor)
        found.append(limit)
    return found


def ranked_last(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores in which every channel that is gone comes after every channel that is left."""
    found = dict(scores)
    for name, mask in alive.items():
        found[name] = scores[name].masked_fill(~mask, float(scores[name].min()) - 1.0)
    return found
