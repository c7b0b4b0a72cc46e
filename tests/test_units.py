from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.ops import convert_
from lightning_prune.units import (
    Channel,
    L1MutableChannelUnit,
    MutableChannelUnit,
    SequentialMutableChannelUnit,
    l1_scores,
)


def linear(*rows: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


def output(layer: nn.Module, name: str = "layer", tensor: str = "weight", dim: int = 0, **span) -> Channel:
    size = dict((*layer.named_parameters(), *layer.named_buffers()))[tensor].shape[dim]
    return Channel(name, layer, tensor, dim, **{"start": 0, "end": size, "is_output_channel": True, **span})


def unit_of(*channels: Channel, num_channels: int, cls: type = L1MutableChannelUnit, **kwargs) -> MutableChannelUnit:
    unit = cls(num_channels, **kwargs)
    unit.output_related += [channel for channel in channels if channel.is_output_channel]
    unit.input_related += [channel for channel in channels if not channel.is_output_channel]
    return unit


# Choices


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        pytest.param(0.5, 8, id="ratio"),
        pytest.param(0.5625, 9, id="odd count"),
        pytest.param(9 / 16 - 1e-9, 9, id="a hair below a count"),
        pytest.param(0.62, 9, id="rounded down"),
        pytest.param(1.0, 16, id="everything"),
        pytest.param(1, 1, id="int 1 is one channel"),
        pytest.param(7, 7, id="count"),
        pytest.param(0.001, 1, id="never none"),
    ],
)
def test_an_explicit_choice_keeps_this_many(choice, count):
    unit = MutableChannelUnit(16)
    unit.current_choice = choice
    assert unit.activated_channels == count
    assert unit.current_choice == count / 16


@pytest.mark.parametrize("count", range(1, 101))
def test_a_ratio_that_was_read_back_gives_the_same_count(count):
    assert MutableChannelUnit(100).choice_to_count(count / 100) == count


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        pytest.param(1, 16, id="1 keeps all"),
        pytest.param(1.0, 16, id="1.0 keeps all"),
        pytest.param(0.5, 8, id="ratio"),
        pytest.param(8.0, 8, id="whole float"),
        pytest.param(3, 3, id="count"),
    ],
)
def test_a_choice_out_of_a_file_is_read_by_value(choice, count):
    assert MutableChannelUnit(16).choice_to_count(choice, by_value=True) == count


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        pytest.param(0.99, 16, id="down to the divisor"),
        pytest.param(19, 16, id="a count too"),
        pytest.param(0.5, 8, id="ratio down"),
        pytest.param(1, 8, id="never below the divisor"),
        pytest.param(1.0, 20, id="everything is always possible"),
        pytest.param(20, 20, id="so is the full count"),
    ],
)
def test_a_choice_is_rounded_down_to_the_divisor(choice, count):
    assert MutableChannelUnit(20, divisor=8).choice_to_count(choice) == count


@pytest.mark.parametrize(
    ("kwargs", "floor"),
    [
        pytest.param({}, 1, id="none"),
        pytest.param({"min_value": 5}, 5, id="value"),
        pytest.param({"min_ratio": 0.3}, 6, id="ratio"),
        pytest.param({"min_ratio": 0.31}, 7, id="ratio rounds up"),
        pytest.param({"min_ratio": 0.3, "divisor": 4}, 8, id="up to the divisor"),
        pytest.param({"min_value": 30}, 20, id="at most everything"),
    ],
)
def test_floors_hold(kwargs, floor):
    unit = MutableChannelUnit(20, **kwargs)
    assert unit.min_channels == floor
    assert unit.choice_to_count(0.01) == floor


def test_number_mode_reads_counts():
    unit = MutableChannelUnit(16, choice_mode="number")
    unit.current_choice = 5
    assert unit.current_choice == 5
    unit.current_choice = 0.5
    assert unit.current_choice == 8


def test_more_buckets_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"choice=4 .*number of buckets in \[1, 3\]"):
        MutableChannelUnit(20, choice_mode="bucket", divisor=8).current_choice = 4


def test_a_bucket_keeps_k_times_the_divisor():
    unit = MutableChannelUnit(20, choice_mode="bucket", divisor=8)
    unit.current_choice = 2
    assert unit.activated_channels == 16
    assert unit.current_choice == 2
    unit.current_choice = 3
    assert unit.activated_channels == 20
    assert unit.current_choice == 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        pytest.param(
            30.0, r"choice=30\.0 .*ratio in \(0, 1\] or a whole number.*Write 0\.3 to keep 30 %", id="percent"
        ),
        pytest.param(0, "choice=0 for unit 'conv'", id="zero"),
        pytest.param(0.0, r"choice=0\.0 for unit 'conv'", id="zero ratio"),
        pytest.param(-1, "choice=-1 for unit 'conv'", id="negative"),
        pytest.param(17, r"choice=17 .*\[1, 16\]", id="too many"),
        pytest.param(float("nan"), "choice=nan for unit 'conv'", id="nan"),
        pytest.param(float("inf"), "choice=inf for unit 'conv'", id="inf"),
        pytest.param(True, "choice=True for unit 'conv'", id="bool"),
        pytest.param("0.5", r"choice='0\.5' for unit 'conv'", id="text"),
    ],
)
def test_a_bad_choice_names_the_unit_and_changes_nothing(choice, message):
    unit = MutableChannelUnit(16)
    unit.name = "conv"
    with pytest.raises(ConfigError, match=message):
        unit.current_choice = choice
    assert unit.activated_channels == 16


