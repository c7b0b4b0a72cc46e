"""Take steps while a budget allows: one threshold by search, an exact greedy refill, exchanges for the last percent.

All three only assume that keeping more never costs less. The result is then monotone: a larger budget never ends at a
smaller cost, because the moves for two budgets are the same until one of them does not fit the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lightning_prune.plan import UnitLimits
from lightning_prune.targets.steps import FloatArray, IntArray, Steps

__all__ = ["Budget", "Costs", "fill"]

_PROBES = 64  # structures priced at once: two rounds find the threshold among 4,000 steps
_CLOSE = 0.99  # a budget counts as met from here on
_ROUNDS = 3  # of exchanges
_ENUMERABLE = 2**14  # structures, below which the best one is found by looking at all


class Costs(Protocol):
    """What a plan needs of `lightning_prune.graph.cost.CostModel`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Unit names, in the order of every `counts`."""
        ...

    @property
    def full(self) -> IntArray:
        """Int64 `[U]`, channels of the dense units."""
        ...

    @property
    def batch_size(self) -> int:
        """Examples that "macs", "flops" and "memory" are for."""
        ...

    def measure(self, key: str, counts: IntArray) -> int:
        """Return one cost of `[U]` kept counts; monotone in each of them."""
        ...

    def measure_many(self, key: str, counts: IntArray) -> IntArray:
        """Return one cost of `[B, U]` kept counts as int64 `[B]`."""
        ...


class Budget:
    """Upper bounds on the costs of M of a model's units; all others keep what they have.

    Args:
        cost: Prices structures.
        limits: Of the M units.
        bounds: Cost key -> the cost not to exceed.
    """

    def __init__(self, cost: Costs, limits: Sequence[UnitLimits], bounds: Mapping[str, int]) -> None:
        self.bounds = dict(bounds)
        self._cost = cost
        place = {name: i for i, name in enumerate(cost.names)}
        self._columns = np.array([place[limit.name] for limit in limits], np.int64)

    def spread(self, counts: IntArray) -> IntArray:
        """Return counts of the M units `[..., M]` as counts of all units `[..., U]`."""
        rows = np.broadcast_to(self._cost.full, (*counts.shape[:-1], len(self._cost.full))).copy()
        rows[..., self._columns] = counts
        return rows

    def fits(self, counts: IntArray) -> npt.NDArray[np.bool_]:
        """Return for `[B, M]` counts whether every bound holds, bool `[B]`."""
        rows = self.spread(counts)
        holds = np.ones(len(rows), np.bool_)
        for key, bound in self.bounds.items():
            holds &= self._cost.measure_many(key, rows) <= bound
        return holds

    def fullness(self, counts: IntArray) -> FloatArray:
        """Return for `[B, M]` counts the used share of the scarcest bound, float64 `[B]`; at most 1 where they fit."""
        rows = self.spread(counts)
        shares = [self._cost.measure_many(key, rows) / max(bound, 1) for key, bound in self.bounds.items()]
        used: FloatArray = np.max(shares, axis=0)
        return used


def fill(steps: Steps, budget: Budget) -> IntArray:
    """Return the kept count of each unit: as many steps, in their order, as the budget allows.

    The longest run of first steps that fits is one threshold over the scores; after it, each step that still fits is
    taken in turn. Where coarse divisors leave more than 1 % of the budget, steps of one unit are exchanged for steps of
    others, the least wanted first, and a handful of units is solved by looking at all their structures.

    Args:
        steps: Most wanted first.
        budget: Holds with every unit at its floor.

    Returns:
        Int64 `[M]`, each an allowed count of its unit.
    """
    counts = _take(steps, budget, steps.lowest)
    highest = steps.lowest + _added(steps.unit, steps.size, len(steps.lowest))
    if _is_met(budget, counts) or np.array_equal(counts, highest):
        return counts
    counts = _exchange(steps, budget, counts)
    if _is_met(budget, counts):
        return counts
    return _best_of_all(steps, budget, counts)


def _is_met(budget: Budget, counts: IntArray) -> bool:
    return bool(budget.fullness(counts[None])[0] >= _CLOSE)


def _added(unit: IntArray, size: IntArray, num_units: int) -> IntArray:
    """Return the channels that some steps add to each unit, `[M]`."""
    return np.bincount(unit, weights=size, minlength=num_units).astype(np.int64)


def _take(steps: Steps, budget: Budget, counts: IntArray, banned: int | None = None) -> IntArray:
    """Take each step in turn that fits, none of the banned unit; the same as trying them one by one."""
    rest = np.flatnonzero((steps.after > counts[steps.unit]) & (steps.unit != (-1 if banned is None else banned)))
    while len(rest):
        taken, counts = _longest_run(steps.unit[rest], steps.size[rest], budget, counts)
        rest = rest[taken:]
        if not len(rest):
            break
        # a unit whose next step does not fit now never will: costs only grow. The first step of `rest` is such a one.
        units, first = np.unique(steps.unit[rest], return_index=True)
        following = np.repeat(counts[None], len(units), 0)
        following[np.arange(len(units)), units] = steps.after[rest[first]]
        rest = rest[np.isin(steps.unit[rest], units[budget.fits(following)])]
    return counts


def _longest_run(unit: IntArray, size: IntArray, budget: Budget, counts: IntArray) -> tuple[int, IntArray]:
    """Return how many of the first steps fit together, and the counts after them; pricing many lengths at once."""
    num_units, fits, fails = len(counts), 0, len(unit) + 1
    while fails - fits > 1:
        probes = np.unique(np.linspace(fits + 1, fails - 1, min(_PROBES, fails - fits - 1)).astype(np.int64))
        window = slice(fits, probes[-1])
        probe = np.searchsorted(probes, np.arange(fits, probes[-1]) + 1)
        cells = np.bincount(probe * num_units + unit[window], size[window], len(probes) * num_units)
        trials = counts + cells.reshape(len(probes), num_units).cumsum(0).astype(np.int64)
        good = budget.fits(trials)
        passed = len(probes) if good.all() else int(good.argmin())
        if passed < len(probes):
            fails = int(probes[passed])
        if passed:
            fits, counts = int(probes[passed - 1]), trials[passed - 1]
    return fits, counts


def _exchange(steps: Steps, budget: Budget, counts: IntArray) -> IntArray:
    """Give back one unit's last step, the least wanted first, and refill from the others, while that fills better."""
    for _ in range(_ROUNDS):
        best, used = counts, budget.fullness(counts[None])[0]
        last_taken = np.flatnonzero(steps.after == counts[steps.unit])[::-1]
        for step in last_taken:
            unit = int(steps.unit[step])
            trial = counts.copy()
            trial[unit] -= steps.size[step]
            trial = _take(steps, budget, trial, banned=unit)
            filled = budget.fullness(trial[None])[0]
            if filled > used:
                best, used = trial, filled
            if used >= _CLOSE:
                return best
        if best is counts:
            break
        counts = best
    return counts


def _best_of_all(steps: Steps, budget: Budget, counts: IntArray) -> IntArray:
    """Return the fullest of all structures, of equal ones the one with the highest scores; `counts` if too many."""
    num_units = len(counts)
    worth = steps.size * steps.score
    levels = [np.append(steps.lowest[u], steps.after[steps.unit == u]) for u in range(num_units)]
    gains = [np.append(0.0, worth[steps.unit == u]).cumsum() for u in range(num_units)]
    if math.prod(map(len, levels)) > _ENUMERABLE:
        return counts
    every = np.stack([axis.ravel() for axis in np.meshgrid(*levels, indexing="ij")], -1)
    gain = np.sum([axis.ravel() for axis in np.meshgrid(*gains, indexing="ij")], axis=0)
    fitting = np.flatnonzero(budget.fits(every))
    best = np.lexsort((-gain[fitting], -budget.fullness(every[fitting])))[0]
    chosen: IntArray = every[fitting[best]]
    return chosen
