"""What holds for single units or layers: floors, ceilings, fixed choices, divisors, and what is left alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn

from lightning_prune import ChannelMutator
from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.mutator.overrides import Override, parse_overrides
from lightning_prune.ops import dynamic_ops
from lightning_prune.plan import UnitLimits
from lightning_prune.targets import make_plan, reachable_range
from tests.chain_cost import ChainCost
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET

FIRST, SECOND, THIRD = "stem.conv_(0, 16)_out_2_in_2", "block.0_(0, 32)_out_1_in_1", "block.1_(0, 64)_out_1_in_1"


class Net(nn.Module):
    """Three units of 16, 32 and 64 channels: a stem with a norm, and a block of two layers before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(3, 16, 1))
        self.stem.add_module("norm", nn.BatchNorm2d(16))
        self.block = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 64, 1))
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def prepared(overrides: Any = None, **arguments: Any) -> ChannelMutator:
    mutator = ChannelMutator(example_input=torch.randn(2, 3, 4, 4), overrides=overrides, **arguments)
    mutator.prepare_from_supernet(Net())
    return mutator


def allowed(mutator: ChannelMutator, divisor: int = 8, min_ratio: float = 0.1) -> dict[str, tuple[int, ...]]:
    return {x.name: x.at(1.0).allowed for x in mutator.limits(divisor, min_ratio)}


DENSE = {FIRST: (8, 16), SECOND: (8, 16, 24, 32), THIRD: (8, 16, 24, 32, 40, 48, 56, 64)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(None, {}, id="none"),
        pytest.param({THIRD: {"min": 0.5}}, {THIRD: (32, 40, 48, 56, 64)}, id="floor, ratio"),
        pytest.param({THIRD: {"min": 50}}, {THIRD: (56, 64)}, id="floor, count"),
        pytest.param({THIRD: {"min": 50.0}}, {THIRD: (56, 64)}, id="floor, whole float"),
        pytest.param({THIRD: {"min": 1}}, {THIRD: (64,)}, id="floor of 1 is everything"),
        pytest.param({THIRD: {"max": 0.4}}, {THIRD: (8, 16, 24)}, id="ceiling, ratio"),
        pytest.param({THIRD: {"max": 16}}, {THIRD: (8, 16)}, id="ceiling, count"),
        pytest.param({THIRD: {"min": 0.25, "max": 32}}, {THIRD: (16, 24, 32)}, id="floor and ceiling"),
        pytest.param({THIRD: {"choice": 0.5}}, {THIRD: (32,)}, id="choice, ratio"),
        pytest.param({THIRD: {"choice": 30}}, {THIRD: (24,)}, id="a choice rounds down to the divisor"),
        pytest.param({THIRD: {"choice": 30, "divisor": 1}}, {THIRD: (30,)}, id="or to its own"),
        pytest.param({SECOND: {"divisor": 16}}, {SECOND: (16, 32)}, id="divisor"),
        pytest.param({"stem*": {"ignore": True}}, {FIRST: (16,)}, id="ignore"),
        pytest.param({"stem*": {"ignore": False}}, {}, id="ignore not"),
        pytest.param({"stem.norm": {"ignore": True}}, {FIRST: (16,)}, id="a layer further on"),
        pytest.param({"block": {"ignore": True}}, {SECOND: (32,), THIRD: (64,)}, id="a module that holds layers"),
        pytest.param({"block.1.weight": {"ignore": True}}, {THIRD: (64,)}, id="a parameter"),
        pytest.param(
            {"*": {"choice": 0.5}, "block*": {"ignore": True}, "block.0": {"max": 16}},
            {FIRST: (8,), SECOND: (8, 16), THIRD: (64,)},
            id="a later glob",
        ),
        pytest.param({THIRD: {"ignore": True}, "*": {"max": 16}}, {SECOND: (8, 16), THIRD: (64,)}, id="a full name"),
        pytest.param(OmegaConf.create({"block.1": {"min": 50}}), {THIRD: (56, 64)}, id="omegaconf"),
    ],
)
def test_limits(overrides: Any, expected: dict[str, tuple[int, ...]]) -> None:
    assert allowed(prepared(overrides)) == {**DENSE, **expected}


