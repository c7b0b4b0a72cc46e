"""The mutator: the seed's examples, choices, configs, reports, and every error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_prune.errors import ConfigError, PlanError, TraceError
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import DynamicConv2d, DynamicOp, dynamic_ops
from lightning_prune.plan import KeepPlan
from lightning_prune.units import L1MutableChannelUnit, MutableChannelUnit, SequentialMutableChannelUnit
from tests.compare import assert_same
from tests.zoo import ZOO

FIRST, SECOND = "feature.0_(0, 8)_out_1_in_1", "feature.1_(0, 16)_out_1_in_1"


def prepared(name: str = "two_convolutions", **arguments: Any) -> ChannelMutator:
    mutator = ChannelMutator(example_input=ZOO[name].inputs(), **arguments)
    mutator.prepare_from_supernet(ZOO[name].make())
    return mutator


# The seed's examples


def test_the_two_convolutions_of_the_seed() -> None:
    mutator = prepared()
    assert [unit.name for unit in mutator.units] == [FIRST, SECOND]
    assert mutator.current_choices == mutator.choice_template == {FIRST: 1.0, SECOND: 1.0}
    mutator.set_choices({FIRST: 0.5, SECOND: 0.5625})
    assert mutator.current_choices == {FIRST: 0.5, SECOND: 0.5625}
    model = mutator.model
    assert model.feature[0].weight.shape == (4, 3, 3, 3)
    assert model.feature[1].weight.shape == (9, 4, 3, 3)
    assert model.head.weight.shape == (1000, 9)
    assert model(*ZOO["two_convolutions"].inputs()).shape == (2, 1000)


def test_members_of_the_seeds_units() -> None:
    first, second = prepared().units
    (maker,), (reader,) = first.output_related, first.input_related
    assert (maker.name, maker.tensor, maker.dim, maker.start, maker.end) == ("feature.0", "weight", 0, 0, 8)
    assert (reader.name, reader.tensor, reader.dim, reader.start, reader.end) == ("feature.1", "weight", 1, 0, 8)
    assert maker.is_output_channel
    assert not reader.is_output_channel
    assert ([c.name for c in second.output_related], [c.name for c in second.input_related]) == (
        ["feature.1"],
        ["head"],
    )


def test_the_lone_convolution_of_the_seed_converts_and_has_no_unit() -> None:
    mutator = ChannelMutator(example_input=torch.randn(1, 3, 16, 16))
    model = nn.Conv2d(3, 8, 3, 1, 1)
    mutator.prepare_from_supernet(model)
    assert mutator.mutable_units == []
    assert mutator.current_choices == mutator.sample_choices() == {}
    assert isinstance(model, DynamicConv2d)
    assert " ".join(repr(model).split()) == (
        "DynamicConv2d( 3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1) (mutable_attrs): ModuleDict( "
        "(in_channels): MutableChannelContainer(name=, num_channels=3, activated_channels: 3) "
        "(out_channels): MutableChannelContainer(name=, num_channels=8, activated_channels: 8) ) )"
    )


def test_every_layer_with_a_dynamic_op_is_converted_and_no_other() -> None:
    mutator = prepared("unused_branch")
    plain = {name for name, module in mutator.model.named_modules() if not isinstance(module, DynamicOp)}
    assert {type(mutator.model.get_submodule(name)).__name__ for name in plain} == {
        "UnusedBranch", "Sequential", "ReLU", "AdaptiveAvgPool2d", "Flatten",
    }  # fmt: skip
    assert mutator.model.unused.conv.get_mutable_attr("out_channels").spans == ()


# What the model is given


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(lambda image, table: (image, table), id="tuple"),
        pytest.param(lambda image, table: [image, table], id="list"),
        pytest.param(lambda image, table: {"table": table, "image": image}, id="keywords"),
    ],
)
def test_an_example_input_is_positional_or_by_keyword(example: Callable[..., Any]) -> None:
    mutator = ChannelMutator(example_input=example(*ZOO["multi_input"].inputs()))
    mutator.prepare_from_supernet(ZOO["multi_input"].make())
    assert {unit.name: unit.num_channels for unit in mutator.units} == dict(ZOO["multi_input"].units)


def test_an_example_input_that_does_not_fit_changes_nothing() -> None:
    model = ZOO["chain"].make()
    before, state = repr(model), copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=r"RuntimeError: .*channels"):
        ChannelMutator(example_input=torch.randn(2, 4, 8, 8)).prepare_from_supernet(model)
    assert repr(model) == before
    assert not dynamic_ops(model)
    assert_same(model.state_dict().values(), state.values())


def test_no_example_input_is_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Got no example_input; expected a tensor, a tuple or a mapping"):
        ChannelMutator().prepare_from_supernet(model)
    assert type(model) is nn.Linear


def test_a_mutator_has_one_model() -> None:
    mutator = ChannelMutator(example_input=torch.randn(2, 3))
    with pytest.raises(ConfigError, match=r"has no model yet; call prepare_from_supernet\(model\) first"):
        _ = mutator.model
    mutator.prepare_from_supernet(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="already has a model; make another one"):
        mutator.prepare_from_supernet(nn.Linear(3, 2))


def test_ignored_layers_and_strictness_are_handed_on() -> None:
    assert [unit.name for unit in prepared(ignore="feature.1").units] == [FIRST]
    assert [unit.name for unit in prepared(ignore=["feature.*"]).units] == []
    with pytest.raises(TraceError, match="strict=True"):
        prepared("unknown_op", strict=True)


class MyConv(nn.Conv2d):
    pass


class DynamicMyConv(DynamicConv2d):
    pass


def test_ops_of_the_user_go_first() -> None:
    model = nn.Sequential(MyConv(3, 8, 1), nn.Conv2d(8, 4, 1))
    ChannelMutator(example_input=torch.randn(2, 3, 4, 4), ops={MyConv: DynamicMyConv}).prepare_from_supernet(model)
    assert isinstance(model[0], DynamicMyConv)
    assert isinstance(model[0], MyConv)
    assert not isinstance(model[1], DynamicMyConv)


# Units


@pytest.mark.parametrize(
    ("channel_unit", "kind", "init"),
    [
        pytest.param(L1MutableChannelUnit, L1MutableChannelUnit, {}, id="class"),
        pytest.param("SequentialMutableChannelUnit", SequentialMutableChannelUnit, {}, id="name"),
        pytest.param({"default_args": {"divisor": 4}}, L1MutableChannelUnit, {"divisor": 4}, id="default class"),
        pytest.param(
            {"type": "MutableChannelUnit", "default_args": {"choice_mode": "number", "min_value": 2}},
            MutableChannelUnit, {"choice_mode": "number", "min_value": 2}, id="mapping",
        ),
        pytest.param(
            OmegaConf.create({"type": "MutableChannelUnit", "default_args": {"min_ratio": 0.25}}),
            MutableChannelUnit, {"min_ratio": 0.25}, id="omegaconf",
        ),
    ],
)  # fmt: skip
def test_units_are_made_as_asked(channel_unit: Any, kind: type, init: dict[str, Any]) -> None:
    mutator = prepared(channel_unit=channel_unit)
    for unit in mutator.units:
        assert type(unit) is kind
        assert {name: getattr(unit, name) for name in init} == init


def test_one_unit_may_have_arguments_and_a_choice_of_its_own() -> None:
    entries = {FIRST: {"init_args": {"num_channels": 8, "divisor": 4}, "choice": 0.7}, "feature.1*": 8}
    mutator = prepared(channel_unit={"type": "MutableChannelUnit", "units": entries})
    assert mutator.current_choices == {FIRST: 0.5, SECOND: 0.5}
    assert [unit.divisor for unit in mutator.units] == [4, 1]
    assert prepared(units=OmegaConf.create({SECOND: 4.0})).current_choices == {FIRST: 1.0, SECOND: 0.25}


def test_l1_units_keep_the_largest_filters_and_sequential_ones_the_first() -> None:
    for kind, kept in ((L1MutableChannelUnit, [1, 5, 6]), (SequentialMutableChannelUnit, [0, 1, 2])):
        mutator = prepared(channel_unit=kind)
        with torch.no_grad():
            for channel in range(8):
                mutator.model.feature[0]._parameters["weight"][channel] = 9.0 if channel in (1, 5, 6) else 1.0
        mutator.set_choices({FIRST: 3})
        assert mutator.current_plan().kept[FIRST] == tuple(kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"channel_unit": "L1Unit"},
            r"Got channel_unit 'L1Unit'\. Valid: 'MutableChannelUnit', 'L1Mu",
            id="unknown name",
        ),
        pytest.param({"channel_unit": nn.Linear}, "expected a MutableChannelUnit class, its name or a map", id="class"),
        pytest.param({"channel_unit": 3}, "Got channel_unit=3; expected a MutableChannelUnit class", id="number"),
        pytest.param(
            {"channel_unit": {"kind": "MutableChannelUnit"}}, r"Got channel_unit with \['kind'\]", id="unknown key"
        ),
        pytest.param(
            {"channel_unit": {"default_args": {"divisors": 8}}},
            r"Got argument 'divisors' for L1Mut.*Did you mean 'divisor'",
            id="unknown argument",
        ),
        pytest.param({"units": "missing.yaml"}, "Got structure file 'missing.yaml' that cannot be read", id="no file"),
        pytest.param({"units": [1]}, r"Got structure file '\[1\]' that cannot be read", id="no mapping"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChannelMutator(**arguments)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        pytest.param({"feature.2*": 0.5}, r"Got unit 'feature\.2\*', which matches none\. ", id="no such unit"),
        pytest.param({FIRST: 1.5}, r"Got choice=1\.5 for unit", id="bad choice"),
        pytest.param({FIRST: {"init_args": {"num_channels": 9}}}, r"num_channels=9 for unit .* which has 8", id="size"),
        pytest.param({FIRST: {"init_args": {"divisor": 0}}}, r"Got divisor=0; expected", id="bad argument"),
        pytest.param({FIRST: {"init_args": {"divisors": 2}}}, r"Got argument 'divisors' for L1Mu", id="argument"),
    ],
)
def test_bad_entries_leave_the_model_as_it_was(entries: dict[str, Any], message: str) -> None:
    model = ZOO["two_convolutions"].make()
    before = repr(model)
    mutator = ChannelMutator(example_input=ZOO["two_convolutions"].inputs(), units=entries)
    with pytest.raises(ConfigError, match=message):
        mutator.prepare_from_supernet(model)
    assert repr(model) == before


# Choices


def test_choices_by_glob_and_by_number() -> None:
    mutator = prepared()
    mutator.set_choices({"feature.*": 0.25})
    assert mutator.current_choices == {FIRST: 0.25, SECOND: 0.25}
    mutator.set_choices({FIRST: 1})
    assert mutator.current_choices == {FIRST: 0.125, SECOND: 0.25}
    mutator.set_choices({FIRST: 1}, by_value=True)
    assert mutator.current_choices == {FIRST: 1.0, SECOND: 0.25}
    mutator.set_choices(OmegaConf.create({SECOND: 1.0}))
    assert mutator.current_choices == {FIRST: 1.0, SECOND: 1.0}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        pytest.param({FIRST: 0.5, "feature.3": 0.5}, r"Got unit 'feature\.3', which matches none\. Valid: ", id="unit"),
        pytest.param({FIRST: 0.5, SECOND: 0}, r"Got choice=0 for unit .*expected a ratio in \(0, 1\]", id="zero"),
        pytest.param({FIRST: 0.5, SECOND: 17}, r"Got choice=17 for unit", id="too many"),
        pytest.param({FIRST: 0.5, SECOND: float("nan")}, r"Got choice=nan for unit", id="nan"),
        pytest.param({FIRST: 0.5, SECOND: 30.0}, r"Write 0\.3 to keep 30 %", id="percent"),
        pytest.param({FIRST: 0.5, SECOND: "half"}, r"Got choice='half' for unit", id="text"),
    ],
)
def test_a_bad_choice_changes_nothing(choices: dict[str, Any], message: str) -> None:
    mutator = prepared()
    mutator.set_choices({SECOND: 0.75})
    with pytest.raises(ConfigError, match=message):
        mutator.set_choices(choices)
    assert mutator.current_choices == {FIRST: 1.0, SECOND: 0.75}


def test_scores_that_are_not_finite_change_nothing() -> None:
    mutator = prepared()
    mutator.model.feature[1].weight.data[3] = float("nan")
    with pytest.raises(PlanError, match=r"not finite for channels \[3\] of unit 'feature\.1_"):
        mutator.set_choices({FIRST: 0.5, SECOND: 0.5})
    assert mutator.current_choices == {FIRST: 1.0, SECOND: 1.0}


def test_sampled_choices_can_be_set_and_change_nothing_before() -> None:
    mutator = prepared("bottleneck", channel_unit={"default_args": {"divisor": 2, "min_value": 3}})
    seen = {name: set() for name in mutator.current_choices}
    for _ in range(40):
        choices = mutator.sample_choices()
        assert set(mutator.current_choices.values()) == {1.0}
        for name, choice in choices.items():
            seen[name].add(choice)
    assert seen["reduce.conv_(0, 6)_out_2_in_2"] == {4 / 6, 1.0}
    assert seen["stem.conv_(0, 8)_out_2_in_3"] == {4 / 8, 6 / 8, 1.0}
    mutator.set_choices(choices)
    assert mutator.current_choices == choices
    assert mutator.sample_choices("max") == dict.fromkeys(choices, 1.0)
    assert mutator.sample_choices("min")["expand.conv_(0, 16)_out_4_in_3"] == 4 / 16
    with pytest.raises(ConfigError, match=r"Got kind='maximum'\. Did you mean 'max'\? Valid: 'random', 'max', 'min'"):
        mutator.sample_choices("maximum")


@pytest.mark.parametrize(
    ("mode", "choices"),
    [
        pytest.param("number", {FIRST: 4, SECOND: 12}, id="number"),
        pytest.param("bucket", {FIRST: 1, SECOND: 3}, id="bucket"),
        pytest.param("ratio", {FIRST: 0.5, SECOND: 0.75}, id="ratio"),
    ],
)
def test_choices_in_every_mode(mode: str, choices: dict[str, Any]) -> None:
    mutator = prepared(channel_unit={"default_args": {"choice_mode": mode, "divisor": 4}})
    mutator.set_choices(choices)
    assert mutator.current_choices == choices
    assert mutator.current_plan().counts() == {FIRST: 4, SECOND: 12}


def test_fixed_choices_are_final() -> None:
    mutator = prepared()
    mutator.set_choices({FIRST: 0.5})
    mutator.fix_channel_mutables()
    assert mutator.mutable_units == []
    assert mutator.current_choices == {}
    assert [unit.is_mutable for unit in mutator.units] == [False, False]
    with pytest.raises(ConfigError, match=r"unit 'feature\.0_.*which is fixed at 0\.5; its choice can no longer"):
        mutator.set_choices({"feature.*": 0.25})
    with pytest.raises(PlanError, match=r"Got a plan for unit 'feature\.0_.*, which is fixed at 0\.5"):
        mutator.apply(KeepPlan({FIRST: (0,)}))
    assert [unit.current_choice for unit in mutator.units] == [0.5, 1.0]
    limits = mutator.limits(divisor=8, min_ratio=0.9)
    assert [(limit.floor, limit.ceiling, limit.allowed) for limit in limits] == [(4, 4, (4,)), (16, 16, (16,))]
