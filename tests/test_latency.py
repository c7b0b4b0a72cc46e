"""Measured latency: the measurement itself, the table made of it, and plans that are corrected until they meet it."""

from __future__ import annotations

import copy
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from lightning_prune.errors import CheckpointError, ConfigError, PlanError
from lightning_prune.importance import l1
from lightning_prune.latency import (
    LatencyCosts,
    LatencySettings,
    LatencyTable,
    build_table,
    plan_measured,
    resolve_latency,
)
from lightning_prune.mutator.preview import preview
from lightning_prune.plan import KeepPlan
from lightning_prune.targets import make_plan, reachable_range
from tests.timing import FakeClock, law


class Net(nn.Module):
    """A stem, two blocks alike around a skip, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 32, 1))
            for _ in range(2)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def mutator() -> ChannelMutator:
    torch.manual_seed(0)
    made = ChannelMutator(example_input=torch.randn(2, 3, 6, 6))
    made.prepare_from_supernet(Net())
    return made


def scores_of(mutator: ChannelMutator) -> dict[str, Tensor]:
    return {unit.name: l1(unit) for unit in mutator.units}


def table_of(mutator: ChannelMutator, clock: FakeClock, divisor: int = 4) -> LatencyTable:
    timed = LatencySettings(measure=clock).measure_with(mutator.example_input)
    return build_table(mutator, mutator.limits(divisor, 0.1), timed)


def small(mutator: ChannelMutator, counts: dict[str, int]) -> nn.Module:
    made = copy.deepcopy(mutator.model)
    other = ChannelMutator(example_input=mutator.example_input)
    other.prepare_from_supernet(made)
    other.set_choices(counts)
    return other.model


# The table


def test_the_table_has_a_few_allowed_widths_of_each_unit_and_of_all_together(mutator: ChannelMutator) -> None:
    clock = FakeClock()
    table = table_of(mutator, clock, divisor=4)
    full, names = mutator.graph.cost.full.tolist(), mutator.graph.cost.names
    assert len(clock.calls) == 3  # all together, the skip, and one of the two blocks alike
    rows = {tuple(row) for row in table.counts.tolist()}
    allowed = {limit.name: limit.allowed for limit in mutator.limits(4, 0.1)}
    assert tuple(table.counts[0]) == tuple(allowed[name][0] for name in names)
    for unit, name in enumerate(names):
        widths = {row[unit] for row in rows if sum(a != b for a, b in zip(row, full, strict=True)) == 1} - {full[unit]}
        assert widths == {allowed[name][0], *(full[unit] * k // 4 for k in (1, 2, 3))}
        assert widths <= set(allowed[name])
    assert table.dense_ms == pytest.approx(law(Net()))
    least = small(mutator, dict(zip(names, table.counts[0].tolist(), strict=True)))
    assert table.floor.median == pytest.approx(law(least) / law(Net()))


@pytest.mark.parametrize("vector", [1, 4], ids=["smooth", "steps"])
def test_the_latency_of_any_structure_follows_from_the_table(mutator: ChannelMutator, vector: int) -> None:
    clock = FakeClock(lambda model: law(model, vector))
    costs = LatencyCosts(mutator.graph.cost, table_of(mutator, clock))
    generator = np.random.default_rng(0)
    dense = law(Net(), vector)
    for _ in range(12):
        row = np.array([generator.integers(1, full // 4 + 1) * 4 for full in costs.full])
        true = law(small(mutator, dict(zip(costs.names, row.tolist(), strict=True))), vector) / dense
        assert costs.share(row[None])[0] == pytest.approx(true, rel=0.02)


def test_predictions_are_monotone_and_the_dense_model_is_one(mutator: ChannelMutator) -> None:
    noisy = np.random.default_rng(0)
    costs = LatencyCosts(mutator.graph.cost, table_of(mutator, FakeClock(lambda m: law(m) * noisy.uniform(0.8, 1.2))))
    assert costs.share(costs.full[None])[0] == pytest.approx(1.0, abs=1e-12)
    assert costs.measure("macs", costs.full) == mutator.graph.cost.measure("macs", costs.full)
    for unit, full in enumerate(costs.full):
        rows = np.repeat(costs.full[None] // 2, full, 0)
        rows[:, unit] = np.arange(1, full + 1)
        assert (np.diff(costs.measure_many("latency", rows)) >= 0).all()
    least, most = reachable_range("latency", mutator.limits(4, 0.1), costs)
    assert 0 < least < most == round(costs.table.dense_ms * 1e6)


def test_a_plateau_costs_nothing(mutator: ChannelMutator) -> None:
    """From the quarter to the half of a unit nothing is saved, so a plan keeps the half."""
    unit = next(unit for unit in mutator.units if unit.num_channels == 48)
    clock = FakeClock(
        lambda m: 1 + sum(24 if 12 <= b[0].out_channels <= 24 else b[0].out_channels for b in m.blocks), noise=(1,)
    )
    costs = LatencyCosts(mutator.graph.cost, table_of(mutator, clock))
    column = costs.names.index(unit.name)
    rows = np.repeat(costs.full[None], 4, 0)
    rows[:, column] = (12, 16, 24, 28)
    times = costs.measure_many("latency", rows)
    assert times[0] == times[1] == times[2] < times[3]


def test_a_table_is_plain_data_and_is_checked(mutator: ChannelMutator, tmp_path: Any) -> None:
    table = table_of(mutator, FakeClock())
    torch.save(table.to_dict(), tmp_path / "table.pt")
    saved = torch.load(tmp_path / "table.pt", weights_only=True)
    again = LatencyTable.from_dict(saved)
    row = mutator.graph.cost.full[None] // 2
    same = [LatencyCosts(mutator.graph.cost, one).measure_many("latency", row) for one in (table, again)]
    assert same[0] == same[1]
    with pytest.raises(CheckpointError, match="do not fit together"):
        LatencyTable.from_dict({**saved, "shares": saved["shares"][:2]})
    with pytest.raises(CheckpointError, match="do not fit together"):
        LatencyTable.from_dict({})
    with pytest.raises(CheckpointError, match="It is of another model"):
        LatencyCosts(mutator.graph.cost, LatencyTable.from_dict({**saved, "counts": saved["counts"] + 1}))


# Plans


def plan(mutator: ChannelMutator, target: Any, clock: FakeClock, **latency: Any) -> Any:
    settings = LatencySettings(measure=clock, **latency)
    return plan_measured(target, mutator, scores_of(mutator), latency=settings, divisor=4, min_ratio=0.1)


def time_of(mutator: ChannelMutator, outcome: Any, clock: FakeClock) -> float:
    return clock.bias * clock.time(small(mutator, outcome.plan.counts())) / clock.time(Net())


@pytest.mark.parametrize("bias", [0.8, 1.0, 1.15], ids=["faster than predicted", "as predicted", "slower"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_measured_model_meets_the_target(mutator: ChannelMutator, bias: float, share: float) -> None:
    clock = FakeClock(lambda model: law(model, 1), bias)
    outcome = plan(mutator, {"latency": share}, clock)
    true = time_of(mutator, outcome, clock)
    assert 0.93 * share < true <= share
    assert outcome.chosen.measured.median == pytest.approx(true)
    assert outcome.corrections <= (1 if bias == 1 else 5)
    assert (bias == 1) or outcome.corrections > 0
    assert clock.calls.count(["dense", "pruned"]) == len(outcome.attempts) == outcome.corrections + 1
    assert f"after {outcome.corrections} correction" in str(outcome)


def test_milliseconds_are_absolute(mutator: ChannelMutator) -> None:
    clock = FakeClock(lambda model: law(model, 1), 1.1)
    asked = 0.5 * law(Net(), 1)
    outcome = plan(mutator, {"latency_ms": asked}, clock)
    assert 0.9 * asked < outcome.chosen.time.ms.median <= asked


def test_other_bounds_hold_beside_it(mutator: ChannelMutator) -> None:
    clock = FakeClock()
    cost = mutator.graph.cost
    for target in ({"latency": 0.9, "macs": 0.3}, {"latency": 0.5, "params": 0.9}):
        outcome = plan(mutator, target, clock)
        row = np.array([outcome.plan.counts()[name] for name in cost.names])
        assert time_of(mutator, outcome, clock) <= target.pop("latency")
        (key, share), *_ = target.items()
        assert cost.measure(key, row) <= share * cost.measure(key, cost.full)
    assert plan(mutator, {"latency": 0.9, "macs": 0.3}, clock).corrections == 0  # it is not the latency that decides


@pytest.mark.parametrize("target", [{"latency": 1.0}, {"latency_ms": 1e6}], ids=["fraction", "absolute"])
def test_what_the_dense_model_meets_removes_nothing(mutator: ChannelMutator, target: Any) -> None:
    outcome = plan(mutator, target, FakeClock(bias=2.0))
    assert outcome.plan.counts() == {unit.name: unit.num_channels for unit in mutator.units}
    assert str(outcome) == "nothing is removed: the latency of the dense model"


def test_what_no_width_can_reach_says_what_can_be(mutator: ChannelMutator) -> None:
    with pytest.raises(PlanError, match=r"takes 0\.\d+ \[0\.\d+, 0\.\d+\] of the dense.*floor it is 0\.\d+ \[.*Raise"):
        plan(mutator, {"latency": 0.01}, FakeClock())
    with pytest.raises(PlanError, match="the nearest of 1 measured plans"):
        plan(mutator, {"latency": 0.5}, FakeClock(bias=1.2), corrections=0)


def test_a_miss_within_the_spread_is_taken_with_a_warning(mutator: ChannelMutator) -> None:
    smooth = partial(law, vector=1)
    first = plan(mutator, {"latency": 0.5}, FakeClock(smooth), corrections=0)
    slightly = 1.005 / first.chosen.used
    with pytest.warns(UserWarning, match=r"0\.50\d+ \[.*The difference is within the spread"):
        outcome = plan(mutator, {"latency": 0.5}, FakeClock(smooth, slightly), corrections=0)
    assert outcome.chosen.used == pytest.approx(1.005)
    assert outcome.plan == first.plan


def test_planning_leaves_the_model_alone(mutator: ChannelMutator) -> None:
    mutator.set_choices({mutator.units[0].name: 0.5})
    model, before, modes = mutator.model, mutator.current_plan(), [m.training for m in mutator.model.modules()]
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    outcome = plan(mutator, {"latency": 0.5}, FakeClock())
    assert mutator.current_plan() == before != outcome.plan
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    mutator.apply(outcome.plan)
    assert mutator.current_plan() == outcome.plan


class Caching(nn.Module):
    """Keeps a tensor of the width of its channels from the first forward in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.shift = nn.Parameter(torch.randn(16, 1, 1))
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.cached is None:
            self.cached = self.shift.exp()
        return self.two(self.one(x) + self.cached)


