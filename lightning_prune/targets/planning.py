"""Scores + limits + costs + target -> `KeepPlan`. Plain data in, plain data out: no model is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError, did_you_mean
from lightning_prune.plan import KeepPlan, UnitLimits
from lightning_prune.targets.fill import Budget, Costs, fill
from lightning_prune.targets.parse import COST_KEYS, LATENCY_KEYS, Amount, Target, parse_target
from lightning_prune.targets.price import per_cost_scores
from lightning_prune.targets.steps import SCOPES, FloatArray, IntArray, make_steps

__all__ = ["NANOSECONDS", "make_plan", "reachable_range"]

_PER_EXAMPLE = ("macs", "flops", "memory")  # the model prices the whole example batch; a user means one example
NANOSECONDS = 1_000_000  # of a millisecond: costs are whole numbers
_EPSILON = 1e-9  # 0.29 * 100 is 28.999999999999996 in floats: still 29 channels


def make_plan(
    target: Target | object,
    scores: Mapping[str, Tensor],
    limits: Sequence[UnitLimits],
    cost: Costs,
    *,
    scope: str = "global",
    progress: float = 1.0,
    per_cost: str | None = None,
    kept: Mapping[str, int] | None = None,
) -> KeepPlan:
    """Choose the channels that remain, so that the target is met as an upper bound.

    A ratio or a choice keeps the best channels of each unit, rounded down to the divisor. For a bound on costs, the
    scope says in which order a growing budget admits channels (`steps.make_steps`), and the budget is filled exactly
    (`fill.fill`): within 1 % wherever divisors and floors allow. Floors, divisors and ceilings always hold.

    Args:
        target: What must remain; see `parse_target`.
        scores: Unit name -> float `[C]`, higher = keep; comparable between units in scope "global".
        limits: Of every unit that may be pruned.
        cost: Prices structures; its units may be more than `limits` names, those stay dense. Latency needs one that
            has measured it, `lightning_prune.latency.LatencyCosts`.
        scope: "global" (one threshold for all units), "isomorphic" (one threshold inside each kind of unit, all kinds
            keep the same fraction) or "local" (one ratio, ranked inside each unit).
        progress: How far to go from dense to target, in [0, 1]; what remains is ``1 - progress * (1 - target)``.
        per_cost: One of `COST_KEYS`: rank channels of different units by score per what one of them costs.
        kept: Unit name -> channels that are kept now, for what they cost now; units that it does not name keep all.

    Returns:
        The kept channels of every unit in `limits`; equal scores keep the lower index.

    Raises:
        ConfigError: An unknown scope or cost, a progress outside [0, 1], a name or glob that matches no unit, a count
            above a unit's channels.
        PlanError: No units; scores that are missing, misshapen or not finite; a bound below what can be reached.
    """
    parsed = parse_target(target)
    if scope not in SCOPES:
        raise ConfigError(f"Got scope={scope!r}. {did_you_mean(scope, SCOPES)}")
    if not 0 <= progress <= 1:
        raise ConfigError(f"Got progress={progress!r}; expected a number in [0, 1].")
    if not limits:
        raise PlanError("Got no unit that can be pruned; see the mutator's report for the reasons.")
    rows = [_checked_scores(limit, scores) for limit in limits]
    if per_cost is not None:
        rows = per_cost_scores(per_cost, rows, limits, cost, kept or {})
    if parsed.costs:
        counts = _fill_costs(parsed, rows, limits, cost, scope, progress)
    else:
        counts = _follow_choices(parsed, limits, cost, progress)
    return KeepPlan({limit.name: _best(row, int(n)) for limit, row, n in zip(limits, rows, counts, strict=True)})


def reachable_range(key: str, limits: Sequence[UnitLimits], cost: Costs) -> tuple[int, int]:
    """Return the least and the greatest cost that plans can reach.

    Args:
        key: One of `COST_KEYS`.
        limits: Of every unit that may be pruned.
        cost: Prices structures.

    Returns:
        The cost with every unit at its floor, and at its ceiling, of the example input as given.

    Raises:
        ConfigError: Unknown key.
    """
    if key not in COST_KEYS:
        raise ConfigError(f"Got cost {key!r}. {did_you_mean(key, COST_KEYS)}")
    budget = Budget(cost, limits, {})
    allowed = [limit.at(1.0).allowed for limit in limits]
    ends = np.array([(counts[0], counts[-1]) for counts in allowed], np.int64).reshape(-1, 2)
    return cost.measure(key, budget.spread(ends[:, 0])), cost.measure(key, budget.spread(ends[:, 1]))


def _checked_scores(limit: UnitLimits, scores: Mapping[str, Tensor]) -> FloatArray:
    """Return a unit's scores as float64 `[C]`, finite."""
    if limit.name not in scores:
        raise PlanError(f"Got no scores for unit {limit.name!r}; expected {limit.num_channels}, one per channel.")
    row = scores[limit.name].detach().to("cpu", torch.float64)
    if row.shape != (limit.num_channels,):
        raise PlanError(
            f"Got scores of shape {tuple(row.shape)} for unit {limit.name!r}; expected ({limit.num_channels},)."
        )
    bad = (~torch.isfinite(row)).nonzero().flatten().tolist()
    if bad:
        raise PlanError(
            f"Got score {row[bad[0]].item()} for channel {bad[0]} of unit {limit.name!r} ({len(bad)} of {len(row)} are "
            "not finite); expected numbers. Check the weights, or lower the learning rate if training diverged."
        )
    values: FloatArray = row.numpy()
    return values


