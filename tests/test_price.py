"""Cost-aware ranking, and channels that may or may not come back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import PruningCallback
from lightning_prune.errors import ConfigError
from lightning_prune.plan import KeepPlan
from lightning_prune.targets import make_plan
from lightning_prune.targets.price import marginal_costs, per_cost_scores
from tests.chain_cost import ChainCost, problems
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.test_resume import assert_same, run

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*Found keys that are not in the model state dict.*")]

# 3 -> 4 -> 6 -> 10, on maps of 5, 2 and 1: MACs 5 * 3 * a + 2 * a * b + b * 10
CHAIN = ChainCost([4, 6], [5, 2, 1])


@pytest.mark.parametrize(
    ("key", "kept", "expected"),
    [
        pytest.param("macs", {}, [15 + 2 * 6, 2 * 4 + 10], id="dense"),
        pytest.param("flops", {}, [2 * 27, 2 * 18], id="flops"),
        pytest.param("params", {}, [3 + 6, 4 + 10], id="params"),
        pytest.param("memory", {}, [4 * 5, 4 * 2], id="memory"),
        pytest.param("channels", {}, [1, 1], id="channels"),
        pytest.param("macs", dict(zip(CHAIN.names, (2, 3), strict=True)), [15 + 2 * 3, 2 * 2 + 10], id="as it is now"),
        pytest.param("macs", {CHAIN.names[0]: 1}, [15 + 2 * 6, 2 * 1 + 10], id="the last one: what comes next"),
    ],
)
def test_what_a_channel_costs(key: str, kept: dict[str, int], expected: list[int]) -> None:
    assert marginal_costs(key, CHAIN.limits(), CHAIN, kept).tolist() == expected


def test_the_cost_is_that_of_a_step_of_the_divisor() -> None:
    class Steep(ChainCost):
        """A channel alone saves nothing; two of them do."""

        def measure_many(self, key: str, counts: np.ndarray) -> np.ndarray:
            return counts[:, 0] // 2 * 10

    cost = Steep([4])
    assert marginal_costs("macs", cost.limits(divisor=2), cost, {}).tolist() == [5.0]
    assert marginal_costs("macs", cost.limits(divisor=2), cost, {cost.names[0]: 2}).tolist() == [5.0]


def test_what_costs_nothing_is_not_worth_endlessly_much() -> None:
    class Free(ChainCost):
        def measure_many(self, key: str, counts: np.ndarray) -> np.ndarray:
            return 0 * counts[:, 0]

    cost = Free([4])
    rows = per_cost_scores("macs", [np.array([1.0, 2.0, 3.0, 4.0])], cost.limits(), cost, {})
    assert rows[0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_an_unknown_cost() -> None:
    with pytest.raises(ConfigError, match=r"per_cost='mac'\. Did you mean 'macs'"):
        make_plan({"macs": 0.5}, CHAIN.random_scores(), CHAIN.limits(), CHAIN, per_cost="mac")
    with pytest.raises(ConfigError, match="per_cost='mac' for PruningCallback"):
        PruningCallback({"macs": 0.5}, per_cost="mac")


def test_of_equal_scores_the_cheaper_channels_stay() -> None:
    """The first unit's channels cost 103 each, the second's 14: without prices both lose alike."""
    cost = ChainCost([4, 4], [33, 1, 1])
    scores = cost.scores([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0])
    alike = make_plan({"channels": 0.5}, scores, cost.limits(), cost)
    assert alike.counts() == dict.fromkeys(cost.names, 2)
    priced = make_plan({"channels": 0.5}, scores, cost.limits(), cost, per_cost="macs")
    assert priced == KeepPlan({cost.names[0]: (0,), cost.names[1]: (0, 1, 2)})


def test_prices_follow_the_structure_of_the_moment() -> None:
    """Dense, a channel costs 4 in the first unit and 40 in the second; once one is left there, 1 and 40."""
    cost = ChainCost([40, 4], [0, 1, 0])
    scores = cost.scores([1.0] * 40, [10.5] * 4)
    names = cost.names
    dense = per_cost_scores("macs", [s.double().numpy() for s in scores.values()], cost.limits(), cost, {})
    assert [row[0] for row in dense] == [1 / 4, 10.5 / 40]
    small = {names[0]: 40, names[1]: 1}
    later = per_cost_scores("macs", [s.double().numpy() for s in scores.values()], cost.limits(), cost, small)
    assert [row[0] for row in later] == [1.0, 10.5 / 40]
    plans = (make_plan({"channels": 22}, scores, cost.limits(), cost, per_cost="macs", kept=now) for now in ({}, small))
    assert [tuple(plan.counts().values()) for plan in plans] == [(18, 4), (21, 1)]


@given(problem=problems(), fraction=st.floats(0.3, 1.0), key=st.sampled_from(["macs", "params", "memory", "channels"]))
@settings(max_examples=60)
def test_targets_hold_whatever_the_ranking(problem: Any, fraction: float, key: str) -> None:
    cost, limits, scores = problem
    least = cost.of(KeepPlan({limit.name: tuple(range(limit.allowed[0])) for limit in limits}))
    bound = max(int(fraction * cost.measure("macs", cost.full)), least)
    plan = make_plan({"macs": max(bound, 2)}, scores, limits, cost, per_cost=key)
    assert cost.of(plan) <= max(bound, 2)
    for limit in limits:
        count = plan.counts()[limit.name]
        best = scores[limit.name].argsort(descending=True, stable=True)[:count].sort().values.tolist()
        assert list(plan.kept[limit.name]) == best


def test_the_callback_ranks_by_cost() -> None:
    """One score for all: a channel of conv1 costs 36 * 9 * (3 + 32) MACs, one of conv2 36 * 9 * 16 + 5."""

    def flat(unit: Any) -> Tensor:
        return torch.ones(unit.num_channels)

    found = {}
    for per_cost in (None, "macs"):
        model = LitNet()
        trainer(pruning({"channels": 0.5}, importance=flat, per_cost=per_cost)).fit(model, loader())
        found[per_cost] = model.conv1.out_channels, model.conv2.out_channels
    assert found[None] == (8, 16)
    assert found["macs"][0] < 8 < 16 < found["macs"][1]


def test_the_callback_prices_the_structure_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, ...]] = []

    def spy(*args: Any, **kwargs: Any) -> KeepPlan:
        given.append(tuple(kwargs["kept"].values()))
        return make_plan(*args, **kwargs)

    monkeypatch.setattr("lightning_prune.callback.planner.make_plan", spy)
    trainer(pruning(0.5, per_cost="macs")).fit(LitNet(), loader())
    assert given == [(16, 32), (16, 32), (12, 24)]  # at setup, and at both firings


def test_fisher_is_normalized_by_cost_as_in_its_paper() -> None:
    model = LitNet()
    callback = pruning({"macs": 0.5}, importance="fisher", per_cost="memory")
    trainer(callback).fit(model, loader())
    assert callback.is_done
    assert callback.mutator is not None
    assert callback.mutator.cost().macs <= 0.5 * callback.mutator.graph.cost.measure(
        "macs", callback.mutator.graph.cost.full
    )


# Channels that come back


def kept_at_each_firing(**arguments: Any) -> list[dict[str, set[int]]]:
    """Return what is kept after each firing; every second firing prefers the channels at the other end."""
    calls: list[str] = []
    found: list[dict[str, set[int]]] = []

    def turning(unit: Any) -> Tensor:
        calls.append(unit.name)
        order = torch.arange(1.0, unit.num_channels + 1)
        return order if calls.count(unit.name) % 2 else order.flip(0)

    class Keep(LitNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            kept = callback.state_dict().get("kept", {})
            now = {name: set(indices.tolist()) for name, indices in kept.items()}
            if now and now not in found:
                found.append(now)

    schedule = {"kind": "linear", "begin": 1, "end": 4}
    callback = pruning(0.25, importance=turning, schedule=schedule, **arguments)
    trainer(callback, max_epochs=5).fit(Keep(), loader())
    assert len(found) == 3
    return found


def test_removed_channels_may_come_back() -> None:
    found = kept_at_each_firing()
    assert any(not after[name] <= before[name] for before, after in itertools.pairwise(found) for name in after)


@pytest.mark.parametrize("scope", ["global", "isomorphic", "local"])
@pytest.mark.parametrize("compact", ["never", "each"])
def test_removed_channels_stay_away_on_request(compact: str, scope: str) -> None:
    found = kept_at_each_firing(regrow=False, compact=compact, scope=scope)
    for before, after in itertools.pairwise(found):
        assert all(after[name] < before[name] for name in after)
    sizes = [{name: len(kept) for name, kept in each.items()} for each in found]
    assert sizes[-1] == {"conv1_(0, 16)_out_2_in_2": 4, "conv2_(0, 32)_out_1_in_1": 8}


def test_units_are_normalized_over_the_living_on_request() -> None:
    given: list[bool] = []

    class Tells:
        def scores(self, units: Any, scope: str = "global", *, living: bool = False) -> dict[str, Tensor]:
            given.append(living)
            return {unit.name: torch.arange(1.0, unit.num_channels + 1) for unit in units}

    for regrow in (True, False):
        trainer(pruning(importance=Tells(), regrow=regrow)).fit(LitNet(), loader())
    assert given == [False, False, True, True]


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("importance", ["l1", "taylor"])
def test_a_run_without_regrowth_resumes(importance: str, epoch: int, tmp_path: Path) -> None:
    given = {"importance": importance, "regrow": False, "per_cost": "macs"}
    given["schedule"] = {"kind": "linear", "begin": 1, "end": 4}
    whole = run(tmp_path / "a", **given)
    assert_same(whole, run(tmp_path / "b", ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt", **given))