def test_a_preview_is_what_the_plan_would_give_whatever_the_model_has_cached() -> None:
    x = torch.randn(2, 3, 4, 4)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(Caching())
    wanted = KeepPlan({mutator.units[0].name: (0, 3, 5, 12)})
    with torch.no_grad():
        mutator.model.eval()(x)
        found = preview(mutator, wanted)(x)
        mutator.apply(wanted)
        assert torch.equal(found, export_pruned(mutator.model)(x))
    with pytest.raises(PlanError, match="Got a plan for unit 'conv'"):
        preview(mutator, KeepPlan({"conv": (0,)}))


def test_a_plan_is_really_measured(mutator: ChannelMutator) -> None:
    latency = {"rounds": 3, "warm_up": 1, "threads": 1, "batch_size": 4, "corrections": 0}
    outcome = plan_measured({"latency_ms": 1e4, "macs": 0.5}, mutator, scores_of(mutator), latency=latency)
    assert (outcome.chosen.time.rounds % 3, outcome.chosen.time.batch_size, outcome.corrections) == (0, 4, 0)


@pytest.mark.parametrize(
    ("noise", "blocks"),
    [pytest.param((0.99, 1, 1.01), 1, id="quiet"), pytest.param((0.7, 1, 1.3), 5, id="busy")],
)
def test_a_plan_is_measured_for_longer_on_a_busy_machine(mutator: ChannelMutator, noise: Any, blocks: int) -> None:
    clock = FakeClock(lambda model: law(model, 1), noise=noise)
    outcome = plan(mutator, {"latency": 0.6}, clock)
    assert outcome.chosen.time.rounds == 3 * blocks
    assert clock.calls.count(["dense", "pruned"]) == blocks * len(outcome.attempts)