def _best(scores: FloatArray, count: int) -> tuple[int, ...]:
    """Return the ascending indices of the `count` highest scores; of equal ones the lower index."""
    return tuple(np.sort(np.argsort(-scores, kind="stable")[:count]).tolist())


def _snap(limit: UnitLimits, count: float) -> int:
    """Return the greatest allowed count up to `count`, or the least allowed one."""
    allowed = np.array(limit.allowed)
    return int(allowed[max(0, int(np.searchsorted(allowed, count + _EPSILON, side="right")) - 1)])


def _follow_choices(target: Target, limits: Sequence[UnitLimits], cost: Costs, progress: float) -> IntArray:
    """Return each unit's kept count for ratios and counts of channels."""
    choices = _match(target.choices, limits, cost)
    counts = []
    for limit in limits:
        choice = choices.get(limit.name, 1.0)
        if isinstance(choice, int) and choice > limit.num_channels:
            raise ConfigError(
                f"Got choice={choice} for unit {limit.name!r}; it has {limit.num_channels} channels. Write a ratio in "
                f"(0, 1] or a count up to {limit.num_channels}."
            )
        ratio = choice / limit.num_channels if isinstance(choice, int) else choice
        counts.append(_snap(limit.at(progress), limit.num_channels * (1.0 - progress * (1.0 - ratio))))
    return np.array(counts, np.int64)


def _match(choices: Mapping[str, Amount], limits: Sequence[UnitLimits], cost: Costs) -> dict[str, Amount]:
    """Return a choice per unit name; a full name goes before a glob, a later glob before an earlier one."""
    names = {limit.name for limit in limits}
    dense = dict(zip(cost.names, cost.full.tolist(), strict=True))
    exact: dict[str, Amount] = {}
    globbed: dict[str, Amount] = {}
    for pattern, choice in choices.items():
        if pattern in names:
            exact[pattern] = choice
        elif pattern in dense:
            if choice != (dense[pattern] if isinstance(choice, int) else 1.0):
                raise ConfigError(
                    f"Got choice={choice!r} for unit {pattern!r}, which cannot be pruned; see the mutator's report for "
                    "the reason. Leave it out or write 1.0."
                )
        elif hits := [name for name in names if fnmatchcase(name, pattern)]:
            globbed.update(dict.fromkeys(hits, choice))
        else:
            near = ", ".join(map(repr, get_close_matches(pattern, sorted(names), n=3, cutoff=0.0)))
            raise ConfigError(
                f"Got {pattern!r} in target, which matches none of {len(names)} units; expected a unit name or glob, "
                f"or one of {', '.join(COST_KEYS)}. The closest units: {near}."
            )
    return {**globbed, **exact}


def _fill_costs(
    target: Target,
    rows: Sequence[FloatArray],
    limits: Sequence[UnitLimits],
    cost: Costs,
    scope: str,
    progress: float,
) -> IntArray:
    """Return each unit's kept count under bounds on costs."""
    bounds = {}
    for key, amount in target.costs.items():
        dense = _dense(key, target, cost)
        bound = _bound(key, amount, dense, cost.batch_size)
        least = reachable_range(key, limits, cost)[0]
        if least > bound:
            shown = [_shown(key, value, cost.batch_size) for value in (bound, dense, least)]
            raise PlanError(
                f"Got target {target}: {key} of at most {shown[0]} of {shown[1]}; the least that "
                f"can be reached is {shown[2]} ({_ceil(least / dense):g} of the dense model), with every "
                "unit at its floor. Raise the target, lower min_ratio, divisor or what overrides keep, or ignore fewer "
                "layers."
            )
        bounds[key] = bound if progress == 1 else int(dense - progress * (dense - bound))
    steps = make_steps([limit.at(progress) for limit in limits], rows, scope)
    return fill(steps, Budget(cost, limits, bounds))


def _dense(key: str, target: Target, cost: Costs) -> int:
    """Return what the dense model costs."""
    try:
        return cost.measure(key, cost.full)
    except ConfigError as error:
        if key not in LATENCY_KEYS:
            raise
        raise ConfigError(
            f"Got target {target} without measured latencies; expected costs that know them. Plan with "
            "lightning_prune.latency.plan_measured(target, mutator, scores)."
        ) from error


def _shown(key: str, value: int, batch_size: int) -> str:
    """Return a cost as a user writes it: of one example, where it depends on the input."""
    if key in LATENCY_KEYS:
        return f"{value / NANOSECONDS:.4g} ms"
    return f"{-(-value // max(batch_size, 1)) if key in _PER_EXAMPLE else value:,}"


def _bound(key: str, amount: Amount, dense: int, batch_size: int) -> int:
    """Return the cost of the example batch not to exceed."""
    if key == "latency_ms":
        return min(dense, int(amount * NANOSECONDS))
    if isinstance(amount, int):
        return min(dense, amount * (batch_size if key in _PER_EXAMPLE else 1))
    return int(amount * dense)


def _ceil(fraction: float) -> float:
    """Return a fraction rounded up to four digits, so that a user who writes it reaches it."""
    return min(1.0, float(np.ceil(fraction * 1e4) / 1e4))
