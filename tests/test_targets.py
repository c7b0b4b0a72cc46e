from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.plan import UnitLimits
from lightning_prune.targets import SCOPES, Target, make_plan, parse_target, reachable_range


class ChainCost:
    """A chain of 1x1 convolutions 3 -> C0 -> C1 -> ... -> 10, each on a map of its own area."""

    def __init__(self, channels: Sequence[int], areas: Sequence[int] | None = None, batch_size: int = 1) -> None:
        self.names = tuple(f"conv{i}_(0, {c})_out_1_in_1" for i, c in enumerate(channels))
        self.full = np.array(channels, np.int64)
        self.areas = np.array(areas or [1] * (len(channels) + 1), np.int64)
        self.batch_size = batch_size

    def measure_many(self, key: str, counts: np.ndarray) -> np.ndarray:
        rows = len(counts)
        inputs = np.concatenate([np.full((rows, 1), 3), counts], 1)
        outputs = np.concatenate([counts, np.full((rows, 1), 10)], 1)
        return {
            "channels": counts.sum(1),
            "params": (inputs * outputs).sum(1),
            "macs": (inputs * outputs * self.areas).sum(1) * self.batch_size,
            "flops": (inputs * outputs * self.areas).sum(1) * self.batch_size * 2,
            "memory": (outputs * self.areas).sum(1) * self.batch_size * 4,
        }[key]

    def measure(self, key: str, counts: np.ndarray) -> int:
        return int(self.measure_many(key, np.asarray(counts)[None])[0])

    def of(self, plan: Any, key: str = "macs") -> int:
        return self.measure(
            key, np.array([plan.counts().get(n, c) for n, c in zip(self.names, self.full, strict=True)])
        )

    def limits(self, floor: int = 1, divisor: int = 1, kinds: Sequence[str] | None = None) -> list[UnitLimits]:
        kinds = kinds or [f"c{c}" for c in self.full]
        return [UnitLimits(n, int(c), k, floor, divisor) for n, c, k in zip(self.names, self.full, kinds, strict=True)]

    def scores(self, *rows: Sequence[float]) -> dict[str, torch.Tensor]:
        return {n: torch.tensor(row, dtype=torch.float32) for n, row in zip(self.names, rows, strict=True)}

    def random_scores(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(int(c), generator=generator) for n, c in zip(self.names, self.full, strict=True)}


