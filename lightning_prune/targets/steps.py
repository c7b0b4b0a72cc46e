"""The moves a plan may make, from every unit at its floor to every unit at its ceiling, most wanted first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_prune.plan import UnitLimits

__all__ = ["SCOPES", "FloatArray", "IntArray", "Steps", "make_steps"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SCOPES = ("global", "isomorphic", "local")


@dataclass(frozen=True)
class Steps:
    """Every step keeps one more divisor's worth of channels of one unit; N steps over M units, most wanted first.

    Args:
        unit: Int64 `[N]`, the unit of each step. The steps of one unit come in the order of their channels.
        size: Int64 `[N]`, channels that the step adds.
        after: Int64 `[N]`, kept channels of the unit once the step is taken.
        score: Float64 `[N]`, mean score of the added channels.
        lowest: Int64 `[M]`, kept channels of each unit at its floor.
    """

    unit: IntArray
    size: IntArray
    after: IntArray
    score: FloatArray
    lowest: IntArray


def make_steps(limits: Sequence[UnitLimits], scores: Sequence[FloatArray], scope: str) -> Steps:
    """List the steps of all units in the order in which a growing budget takes them.

    A unit's channels are ranked by score. In scope "global" a step is worth the mean score of its channels, whatever
    its unit. In "isomorphic" the units of one kind are ranked like that among themselves, and all kinds grow alike: a
    step comes when its kind reaches the fraction of channels that the step completes. In "local" every unit grows
    alike, alone.

    Args:
        limits: Of M units, at least one.
        scores: Float64 `[C]` of each unit, higher = keep, finite.
        scope: One of `SCOPES`.

    Returns:
        The steps; ties go to the unit that keeps the smaller fraction, then to the earlier unit.
    """
    per_unit = [_unit_steps(limit, row) for limit, row in zip(limits, scores, strict=True)]
    unit = np.repeat(np.arange(len(limits)), [len(after) for after, _, _ in per_unit])
    after = np.concatenate([part[0] for part in per_unit])
    size = np.concatenate([part[1] for part in per_unit])
    score = np.concatenate([part[2] for part in per_unit])
    lowest = np.array([limit.allowed[0] for limit in limits], np.int64)
    channels = np.array([limit.num_channels for limit in limits], np.int64)
    fraction = after / channels[unit]
    if scope == "local":
        order = np.lexsort((unit, -score, fraction))
    elif scope == "global":
        order = np.lexsort((unit, fraction, -score))
    else:
        kinds = {kind: k for k, kind in enumerate(dict.fromkeys(limit.kind for limit in limits))}
        kind = np.array([kinds[limit.kind] for limit in limits], np.int64)
        reached = _kind_fraction(np.lexsort((unit, fraction, -score)), kind[unit], size, kind, lowest, channels)
        order = np.lexsort((unit, reached))
    return Steps(unit[order], size[order], after[order], score[order], lowest)


def _unit_steps(limit: UnitLimits, scores: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
    """Return kept count after, size and mean score of each step of one unit."""
    allowed = np.array(limit.allowed, np.int64)
    after, size = allowed[1:], np.diff(allowed)
    if not len(after):
        return after, size, np.zeros(0)
    ranked = -np.sort(-scores)[: after[-1]]
    mean = np.add.reduceat(ranked, allowed[:-1]) / size
    # the means of equal scores may differ in their last bit; a unit's steps must stay in their order
    return after, size, np.minimum.accumulate(mean)


def _kind_fraction(
    order: IntArray, kind: IntArray, size: IntArray, unit_kind: IntArray, lowest: IntArray, channels: IntArray
) -> FloatArray:
    """Return for each step the fraction of its kind's channels that is kept once it is taken, in the given order."""
    reached = np.zeros(len(order))
    for k in range(int(unit_kind.max(initial=-1)) + 1):
        members = unit_kind == k
        mine = order[kind[order] == k]
        reached[mine] = (lowest[members].sum() + np.cumsum(size[mine])) / channels[members].sum()
    return reached