@pytest.mark.parametrize("choice", [2.5, 17.0])
def test_a_file_value_that_is_no_count_is_refused(choice):
    with pytest.raises(ConfigError, match="whole number"):
        MutableChannelUnit(16).choice_to_count(choice, by_value=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"choice_mode": "ration"}, "Did you mean 'ratio'", id="mode"),
        pytest.param({"divisor": 0}, "divisor=0", id="divisor"),
        pytest.param({"min_value": 1.5}, r"min_value=1\.5", id="min_value"),
        pytest.param({"min_ratio": 1.1}, r"min_ratio=1\.1", id="min_ratio"),
        pytest.param({"min_ratio": float("nan")}, "min_ratio=nan", id="min_ratio nan"),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        MutableChannelUnit(16, **kwargs)


def test_sampled_choices_respect_the_limits_and_change_nothing():
    unit = MutableChannelUnit(20, divisor=4, min_ratio=0.3)
    counts = {unit.choice_to_count(unit.sample_choice()) for _ in range(200)}
    assert counts == {8, 12, 16, 20}
    assert unit.activated_channels == 20


def test_a_fixed_unit_refuses_every_write():
    unit = MutableChannelUnit(16)
    unit.fix_chosen(0.5)
    assert not unit.is_mutable
    assert unit.activated_channels == 8
    assert unit.sample_choice() == 0.5
    for write in (lambda: setattr(unit, "current_choice", 0.25), lambda: unit.keep([0]), lambda: unit.fix_chosen(0.25)):
        with pytest.raises(ConfigError, match=r"fixed at 0\.5"):
            write()
    unit.fix_chosen()
    assert unit.activated_channels == 8


@pytest.mark.parametrize(
    ("indices", "message"), [([], "without a kept channel"), ([3], r"\[3\] to keep.*\[0, 3\)"), ([-1], r"\[-1\]")]
)
def test_bad_indices_are_refused(indices, message):
    unit = MutableChannelUnit(3)
    with pytest.raises(ConfigError, match=message):
        unit.keep(indices)
    assert unit.activated_channels == 3


# Which channels


@pytest.mark.parametrize("cls", [MutableChannelUnit, SequentialMutableChannelUnit])
def test_the_first_channels_remain(cls):
    unit = cls(4)
    unit.current_choice = 3
    assert unit.mutable.current_mask.tolist() == [True, True, True, False]


def test_l1_keeps_the_largest_norms():
    unit = unit_of(output(linear([1.0, -1.0], [3.0, 0.0], [0.0, -4.0])), num_channels=3)
    assert l1_scores(unit).tolist() == [2.0, 3.0, 4.0]
    unit.current_choice = 2
    assert unit.mutable.current_mask.tolist() == [False, True, True]


@pytest.mark.parametrize("dim", [0, 1])
def test_l1_of_a_large_weight_is_counted_in_blocks(dim, monkeypatch):
    layer = nn.Conv2d(5, 7, 3)
    unit = unit_of(output(layer, dim=dim), num_channels=7 if dim == 0 else 5)
    monkeypatch.setattr("lightning_prune.units.l1._BLOCK", 2 * 5 * 9)  # two rows, so that the last block is short
    expected = layer.weight.detach().abs().sum((1 - dim, 2, 3))
    torch.testing.assert_close(l1_scores(unit), expected)


def test_of_equal_channels_the_first_remain():
    unit = unit_of(output(linear(*[[1.0]] * 100)), num_channels=100)
    unit.current_choice = 60
    assert unit.mutable.current_mask.tolist() == [True] * 60 + [False] * 40


def test_l1_averages_layers_and_ignores_norms_beside_them():
    norm = nn.BatchNorm1d(2)
    norm.weight.data = torch.tensor([100.0, 0.0])
    members = [output(linear([1.0], [2.0])), output(norm), output(linear([5.0], [8.0]))]
    assert l1_scores(unit_of(*members, num_channels=2)).tolist() == [3.0, 5.0]
    assert l1_scores(unit_of(output(norm), num_channels=2)).tolist() == [100.0, 0.0]


