"""Targets that bound costs: by hand, and as properties of random problems."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.plan import UnitLimits
from lightning_prune.targets import SCOPES, make_plan, reachable_range
from tests.chain_cost import FIRST, SECOND, TWO, TWO_SCORES, ChainCost, problems, targets

# By hand


def test_global_scope_keeps_the_highest_scores_anywhere() -> None:
    """Of 12 channels 6 remain: scores 8, 7, 6, 5 and 4, 4."""
    plan = make_plan({"channels": 0.5}, TWO_SCORES, TWO.limits(), TWO, scope="global")
    assert plan.kept == {FIRST: (0,), SECOND: (1, 3, 5, 6, 7)}


def test_local_scope_keeps_one_ratio() -> None:
    plan = make_plan({"channels": 0.5}, TWO_SCORES, TWO.limits(), TWO, scope="local")
    assert plan.kept == {FIRST: (0, 2), SECOND: (1, 3, 5, 7)}


def test_isomorphic_scope_ranks_inside_a_kind() -> None:
    """Kind "a" (units 0 and 1) and kind "b" (unit 2) both keep half, whatever the size of their scores."""
    cost = ChainCost([4, 4, 8])
    scores = cost.scores([9, 8, 7, 1], [6, 5, 4, 3], [100, 101, 102, 103, 104, 105, 106, 107])
    plan = make_plan({"channels": 0.5}, scores, cost.limits(kinds="aab"), cost, scope="isomorphic")
    assert list(plan.kept.values()) == [(0, 1, 2), (0,), (4, 5, 6, 7)]


def test_the_refill_takes_what_still_fits() -> None:
    """macs = 6 C0 + 10 C1: with 33 the third channel of unit 1 does not fit, the second of unit 0 still does."""
    cost = ChainCost([3, 3], areas=[2, 0, 1])
    scores = cost.scores([3, 2, 1], [9, 8, 7])
    plan = make_plan({"macs": 33}, scores, cost.limits(), cost)
    # floors: 16; 26 with the second of unit 1; the third (36) does not fit; the second of unit 0 (32) does
    assert plan.counts() == {cost.names[0]: 2, cost.names[1]: 2}
    assert cost.of(plan) == 32


def test_an_exchange_closes_the_gap_that_coarse_steps_leave() -> None:
    """macs = 30 C0 + 50 C1: in the order of scores 2, 1 cost 110, and the bound 130 holds only 1, 2."""
    cost = ChainCost([3, 3], areas=[10, 0, 5])
    scores = cost.scores([9, 8, 1], [7, 6, 1])
    assert cost.of(make_plan({"macs": 130}, scores, cost.limits(), cost)) == 130


def test_an_exchange_gives_back_the_least_wanted_step() -> None:
    """Of 148 + 14 channels the two small units take 4 each; 6 are left, a large unit needs 10. Too many to try all."""
    cost = ChainCost([8, 8] + [20] * 14)
    limits = [UnitLimits(n, int(c), "k", divisor=c // 2) for n, c in zip(cost.names, cost.full, strict=True)]
    scores = {n: torch.full((int(c),), 20.0 - u) for u, (n, c) in enumerate(zip(cost.names, cost.full, strict=True))}
    plan = make_plan({"channels": 162}, scores, limits, cost)
    assert list(plan.counts().values()) == [8, 4, 20] + [10] * 13


def test_rounding_of_equal_means_does_not_reorder_the_steps_of_a_unit() -> None:
    """In float64 six times 0.1 divided by 6 is less than 0.1: a step of one channel must not overtake one of six."""
    cost = ChainCost([13])
    limits = [UnitLimits(cost.names[0], 13, "k", divisor=6)]
    scores = {cost.names[0]: torch.full((13,), 0.1, dtype=torch.float64)}
    assert list(make_plan({"channels": 7}, scores, limits, cost).counts().values()) == [6]


def test_several_bounds_hold_together() -> None:
    cost = ChainCost([64, 128, 256], areas=[64, 16, 4, 1])
    plan = make_plan({"macs": 0.5, "params": 0.3}, cost.random_scores(), cost.limits(), cost)
    shares = {key: cost.of(plan, key) / cost.measure(key, cost.full) for key in ("macs", "params")}
    assert 0.297 <= shares["params"] <= 0.3
    assert shares["macs"] <= 0.5


def test_absolute_costs_of_an_input_are_per_example() -> None:
    one, four = ChainCost([64, 64]), ChainCost([64, 64], batch_size=4)
    plan = make_plan({"macs": "2K"}, four.random_scores(), four.limits(), four)
    assert plan == make_plan({"macs": 2000}, one.random_scores(), one.limits(), one)
    assert 0.99 * 8000 <= four.of(plan) <= 8000


def test_flops_are_twice_the_macs() -> None:
    cost = ChainCost([64, 64])
    args = (cost.random_scores(), cost.limits(), cost)
    assert make_plan({"flops": 4000}, *args) == make_plan({"macs": 2000}, *args)


def test_an_absolute_cost_above_the_dense_one_keeps_all() -> None:
    plan = make_plan({"macs": "1G"}, TWO_SCORES, TWO.limits(), TWO)
    assert plan.counts() == {FIRST: 4, SECOND: 8}


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_scores_keep_the_lower_index_and_spread_over_units(scope: str) -> None:
    scores = TWO.scores([1] * 4, [1] * 8)
    plan = make_plan({"channels": 0.5}, scores, TWO.limits(kinds="aa"), TWO, scope=scope)
    assert plan.kept == {FIRST: (0, 1), SECOND: (0, 1, 2, 3)}


def test_progress_interpolates_the_budget() -> None:
    cost = ChainCost([64, 64])
    full = cost.measure("macs", cost.full)
    for progress, remaining in [(0.0, 1.0), (0.25, 0.8), (0.5, 0.6), (1.0, 0.2)]:
        plan = make_plan({"macs": 0.2}, cost.random_scores(), cost.limits(), cost, progress=progress)
        assert 0.99 * remaining * full <= cost.of(plan) <= remaining * full


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("progress", [0.1, 1.0])
def test_an_unreachable_target_says_what_can_be_reached(progress: float, batch_size: int) -> None:
    """With 2 of 4 and 4 of 8 channels: 3 * 2 + 2 * 4 + 4 * 10 = 54 of 12 + 32 + 80 = 124 MACs, 0.4355 rounded up.

    A user writes the cost of one example.
    """
    batch = ChainCost([4, 8], batch_size=batch_size)
    limits = [UnitLimits(FIRST, 4, "a", floor=2), UnitLimits(SECOND, 8, "b", floor=4)]
    with pytest.raises(PlanError, match=r"at most 37 of 124; the least that can be reached is 54 \(0\.4355 of"):
        make_plan({"macs": 0.3}, TWO_SCORES, limits, batch, progress=progress)
    assert TWO.of(make_plan({"macs": 0.4355}, TWO_SCORES, limits, TWO)) == 54
    assert reachable_range("macs", limits, TWO) == (54, 124)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_the_unit(value: float) -> None:
    scores = {**TWO_SCORES, SECOND: torch.tensor([1, 2, value, 4, 5, 6, 7, 8])}
    with pytest.raises(PlanError, match=rf"score {value} for channel 2 of unit 'conv1_\(0, 8\)_out_1_in_1' \(1 of 8"):
        make_plan(0.5, scores, TWO.limits(), TWO)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        pytest.param({FIRST: TWO_SCORES[FIRST]}, "no scores for unit 'conv1", id="missing"),
        pytest.param(
            {**TWO_SCORES, SECOND: torch.ones(7)}, r"shape \(7,\) for unit 'conv1.*expected \(8,\)", id="shape"
        ),
    ],
)
def test_scores_that_do_not_fit(scores: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(0.5, scores, TWO.limits(), TWO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"scope": "globl"}, "scope='globl'.*Did you mean 'global'", id="scope"),
        pytest.param({"progress": 1.5}, "progress=1.5", id="progress"),
        pytest.param({"progress": math.nan}, "progress=nan", id="progress nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(0.5, TWO_SCORES, TWO.limits(), TWO, **arguments)


def test_nothing_to_prune() -> None:
    with pytest.raises(PlanError, match="no unit that can be pruned"):
        make_plan(0.5, {}, [], TWO)


def test_reachable_range_of_an_unknown_cost() -> None:
    with pytest.raises(ConfigError, match=r"cost 'mac'.*Did you mean 'macs'"):
        reachable_range("mac", TWO.limits(), TWO)


# Properties


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problem=problems(), target=targets, scope=st.sampled_from(SCOPES), progress=st.floats(0, 1))
def test_bounds_limits_and_ranks_hold(problem: Any, target: dict[str, float], scope: str, progress: float) -> None:
    cost, limits, scores = problem
    for key in target:
        least = reachable_range(key, limits, cost)[0] / cost.measure(key, cost.full)
        target[key] = min(1.0, max(target[key], least * (1 + 1e-9)))
    if not target:
        target = {"macs": 1.0}
    plan = make_plan(target, scores, limits, cost, scope=scope, progress=progress)
    for key, fraction in target.items():
        assert cost.of(plan, key) <= (1 - progress * (1 - fraction)) * cost.measure(key, cost.full) + 1e-6
    for limit in limits:
        kept, row = plan.kept[limit.name], scores[limit.name]
        assert len(kept) in limit.allowed
        ranked = sorted(range(limit.num_channels), key=lambda i: (-float(row[i]), i))
        assert kept == tuple(sorted(ranked[: len(kept)]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    problem=problems(),
    key=st.sampled_from(["macs", "params", "channels", "memory"]),
    scope=st.sampled_from(SCOPES),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_larger_target_never_keeps_less(problem: Any, key: str, scope: str, fractions: tuple[float, float]) -> None:
    cost, limits, scores = problem
    least, full = reachable_range(key, limits, cost)[0], cost.measure(key, cost.full)
    small, large = (cost.of(make_plan({key: bound}, scores, limits, cost, scope=scope), key) for bound in
                    sorted(max(2, int(least + f * (full - least))) for f in fractions))  # fmt: skip
    assert small <= large


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(max_units=3, max_channels=24), fraction=st.floats(0, 1), scope=st.sampled_from(SCOPES))
def test_a_bound_that_some_structure_meets_within_a_percent_is_met(problem: Any, fraction: float, scope: str) -> None:
    cost, limits, scores = problem
    least, most = reachable_range("macs", limits, cost)
    bound = int(least + fraction * (most - least))
    every = np.array(list(itertools.product(*(limit.allowed for limit in limits))))
    costs = cost.measure_many("macs", every)
    best = costs[costs <= bound].max()
    reached = cost.of(make_plan({"macs": bound}, scores, limits, cost, scope=scope))
    assert reached >= min(best, 0.99 * bound)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), scope=st.sampled_from(SCOPES), key=st.sampled_from(["macs", "params", "channels", "memory"]))
def test_target_one_changes_nothing(problem: Any, scope: str, key: str) -> None:
    cost, limits, scores = problem
    limits = [UnitLimits(x.name, x.num_channels, x.kind, x.floor, x.divisor) for x in limits]
    for target in (1.0, {key: 1.0}, {key: 1}, {"*": 1.0}):
        plan = make_plan(target, scores, limits, cost, scope=scope)
        assert plan.kept == {x.name: tuple(range(x.num_channels)) for x in limits}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), fraction=st.floats(0, 1), scope=st.sampled_from(SCOPES), order=st.randoms())
def test_ties_do_not_depend_on_the_order_of_the_scores(problem: Any, fraction: float, scope: str, order: Any) -> None:
    """Many scores are equal here. Of a unit the lower index stays; the plan is the same whenever it is made."""
    cost, limits, scores = problem
    least, most = reachable_range("macs", limits, cost)
    target = {"macs": max(2, int(least + fraction * (most - least)))}
    plan = make_plan(target, scores, limits, cost, scope=scope)
    shuffled = list(scores)
    order.shuffle(shuffled)
    again = {name: scores[name].clone() for name in shuffled}
    assert make_plan(target, again, limits, cost, scope=scope) == plan
    level = {name: torch.ones_like(row) for name, row in scores.items()}
    for name, kept in make_plan(target, level, limits, cost, scope=scope).kept.items():
        assert kept == tuple(range(len(kept))), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), value=st.sampled_from([math.nan, math.inf, -math.inf]), place=st.floats(0, 0.999))
def test_one_score_that_is_not_finite_is_named(problem: Any, value: float, place: float) -> None:
    cost, limits, scores = problem
    name = cost.names[int(place * len(cost.names))]
    channel = int(place * len(scores[name]))
    scores[name][channel] = value
    for target in (0.5, {"macs": 1.0}):
        with pytest.raises(PlanError, match=rf"score {value} for channel {channel} of unit {re.escape(repr(name))}"):
            make_plan(target, scores, limits, cost)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(max_channels=150), fraction=st.floats(0.3, 1))
def test_the_searched_threshold_and_refill_equal_trying_each_channel_in_turn(problem: Any, fraction: float) -> None:
    """Distinct scores and divisor 1, so that a step is a channel; the reference is the plain loop."""
    cost, _, _ = problem
    scores, limits = cost.random_scores(seed=len(cost.names)), cost.limits()
    bound = int(fraction * cost.measure("macs", cost.full))
    counts = np.ones(len(limits), np.int64)
    if cost.measure("macs", counts) > bound:
        return
    best_first = sorted(
        ((float(s), u) for u, n in enumerate(cost.names) for s in scores[n].sort(descending=True).values[1:]),
        reverse=True,
    )
    closed: set[int] = set()
    for _, unit in best_first:
        counts[unit] += 1
        if unit in closed or cost.measure("macs", counts) > bound:
            counts[unit] -= 1
            closed.add(unit)
    plan = make_plan({"macs": bound}, scores, limits, cost)
    if cost.measure("macs", counts) >= 0.99 * bound:
        assert list(plan.counts().values()) == counts.tolist()
    else:
        assert cost.of(plan) >= cost.measure("macs", counts)