def test_a_floor_replaces_min_ratio_and_a_ceiling_lowers_it() -> None:
    found = allowed(prepared({THIRD: {"min": 0.25}, SECOND: {"max": 0.5}}), divisor=8, min_ratio=0.9)
    assert found == {FIRST: (16,), SECOND: (16,), THIRD: (16, 24, 32, 40, 48, 56, 64)}


def test_the_floor_of_a_unit_itself_always_holds() -> None:
    own = {"default_args": {"min_value": 12}}
    assert allowed(prepared({THIRD: {"min": 0.01}}, channel_unit=own), divisor=1)[THIRD][0] == 12
    with pytest.raises(ConfigError, match=r"choice=8 in overrides\['block.1'\], which leaves 8 of 64.*at least 12"):
        prepared({"block.1": {"choice": 8}}, channel_unit=own)


def test_heads_take_a_divisor_of_their_own_only() -> None:
    """A divisor for all does not reach axes that are not channels; one for this unit does."""
    mutator = ChannelMutator(example_input=torch.randn(2, 5, 64), overrides={"*_heads": {"divisor": 4}})
    model = nn.TransformerEncoderLayer(64, 8, 32, batch_first=True)
    mutator.prepare_from_supernet(model)
    assert next(x.divisor for x in mutator.limits(divisor=8) if x.name.endswith("_heads")) == 4


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        pytest.param([1], r"overrides=\[1\]; expected globs and mappings", id="list"),
        pytest.param({"a": 32}, r"overrides\['a'\]=32; expected a mapping with some of 'min'", id="bare number"),
        pytest.param({"a": {}}, r"overrides\['a'\]={}", id="empty"),
        pytest.param({"a": {"mim": 0.5}}, r"key 'mim' in overrides\['a'\]. Did you mean 'min'", id="key"),
        pytest.param({"a": {"min": 0}}, r"overrides\['a'\]\['min'\]=0; expected a ratio", id="zero"),
        pytest.param({"a": {"max": -1}}, r"\['max'\]=-1", id="negative"),
        pytest.param({"a": {"max": 2.5}}, r"\['max'\]=2.5", id="neither ratio nor count"),
        pytest.param({"a": {"min": math.nan}}, r"\['min'\]=nan", id="nan"),
        pytest.param({"a": {"choice": True}}, r"\['choice'\]=True", id="bool"),
        pytest.param({"a": {"choice": "half"}}, r"\['choice'\]='half'", id="text"),
        pytest.param({"a": {"ignore": 1}}, r"\['ignore'\]=1; expected true or false", id="ignore"),
        pytest.param({"a": {"divisor": 0}}, r"\['divisor'\]=0; expected a whole number", id="divisor"),
        pytest.param({"a": {"divisor": 2.5}}, r"\['divisor'\]=2.5", id="divisor fraction"),
        pytest.param({"a": {"min": 0.9, "max": 0.5}}, r"min=0.9 above max=0.5 in overrides\['a'\]", id="floor above"),
        pytest.param({"a": {"choice": 8, "max": 16}}, "'choice' together with 'max'", id="choice and ceiling"),
        pytest.param({"a": {"ignore": True, "choice": 8}}, "'ignore' together with 'choice'", id="ignore and choice"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(overrides: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ChannelMutator(overrides=overrides)
    with pytest.raises(ConfigError, match=match):
        pruning(overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        pytest.param(
            {"blocks.1": {"min": 8}}, r"'blocks.1' in overrides, which matches none of 3.*'block.1'", id="glob"
        ),
        pytest.param({"head": {"ignore": True}}, "'head' in overrides, which matches none", id="a layer of no unit"),
        pytest.param({"stem": {"max": 32}}, r"max=32 in overrides\['stem'\].*has 16 channels", id="too many"),
        pytest.param({"stem": {"min": 12, "max": 0.5}}, r"min=12 and max=0.5.*'stem.conv.*no count", id="floor above"),
    ],
)
def test_what_the_model_cannot_do_leaves_it_as_it_was(overrides: Any, match: str) -> None:
    model, mutator = Net(), ChannelMutator(example_input=torch.randn(2, 3, 4, 4), overrides=overrides)
    with pytest.raises(ConfigError, match=match):
        mutator.prepare_from_supernet(model)
    assert not dynamic_ops(model)


def test_steps_that_leave_no_count_are_told_with_the_divisor() -> None:
    mutator = prepared({"block.1": {"min": 33, "max": 39}})
    with pytest.raises(ConfigError, match=r"min=33 and max=39.*64 channels in steps of 8 has no count"):
        mutator.limits(divisor=8)
    with pytest.raises(ConfigError, match=r"max=4 .*leaves 4 of 64 channels.*at least 8, in steps of 8"):
        prepared({"block.1": {"max": 4}}).limits(divisor=8)


def test_the_report_tells_what_can_be_reached() -> None:
    overrides = {FIRST: {"ignore": True}, SECOND: {"min": 0.25, "max": 0.5}, THIRD: {"choice": 32}}
    mutator = prepared(overrides)
    costs = mutator.report().to_dict()["costs"]
    assert costs["channels"] == {"current": 112, "dense": 112, "minimum": 16 + 8 + 32, "maximum": 16 + 16 + 32}
    assert costs["macs"]["minimum"] == 2 * (16 * (3 * 16 + 16 * 8 + 8 * 32) + 32 * 5)
    assert (costs["macs"]["minimum"], costs["macs"]["maximum"]) == reachable_range(
        "macs", mutator.limits(), mutator.graph.cost
    )
    assert "reachable maximum" in str(mutator.report())
    least = prepared().report(divisor=8, min_ratio=0.5).to_dict()["costs"]["channels"]
    assert (least["minimum"], least["maximum"]) == (8 + 16 + 32, 112)
    mutator.set_choices({THIRD: 48})
    mutator.fix_channel_mutables()
    assert mutator.report().to_dict()["costs"]["channels"]["minimum"] == 16 + 32 + 48


def test_a_target_out_of_reach_says_so() -> None:
    mutator = prepared({THIRD: {"ignore": True}})
    scores = {unit.name: torch.arange(float(unit.num_channels)) for unit in mutator.units}
    with pytest.raises(PlanError, match=r"least that can be reached is 66 .*what overrides keep"):
        make_plan({"channels": 0.5}, scores, mutator.limits(), mutator.graph.cost)


# On the way


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_choices_and_ceilings_are_reached_gradually(progress: float) -> None:
    cost = ChainCost([64, 64, 64])
    a, b, c = cost.names
    limits = [
        UnitLimits(a, 64, "k", floor=32, divisor=4, goal=32),
        UnitLimits(b, 64, "k", floor=4, divisor=4, goal=48),
        UnitLimits(c, 64, "k"),
    ]
    counts = make_plan(1.0, cost.random_scores(), limits, cost, progress=progress).counts()
    assert counts == {a: 64 - int(32 * progress), b: 64 - int(16 * progress), c: 64}
    unwanted = {**cost.random_scores(), a: torch.zeros(64)}  # a fixed choice is not left sooner for that
    counts = make_plan({"macs": 0.4}, unwanted, limits, cost, progress=progress).counts()
    assert counts[a] == 64 - int(32 * progress)
    assert counts[b] <= 64 - int(16 * progress)


@st.composite
def overridden(draw: st.DrawFn) -> list[UnitLimits]:
    limits = []
    for i in range(draw(st.integers(1, 5))):
        size, divisor = draw(st.integers(4, 40)), draw(st.sampled_from([1, 2, 4]))
        counts = UnitLimits("", size, "", divisor=divisor).allowed
        low, high = sorted(draw(st.tuples(st.sampled_from(counts), st.sampled_from(counts))))
        goal = draw(st.sampled_from([None, low, high]))
        limits.append(UnitLimits(f"conv{i}_(0, {size})_out_1_in_1", size, f"c{size % 3}", low, divisor, goal=goal))
    return limits


@settings(max_examples=100)
@given(
    limits=overridden(),
    key=st.sampled_from(["macs", "params", "channels", "memory"]),
    scope=st.sampled_from(["global", "isomorphic", "local"]),
    share=st.floats(0, 1),
    progress=st.floats(0, 1),
)
def test_bounds_floors_ceilings_and_choices_hold_all_the_way(
    limits: list[UnitLimits], key: str, scope: str, share: float, progress: float
) -> None:
    cost = ChainCost([x.num_channels for x in limits])
    (least, most), dense = reachable_range(key, limits, cost), cost.measure(key, cost.full)
    target = max(2, math.ceil(least + share * (most - least)))
    plan = make_plan({key: target}, cost.random_scores(), limits, cost, scope=scope, progress=progress)
    assert cost.of(plan, key) <= dense - progress * (dense - min(target, dense)) + 1e-6
    for limit in limits:
        count = len(plan.kept[limit.name])
        assert count % limit.divisor == 0 or count == limit.num_channels
        assert limit.floor <= count
        if limit.goal is not None:
            on_the_way = limit.num_channels - progress * (limit.num_channels - limit.goal)
            assert count <= on_the_way + 1e-6
            assert count == limit.goal or progress < 1 or limit.goal > limit.floor


# In a fit


def test_a_fit_keeps_to_them() -> None:
    model = LitNet()
    trainer(pruning({"macs": 0.6}, overrides={"conv1*": {"choice": 10}, "conv2": {"min": 0.8, "max": 28}})).fit(
        model, loader()
    )
    assert model.conv1.out_channels == 10
    assert 26 <= model.conv2.out_channels <= 28


def test_a_mistake_is_told_before_training_and_leaves_the_model() -> None:
    model = LitNet()
    with pytest.raises(ConfigError, match=r"'conv3' in overrides.*'conv"):
        trainer(pruning(overrides={"conv3": {"ignore": True}})).fit(model, loader())
    assert not dynamic_ops(model)


def test_a_mutator_of_ones_own_has_its_own() -> None:
    with pytest.raises(ConfigError, match="mutator= together with overrides=; give overrides"):
        pruning(mutator=ChannelMutator(), overrides={"conv1": {"ignore": True}})
    model, mutator = LitNet(), ChannelMutator(example_input=torch.randn(2, 3, 6, 6), overrides={"conv1": {"choice": 6}})
    trainer(pruning(mutator=mutator)).fit(model, loader())
    assert model.conv1.out_channels == 6


def test_a_resumed_fit_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None, choice: int = 10) -> LitNet:
        torch.manual_seed(0)
        model = LitNet()
        save = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        callback = pruning(0.5, overrides={"conv1": {"choice": choice}})
        trainer(callback, save, path=tmp_path / name).fit(model, loader(), ckpt_path=ckpt, weights_only=False)
        return model

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "epoch=1.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert resumed.conv1.out_channels == 10
    with pytest.raises(ConfigError, match="overrides"):
        run("changed", tmp_path / "whole" / "epoch=1.ckpt", choice=6)


def test_what_is_parsed_stays_as_it_is() -> None:
    parsed = parse_overrides({"a*": {"min": 1, "max": None}})
    assert parsed == {"a*": Override("a*", min=1.0)}
    assert parse_overrides(parsed) == parsed
    assert parse_overrides(None) == {}


def test_arguments_of_units_by_glob() -> None:
    """Those of the mutator's `units`: a full name goes before a glob, a later glob before an earlier one."""
    entries = {FIRST: {"init_args": {"min_value": 5}}, "*": {"init_args": {"min_value": 3}}}
    assert [x.floor for x in prepared(units=entries).limits()] == [5, 3, 3]
    entries = {"*": {"init_args": {"min_value": 3}}, "block*": {"init_args": {"min_value": 7}}}
    assert [x.floor for x in prepared(units=entries).limits()] == [3, 7, 7]