def test_l1_reads_spans_axes_and_indices():
    layer = linear([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    repeated = output(layer, dim=1, index=torch.tensor([0, 0, 1, 1]))
    assert l1_scores(unit_of(repeated, num_channels=2)).tolist() == [5.0, 9.0]
    tail = output(layer, dim=1, start=2, end=4)
    assert l1_scores(unit_of(tail, num_channels=2)).tolist() == [4.0, 5.0]


def test_removed_channels_are_scored_by_their_dense_weights():
    layer = convert_(linear([1.0], [3.0]))
    unit = unit_of(output(layer), num_channels=2)
    layer.get_mutable_attr("out_channels").register_mutable(unit.mutable, 0, 2)
    unit.current_choice = 1
    assert layer.weight.tolist() == [[3.0]]
    layer._parameters["weight"].data[0] = 5.0
    unit.current_choice = 1
    assert layer.weight.tolist() == [[5.0]]


def test_scores_of_half_precision_weights_are_float32():
    layer = linear([1.0], [3.0]).bfloat16()
    scores = l1_scores(unit_of(output(layer), num_channels=2))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_scores_that_are_not_finite_name_the_unit_and_change_nothing():
    unit = unit_of(output(linear([1.0], [float("nan")])), num_channels=2)
    with pytest.raises(PlanError, match=r"channels \[1\] of unit 'layer_\(0, 2\)_out_1_in_0'"):
        unit.current_choice = 1
    assert unit.activated_channels == 2


def test_l1_without_an_output_layer_is_refused():
    with pytest.raises(ConfigError, match="without an output-related layer"):
        l1_scores(L1MutableChannelUnit(2))


def test_a_member_without_its_tensor_is_refused():
    with pytest.raises(ConfigError, match=r"'gamma' of layer 'norm'.*'weight'"):
        Channel("norm", nn.BatchNorm1d(2), "gamma", 0, 0, 2, True).full()


def test_full_sees_writes_to_a_lent_buffer():
    norm = convert_(nn.BatchNorm1d(3))
    unit = MutableChannelUnit(3)
    norm.get_mutable_attr("in_channels").register_mutable(unit.mutable, 0, 3)
    unit.keep([0, 2])
    norm.running_mean.fill_(2.0)
    assert output(norm, "norm", "running_mean").full().tolist() == [2.0, 0.0, 2.0]


# Names and data


@pytest.mark.parametrize(("axis", "suffix"), [("channels", ""), ("heads", "_heads"), ("head_dim", "_head_dim")])
def test_the_name_is_that_of_the_seed(axis, suffix):
    conv = nn.Conv2d(3, 8, 3)
    reader = Channel("feature.1", nn.Conv2d(8, 16, 3), "weight", 1, 0, 8, False)
    unit = unit_of(output(conv, "feature.0"), reader, num_channels=8)
    unit.axis = axis
    assert unit.name == f"feature.0_(0, 8)_out_1_in_1{suffix}"


def test_a_name_that_was_given_stays():
    unit = MutableChannelUnit(3)
    unit.name = "stem"
    assert unit.name == unit.mutable.name == "stem"


def test_the_template_is_plain_data():
    unit = unit_of(output(linear([1.0], [2.0]), index=torch.tensor([1, 0])), num_channels=2, divisor=1)
    unit.keep([0])
    assert unit.config_template() == {"choice": 0.5}
    assert unit.config_template(with_init_args=True, with_channels=True) == {
        "choice": 0.5,
        "init_args": {"num_channels": 2, "choice_mode": "ratio", "divisor": 1, "min_value": 1, "min_ratio": 0.0},
        "channels": {
            "output_related": [
                {
                    "name": "layer",
                    "tensor": "weight",
                    "dim": 0,
                    "start": 0,
                    "end": 2,
                    "is_output_channel": True,
                    "index": [1, 0],
                }
            ],
            "input_related": [],
        },
    }


@pytest.mark.parametrize(("mode", "divisor"), [("ratio", 1), ("number", 1), ("bucket", 4), ("bucket", 1)])
@pytest.mark.parametrize("count", [4, 1, 8, 12])
def test_the_template_is_read_back_to_the_same_count(mode, divisor, count):
    unit = MutableChannelUnit(12, choice_mode=mode, divisor=divisor)
    unit.keep(range(unit.choice_to_count(count / 12)))
    kept = unit.activated_channels
    assert unit.choice_to_count(unit.config_template()["choice"], by_value=True) == kept


@pytest.mark.parametrize(
    "clone",
    [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(lambda u: pickle.loads(pickle.dumps(u)), id="pickle")],
)
def test_copies_are_independent(clone):
    unit = unit_of(output(linear([1.0], [2.0])), num_channels=2)
    twin = clone(unit)
    twin.current_choice = 1
    assert twin.name == unit.name
    assert unit.activated_channels == 2
