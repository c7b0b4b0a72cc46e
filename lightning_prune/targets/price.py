"""Cost-aware ranking: what a channel is worth for what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.plan import UnitLimits
from lightning_prune.targets.fill import Costs
from lightning_prune.targets.parse import COST_KEYS
from lightning_prune.targets.steps import FloatArray

__all__ = ["marginal_costs", "per_cost_scores"]


def marginal_costs(key: str, limits: Sequence[UnitLimits], cost: Costs, kept: Mapping[str, int]) -> FloatArray:
    """Return what one channel of each unit costs, everything else as it is now.

    ``(cost(n) - cost(n - d)) / d``, with n kept channels and the unit's divisor d; that of the channels that come next,
    where no d can go.

    Args:
        key: A cost that `cost` measures.
        limits: Of M units.
        cost: Prices structures.
        kept: Unit name -> channels that are kept now; units that it does not name keep all.

    Returns:
        Float64 `[M]`, at least 1: what costs nothing would otherwise be worth endlessly much.
    """
    now = np.array([kept.get(name, full) for name, full in zip(cost.names, cost.full.tolist(), strict=True)], np.int64)
    column = {name: i for i, name in enumerate(cost.names)}
    lower, upper = (np.repeat(now[None], len(limits), 0) for _ in range(2))
    for row, limit in enumerate(limits):
        unit = column[limit.name]
        if now[unit] > limit.divisor:
            lower[row, unit] -= limit.divisor
        else:
            upper[row, unit] += limit.divisor
    difference = cost.measure_many(key, upper) - cost.measure_many(key, lower)
    prices: FloatArray = difference / np.array([limit.divisor for limit in limits])
    return np.maximum(prices, 1.0)


def per_cost_scores(
    key: str, rows: Sequence[FloatArray], limits: Sequence[UnitLimits], cost: Costs, kept: Mapping[str, int]
) -> list[FloatArray]:
    """Divide the scores of each unit by what one of its channels costs.

    Args:
        key: One of `COST_KEYS`.
        rows: Float64 `[C]` of each unit, at least 0, higher = keep.
        limits: Of the same units.
        cost: Prices structures.
        kept: Unit name -> channels that are kept now.

    Returns:
        Float64 `[C]` of each unit, in the same order within it.

    Raises:
        ConfigError: Unknown key.

    Source: Liu et al., "Group Fisher Pruning for Practical Network Compression", 2021, arXiv:2108.00708: its
        importance over the memory of a channel.
        We differ: any score and any cost; the cost is exact for the structure in force, instead of a layer's own.
    """
    if key not in COST_KEYS:
        raise ConfigError(f"Got per_cost={key!r}. {did_you_mean(key, COST_KEYS)}")
    prices = marginal_costs(key, limits, cost, kept)
    return [row / price for row, price in zip(rows, prices.tolist(), strict=True)]