@st.composite
def problems(draw: st.DrawFn, max_units: int = 5, max_channels: int = 40) -> tuple[ChainCost, list[UnitLimits], dict]:
    channels = draw(st.lists(st.integers(2, max_channels), min_size=1, max_size=max_units))
    areas = draw(st.lists(st.sampled_from([1, 4, 16, 49]), min_size=len(channels) + 1, max_size=len(channels) + 1))
    cost = ChainCost(channels, areas)
    limits = [
        UnitLimits(
            name,
            c,
            kind=f"c{c % 3}",
            floor=draw(st.integers(1, max(1, c // 2))),
            divisor=(divisor := draw(st.sampled_from([1, 2, 8]))) if c >= 16 else 1,
            ceiling=draw(st.sampled_from([None, None, max(c - 3, c // 2 + 1, divisor if c >= 16 else 1)])),
        )
        for name, c in zip(cost.names, channels, strict=True)
    ]
    # few distinct values, so that ties are common
    values = st.integers(0, draw(st.sampled_from([0, 3, 1000])))
    scores = {
        n: torch.tensor(draw(st.lists(values, min_size=c, max_size=c))).float()
        for n, c in zip(cost.names, channels, strict=True)
    }
    return cost, limits, scores


targets = st.fixed_dictionaries(
    {}, optional={k: st.floats(0.05, 1.0) for k in ("macs", "params", "channels", "memory")}
)


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param(0.5, Target(choices={"*": 0.5}), id="ratio"),
        pytest.param(1.0, Target(choices={"*": 1.0}), id="keep all"),
        pytest.param(1, Target(choices={"*": 1.0}), id="int 1 keeps all"),
        pytest.param(np.float32(0.5), Target(choices={"*": 0.5}), id="numpy"),
        pytest.param({"macs": 0.5, "params": 0.25}, Target(costs={"macs": 0.5, "params": 0.25}), id="two costs"),
        pytest.param({"flops": "2G"}, Target(costs={"flops": 2_000_000_000}), id="giga"),
        pytest.param({"macs": "500M"}, Target(costs={"macs": 500_000_000}), id="mega"),
        pytest.param({"params": "1.5k"}, Target(costs={"params": 1500}), id="kilo, small letter"),
        pytest.param({"params": "0.001K"}, Target(costs={"params": 1}), id="a suffix is absolute"),
        pytest.param({"params": "0.3"}, Target(costs={"params": 0.3}), id="fraction as text"),
        pytest.param({"memory": 8.0}, Target(costs={"memory": 8}), id="whole float"),
        pytest.param({"macs": 1}, Target(costs={"macs": 1.0}), id="1 keeps all"),
        pytest.param({"latency": "0.6", "macs": 0.5}, Target(costs={"latency": 0.6, "macs": 0.5}), id="latency"),
        pytest.param({"latency_ms": 12.5}, Target(costs={"latency_ms": 12.5}), id="milliseconds"),
        pytest.param({"latency_ms": 1}, Target(costs={"latency_ms": 1.0}), id="one millisecond"),
        pytest.param({"latency_ms": 0.25}, Target(costs={"latency_ms": 0.25}), id="less than a millisecond"),
        pytest.param({"conv1_(0, 8)_out_1_in_1": 3}, Target(choices={"conv1_(0, 8)_out_1_in_1": 3}), id="unit"),
        pytest.param({"layer*": 0.5, "head.*": 8.0}, Target(choices={"layer*": 0.5, "head.*": 8}), id="globs"),
        pytest.param({"a*": {"choice": 0.5}}, Target(choices={"a*": 0.5}), id="nested choice"),
    ],
)
def test_parse_target(target: object, expected: Target) -> None:
    parsed = parse_target(target)
    assert parsed == expected
    assert [type(v) for v in {**parsed.costs, **parsed.choices}.values()] == [
        type(v) for v in {**expected.costs, **expected.choices}.values()
    ]
    assert parse_target(parsed) is parsed


def test_dictconfig_resolves_interpolations() -> None:
    config = OmegaConf.create({"rest": 0.25, "target": {"macs": "${rest}"}})
    assert parse_target(config.target) == Target(costs={"macs": 0.25})


def test_dictconfig_with_a_broken_interpolation() -> None:
    with pytest.raises(ConfigError, match="cannot resolve"):
        parse_target(OmegaConf.create({"macs": "${nowhere}"}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        pytest.param(0, "target=0; expected a ratio", id="zero"),
        pytest.param(-0.5, "target=-0.5", id="negative"),
        pytest.param(math.nan, "target=nan", id="nan"),
        pytest.param(math.inf, "target=inf", id="inf"),
        pytest.param(1.5, "target=1.5.*says what remains", id="ratio above 1"),
        pytest.param(8, "target=8, a count for every unit.*'params': 8", id="bare count"),
        pytest.param(True, "target=True", id="bool"),
        pytest.param(None, "target=None", id="none"),
        pytest.param([0.5], r"target=\[0.5\]", id="list"),
        pytest.param({}, "empty target", id="empty"),
        pytest.param({"latency": 12.5}, r"'latency'\]=12.5; expected a fraction.*'latency_ms': 12.5", id="not ms"),
        pytest.param({"latency": 0}, r"'latency'\]=0; expected a fraction", id="latency 0"),
        pytest.param({"latency": math.nan}, r"'latency'\]=nan; expected a fraction", id="latency nan"),
        pytest.param({"latency_ms": -1}, r"'latency_ms'\]=-1; expected milliseconds", id="negative milliseconds"),
        pytest.param({"latency_ms": math.inf}, r"'latency_ms'\]=inf; expected milliseconds", id="endless"),
        pytest.param({"latency_ms": "2G"}, r"'latency_ms'\]='2G'; expected milliseconds", id="suffix of milliseconds"),
        pytest.param({"latency_ms": True}, r"'latency_ms'\]=True", id="bool milliseconds"),
        pytest.param({"latancy": 0.5}, "key 'latancy'.*Did you mean 'latency'", id="misspelt latency"),
        pytest.param({"mac": 0.5}, "key 'mac'.*Did you mean 'macs'", id="misspelt cost"),
        pytest.param({3: 0.5}, "key 3", id="key not text"),
        pytest.param({"macs": 0.5, "conv*": 0.5}, "'macs' and 'conv\\*'; expected either", id="costs and units"),
        pytest.param({"macs": 0}, r"target\['macs'\]=0;", id="cost 0"),
        pytest.param({"macs": -2}, r"target\['macs'\]=-2", id="cost negative"),
        pytest.param({"macs": math.nan}, r"target\['macs'\]=nan", id="cost nan"),
        pytest.param({"macs": math.inf}, r"target\['macs'\]=inf", id="cost inf"),
        pytest.param({"macs": True}, r"target\['macs'\]=True", id="cost bool"),
        pytest.param({"macs": 2.5}, r"target\['macs'\]=2.5; .*whole number", id="cost fractional"),
        pytest.param({"macs": "50%"}, r"target\['macs'\]='50%'; .*'2G'", id="percent"),
        pytest.param({"macs": "-2G"}, r"'-2G'", id="negative text"),
        pytest.param({"macs": None}, r"target\['macs'\]=None", id="cost none"),
        pytest.param({"conv*": 2.5}, r"target\['conv\*'\]=2.5", id="choice fractional"),
        pytest.param({"conv*": {"ratio": 0.5}}, "no 'choice'", id="entry without choice"),
        pytest.param({"channel_unit": {"units": {}}}, "no 'units' in 'channel_unit'", id="template without units"),
        pytest.param("no/such/file.yaml", "'no/such/file.yaml', which is not a file", id="missing file"),
    ],
)
def test_parse_target_rejects(target: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_target(target)


TEMPLATE = {
    "type": "ChannelMutator",
    "channel_unit": {
        "type": "L1MutableChannelUnit",
        "default_args": {"choice_mode": "ratio"},
        "units": {
            "a": {"choice": 0.5},
            "b": {"choice": 8.0},
            "c": {"choice": 1, "init_args": {"choice_mode": "number"}},
            "f": {"choice": 3, "init_args": {"choice_mode": "bucket", "divisor": 8, "num_channels": 20}},
            "d": {"choice": 3, "init_args": {"choice_mode": "bucket", "divisor": 8}},
            "e": {"choice": 2.0, "init_args": {"choice_mode": "bucket", "divisor": 8}},
        },
    },
    "fingerprint": "0123",
}


@pytest.mark.parametrize("as_file", [False, True], ids=["mapping", "YAML"])
def test_config_template(as_file: bool, tmp_path: Path) -> None:
    """By value: 1 keeps all. A bucket is 8 channels, the last one may be smaller."""
    OmegaConf.save(OmegaConf.create(TEMPLATE), tmp_path / "plan.yaml")
    parsed = parse_target(tmp_path / "plan.yaml" if as_file else TEMPLATE)
    assert parsed == Target(choices={"a": 0.5, "b": 8, "c": 1.0, "d": 24, "e": 16, "f": 20})
    assert isinstance(parsed.choices["c"], float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("conv1*: 0.5\nconv2*: 8\n", Target(choices={"conv1*": 0.5, "conv2*": 8}), id="flat"),
        pytest.param("macs: 2e9\n", Target(costs={"macs": 2_000_000_000}), id="costs"),
    ],
)
def test_yaml_file(text: str, expected: Target, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text(text)
    assert parse_target(str(tmp_path / "target.yaml")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("macs: [", "not readable as YAML", id="broken"),
        pytest.param("- 0.5\n", "without a mapping", id="list"),
        pytest.param("macs: 0\n", r"target file '.*target.yaml'\['macs'\]=0", id="value"),
        pytest.param("", "empty target file", id="empty"),
    ],
)
def test_bad_yaml_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_target(tmp_path / "target.yaml")


# ---------------------------------------------------------------- choices

TWO = ChainCost([4, 8])
TWO_SCORES = TWO.scores([4, 1, 3, 2], [1, 8, 2, 7, 3, 6, 4, 5])
FIRST, SECOND = TWO.names


@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_keeps_the_best_of_every_unit(scope: str) -> None:
    plan = make_plan(0.5, TWO_SCORES, TWO.limits(), TWO, scope=scope)
    assert plan.kept == {FIRST: (0, 2), SECOND: (1, 3, 5, 7)}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param({FIRST: 0.5}, {FIRST: (0, 2), SECOND: tuple(range(8))}, id="others keep all"),
        pytest.param({FIRST: 1.0, SECOND: 3}, {FIRST: (0, 1, 2, 3), SECOND: (1, 3, 5)}, id="count"),
        pytest.param({"conv1*": 2}, {FIRST: (0, 1, 2, 3), SECOND: (1, 3)}, id="glob"),
        pytest.param({FIRST: 3, "*": 0.25}, {FIRST: (0, 2, 3), SECOND: (1, 3)}, id="name before glob"),
        pytest.param({"conv*": 0.25, "conv1*": 0.5}, {FIRST: (0,), SECOND: (1, 3, 5, 7)}, id="later glob"),
    ],
)
def test_unit_choices(target: dict[str, float], expected: dict[str, tuple[int, ...]]) -> None:
    assert make_plan(target, TWO_SCORES, TWO.limits(), TWO).kept == expected


def test_a_choice_rounds_down_to_the_divisor_but_not_below_the_floor() -> None:
    cost = ChainCost([20, 20, 20])
    limits = [UnitLimits(n, 20, "k", floor=f, divisor=8) for n, f in zip(cost.names, (1, 9, 17), strict=True)]
    plan = make_plan(0.6, cost.random_scores(), limits, cost)
    assert list(plan.counts().values()) == [8, 16, 20]


def test_float_rounding_does_not_lose_a_channel() -> None:
    cost = ChainCost([100])
    assert list(make_plan(0.29, cost.random_scores(), cost.limits(), cost).counts().values()) == [29]


def test_progress_interpolates_the_ratio() -> None:
    cost = ChainCost([100])
    counts = [
        len(make_plan(0.2, cost.random_scores(), cost.limits(), cost, progress=p).kept[cost.names[0]])
        for p in (0.0, 0.25, 0.5, 1.0)
    ]
    assert counts == [100, 80, 60, 20]


def test_units_that_cannot_be_pruned_may_stand_in_a_structure_file() -> None:
    plan = make_plan({FIRST: 1.0, SECOND: 0.5}, TWO_SCORES, TWO.limits()[1:], TWO)
    assert plan.kept == {SECOND: (1, 3, 5, 7)}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        pytest.param(
            {"conv7*": 0.5}, r"'conv7\*' in target, which matches none of 1 units.*closest units: 'conv1", id="glob"
        ),
        pytest.param({FIRST: 0.5}, "choice=0.5 for unit 'conv0.*cannot be pruned", id="frozen unit"),
        pytest.param({SECOND: 9}, r"choice=9 for unit 'conv1.*has 8 channels", id="more than there are"),
    ],
)
def test_choices_that_do_not_fit(target: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(target, TWO_SCORES, TWO.limits()[1:], TWO)


# ---------------------------------------------------------------- costs


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


# ---------------------------------------------------------------- properties


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
