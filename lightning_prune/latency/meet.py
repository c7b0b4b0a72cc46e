"""Plan by the table, measure what comes out, correct the bound and plan again, until the measured model meets it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.errors import PlanError
from lightning_prune.latency.measure import Measurement, Quartiles
from lightning_prune.latency.settings import LatencySettings, resolve_latency
from lightning_prune.latency.table import LatencyCosts, LatencyTable, Measure, build_table
from lightning_prune.mutator import ChannelMutator
from lightning_prune.mutator.preview import preview
from lightning_prune.plan import KeepPlan, UnitLimits
from lightning_prune.targets import Target, make_plan, parse_target, reachable_range
from lightning_prune.targets.parse import LATENCY_KEYS

__all__ = ["Attempt", "LatencyOutcome", "check_floor", "meet", "plan_measured", "within_reach"]

PlanFor = Callable[[Target, LatencyCosts], KeepPlan]
_CLOSE = 0.97  # of the target: what fills it so far needs no correction
_AIM = 0.985  # where a correction aims: between that and the target
_PRECISE, _BLOCKS = 0.01, 5  # relative standard error of a median that is wanted, and how often it is worth the rounds
_NORMAL = 0.93  # standard error of a median in interquartile ranges, of one normal value


@dataclass(frozen=True)
class Attempt:
    """One plan and how long its exported model takes, relative to the dense one.

    Args:
        bound: What the predicted share was not to exceed.
        predicted: The share by the table.
        measured: The share as measured: median and quartiles of the rounds.
        used: Measured over asked, of the scarcest latency target; at most 1 where they are met.
        time: Of the exported model.
    """

    bound: float
    predicted: float
    measured: Quartiles
    used: float
    time: Measurement

    def __str__(self) -> str:
        return f"{self.measured} of the dense model, {self.time}"


@dataclass(frozen=True)
class LatencyOutcome:
    """A plan whose exported model was measured.

    Args:
        plan: The one that meets the target.
        chosen: Its attempt.
        attempts: All of them, in order: the first plan, and each correction.
    """

    plan: KeepPlan
    chosen: Attempt | None
    attempts: tuple[Attempt, ...]

    @property
    def corrections(self) -> int:
        """How often the bound was corrected."""
        return max(0, len(self.attempts) - 1)

    def __str__(self) -> str:
        if self.chosen is None:
            return "nothing is removed: the latency of the dense model"
        return f"{self.chosen}, after {self.corrections} correction" + "s" * (self.corrections != 1)


def plan_measured(
    target: Target | object,
    mutator: ChannelMutator,
    scores: Mapping[str, Tensor],
    *,
    latency: LatencySettings | Mapping[str, Any] | None = None,
    table: LatencyTable | None = None,
    divisor: int = 1,
    min_ratio: float = 0.0,
    **options: Any,
) -> LatencyOutcome:
    """Plan a structure whose exported model takes at most as long as the target says, measured.

    The model, its masks and choices are not touched; `mutator.apply(outcome.plan)` does that.

    Args:
        target: With "latency" or "latency_ms", beside any other cost; see `parse_target`.
        mutator: With a model.
        scores: Unit name -> float `[C]`, higher = keep.
        latency: How to measure.
        table: Of an earlier `build_table`; None measures one.
        divisor: See `ChannelMutator.limits`.
        min_ratio: See `ChannelMutator.limits`.
        options: `scope` and `per_cost`, see `make_plan`.

    Raises:
        ConfigError: See `make_plan` and `measure`.
        PlanError: See `make_plan` and `meet`.
    """
    settings, limits = resolve_latency(latency), mutator.limits(divisor, min_ratio)
    timed = settings.measure_with(mutator.example_input)
    costs = LatencyCosts(mutator.graph.cost, table or build_table(mutator, limits, timed))
    kept = {unit.name: unit.activated_channels for unit in mutator.units}

    def plan_for(wanted: Target, cost: LatencyCosts) -> KeepPlan:
        return make_plan(wanted, scores, limits, cost, kept=kept, **options)

    return meet(parse_target(target), plan_for, mutator, limits, costs, timed, settings.corrections)


def meet(
    target: Target,
    plan_for: PlanFor,
    mutator: ChannelMutator,
    limits: Sequence[UnitLimits],
    costs: LatencyCosts,
    measure: Measure,
    corrections: int,
) -> LatencyOutcome:
    """Return a plan whose measured model meets the latency of a target.

    A plan is measured over the rounds of `measure`, and up to four times more while the standard error of the median
    is above 1 %: on a busy machine one lucky median would be taken for a fast model. The bound on the predicted latency
    is divided by how far the measured one is off, or halved between the nearest bounds that met and missed the target,
    until the measured model uses between 97 and 100 % of it. Of several that meet it, the one that was predicted to
    take longest is chosen.

    Args:
        target: What is asked.
        plan_for: Makes a plan for a target by costs.
        mutator: Its model is copied, not touched.
        limits: Those of `plan_for`.
        costs: Predict the latency.
        measure: Times models.
        corrections: How often at most to plan again.

    Raises:
        PlanError: No measured model meets the target, nor does one come within its own spread: then it is taken with a
            warning.
    """
    asked, least = _asked(target, costs), _least(limits, costs)
    bound, met, missed = max(asked, least), 0.0, float("inf")
    plans: list[KeepPlan] = []
    attempts: list[Attempt] = []
    while len(plans) <= corrections:
        plan = plan_for(_bounded(target, bound), costs)
        is_dense = all(len(plan.kept[limit.name]) == limit.num_channels for limit in limits)
        if is_dense and asked >= 1:
            return LatencyOutcome(plan, None, ())
        if is_dense or plan in plans:
            break
        plans.append(plan)
        attempts.append(attempt := _attempt(target, plan, bound, mutator, costs, measure))
        if attempt.used <= 1:
            met = max(met, bound)
            if attempt.used >= _CLOSE or attempt.predicted < _CLOSE * bound:  # else other bounds or divisors decide
                break
        else:
            missed = min(missed, bound)
            if bound <= least:
                break
        wanted = attempt.predicted * _AIM / attempt.used
        if not met < wanted < missed:
            wanted = (met + min(missed, 1.0)) / 2
        bound = max(wanted, least)
    return _best(target, plans, attempts, costs)


def _best(
    target: Target, plans: Sequence[KeepPlan], attempts: Sequence[Attempt], costs: LatencyCosts
) -> LatencyOutcome:
    """Return the fullest attempt that meets the target, or one that misses it by less than its spread."""
    good = [i for i, attempt in enumerate(attempts) if attempt.used <= 1]
    if good:
        best = max(good, key=lambda i: attempts[i].predicted)
        return LatencyOutcome(plans[best], attempts[best], tuple(attempts))
    best = min(range(len(attempts)), key=lambda i: attempts[i].used)
    nearest = attempts[best]
    text = (
        f"Got target {target}; the nearest of {len(attempts)} measured plans takes {nearest}. With every unit at its "
        f"floor it is {costs.table.floor} of the dense model, which takes {costs.table.about}."
    )
    if nearest.used * nearest.measured.low > nearest.measured.median:
        raise PlanError(
            f"{text} Raise the target, lower min_ratio or divisor, ignore fewer layers, or measure more rounds on a "
            "quieter machine."
        )
    warnings.warn(f"{text} The difference is within the spread, so that plan is taken.", stacklevel=3)
    return LatencyOutcome(plans[best], nearest, tuple(attempts))


def _attempt(
    target: Target, plan: KeepPlan, bound: float, mutator: ChannelMutator, costs: LatencyCosts, measure: Measure
) -> Attempt:
    """Measure what a plan gives beside the dense model, again while the spread leaves the median uncertain."""
    full = KeepPlan({unit.name: tuple(range(unit.num_channels)) for unit in mutator.units})
    models = {"dense": preview(mutator, full), "pruned": preview(mutator, plan)}
    dense, pruned = (found := measure(models))["dense"], found["pruned"]
    for _ in range(_BLOCKS - 1):
        share = pruned.relative_to(dense)
        if _NORMAL * (share.high - share.low) / pruned.rounds**0.5 <= _PRECISE * share.median:
            break
        more = measure(models)
        dense, pruned = dense.joined(more["dense"]), pruned.joined(more["pruned"])
    share = pruned.relative_to(dense)
    used = max(
        (share.median if key == "latency" else pruned.ms.median) / amount
        for key, amount in target.costs.items()
        if key in LATENCY_KEYS
    )
    counts = plan.counts()
    row = np.array([[counts.get(n, c) for n, c in zip(costs.names, costs.full.tolist(), strict=True)]], np.int64)
    return Attempt(bound, float(costs.share(row)[0]), share, used, pruned)


def within_reach(target: Target, limits: Sequence[UnitLimits], costs: LatencyCosts) -> Target:
    """Return a target with the latency it asks for as a fraction, but no less than is predicted at the floors.

    What is predicted may be off by a few percent, so that it alone says of no target that it cannot be met.
    """
    return _bounded(target, max(_asked(target, costs), _least(limits, costs)))


def check_floor(target: Target, costs: LatencyCosts) -> None:
    """Check a latency against that of the model with every unit at its floor.

    Raises:
        PlanError: It is below what was measured there, by more than its spread.
    """
    asked = _asked(target, costs)
    if asked < min(1.0, costs.table.floor.low):
        raise PlanError(
            f"Got target {target}: {asked:.4g} of the dense model's latency; the least that was measured is "
            f"{costs.table.floor}, with every unit at its floor; dense {costs.table.about}. Raise the target, lower "
            "min_ratio or divisor, or ignore fewer layers."
        )


def _asked(target: Target, costs: LatencyCosts) -> float:
    """Return the smallest latency that a target asks for, relative to the dense model."""
    asked = {"latency": 1.0, "latency_ms": costs.table.dense_ms}
    return min([1.0, *(bound / asked[key] for key, bound in target.costs.items() if key in asked)])


def _least(limits: Sequence[UnitLimits], costs: LatencyCosts) -> float:
    """Return the predicted latency with every unit at its floor, relative to the dense model."""
    least, dense = reachable_range("latency", limits, costs)[0], costs.measure("latency", costs.full)
    return (least + 1) / dense  # a bound is rounded down


def _bounded(target: Target, share: float) -> Target:
    """Return a target with one bound on latency, a fraction of what the table predicts for the dense model."""
    others = {key: amount for key, amount in target.costs.items() if key not in LATENCY_KEYS}
    return replace(target, costs={**others, "latency": min(1.0, share)})