def test_a_latency_without_a_table_says_how_to_get_one(mutator: ChannelMutator) -> None:
    with pytest.raises(ConfigError, match=r"without measured latencies.*plan_measured"):
        make_plan({"latency": 0.5}, scores_of(mutator), mutator.limits(), mutator.graph.cost)


@pytest.mark.parametrize(
    ("latency", "match"),
    [
        pytest.param({"backend": "tensorrt"}, "backend='tensorrt' for latency", id="backend"),
        pytest.param({"rounds": 0}, "rounds=0 for latency", id="rounds"),
        pytest.param({"corrections": -1}, "corrections=-1.*at least 0", id="corrections"),
        pytest.param({"round": 3}, "Got 'round' in latency. Did you mean 'rounds'", id="key"),
        pytest.param("eager", "latency='eager'; expected a mapping", id="text"),
    ],
)
def test_bad_settings_are_refused(latency: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve_latency(latency)


def test_settings_reach_the_measurement(mutator: ChannelMutator) -> None:
    clock, numbers = FakeClock(), count(2)
    names = ("batch_size", "rounds", "warm_up", "threads")
    given = {"backend": "onnxruntime", "device": "cpu", **{name: next(numbers) for name in names}}
    plan(mutator, {"latency": 0.8}, clock, **given)
    assert clock.options == given
