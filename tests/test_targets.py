"""Targets: how they are read, and choices of units."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from lightning_prune.errors import ConfigError
from lightning_prune.plan import UnitLimits
from lightning_prune.targets import SCOPES, Target, make_plan, parse_target
from tests.chain_cost import FIRST, SECOND, TWO, TWO_SCORES, ChainCost

# Parsing


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


# Choices


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
