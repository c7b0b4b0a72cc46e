from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import convert_
from tests.op_cases import cut, cut_batch_norm

# Attribute access


def test_a_parent_that_reads_the_weight_sees_the_kept_slice():
    op = ops.DynamicLinear.convert_from(nn.Linear(3, 2))
    cut(op.get_mutable_attr("in_channels"), 1, 0, 1)
    example = torch.randn(4, 2)
    assert torch.equal(nn.functional.linear(example, op.weight, op.bias), op(example))
    assert torch.equal(op.weight, op._parameters["weight"][:, [0, 2]])


@pytest.mark.parametrize("attr", ["in_channels", "in_features"])
def test_both_names_of_a_side_give_one_container(attr):
    op = ops.DynamicLinear.convert_from(nn.Linear(3, 2))
    assert op.get_mutable_attr(attr) is op.mutable_attrs["in_features"]


def test_norms_have_one_container_for_both_sides():
    for layer in (
        nn.BatchNorm2d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.InstanceNorm1d(4),
        nn.RMSNorm(4),
    ):
        op = convert_(layer)
        assert op.get_mutable_attr("in_channels") is op.get_mutable_attr("out_channels")


def test_an_unknown_side_is_answered_with_the_nearest():
    op = ops.DynamicConv2d.convert_from(nn.Conv2d(3, 8, 3))
    with pytest.raises(ConfigError, match=r"'in_channel'.*Did you mean 'in_channels'"):
        op.get_mutable_attr("in_channel")


def test_tensor_axes_name_the_container_of_each_axis():
    op = ops.DynamicConv2d.convert_from(nn.Conv2d(3, 8, 3))
    assert op.tensor_axes == {"weight": ("out_channels", "in_channels", None, None), "bias": ("out_channels",)}
    assert op.axis_container("weight", 1) is op.get_mutable_attr("in_channels")
    assert op.axis_container("bias", -1) is op.get_mutable_attr("out_channels")


def test_a_span_registered_after_a_read_is_seen():
    op = ops.DynamicLinear.convert_from(nn.Linear(4, 2))
    axis = op.get_mutable_attr("in_channels")
    channel = MutableChannel(2)
    channel.current_choice = torch.tensor([True, False])
    axis.register_mutable(channel, 0, 2)
    assert op.weight.shape == (2, 3)
    axis.register_mutable(channel, 2, 4)
    assert op.weight.shape == (2, 2)
    assert op.in_features == 2


def test_kept_lists_indices_per_axis():
    op = ops.DynamicConv2d.convert_from(nn.Conv2d(3, 2, 3))
    cut(op.get_mutable_attr("in_channels"), 0, 1, 1)
    assert [None if axis is None else axis.tolist() for axis in op.kept_indices_of("weight")] == [
        None,
        [1, 2],
        None,
        None,
    ]
    assert op.kept_indices_of("bias") == (None,)


@pytest.mark.parametrize(
    ("tensor", "dim", "message"),
    [
        pytest.param("weights", 0, "Did you mean 'weight'", id="tensor"),
        pytest.param("weight", 4, "one of 4 axes", id="axis"),
        pytest.param("weight", 1, "follows from the masks of the channels", id="per-group axis"),
    ],
)
def test_an_axis_that_has_no_mask_of_its_own_is_refused(tensor, dim, message):
    op = ops.DynamicConv2d.convert_from(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ConfigError, match=message):
        op.axis_container(tensor, dim)


# Assignment


def test_a_buffer_of_the_kept_size_is_written_into_the_dense_one():
    op = cut_batch_norm()
    dense = op._buffers["running_mean"]
    op.running_mean = torch.tensor([7.0, 8.0])
    assert op._buffers["running_mean"] is dense
    assert dense.tolist() == [7.0, 0.0, 8.0]


def test_a_buffer_of_the_dense_size_replaces_it():
    op = cut_batch_norm()
    op.running_mean = torch.tensor([7.0, 8.0, 9.0])
    assert op._buffers["running_mean"].tolist() == [7.0, 8.0, 9.0]
    assert op.running_mean.tolist() == [7.0, 9.0]


def test_a_parameter_of_the_kept_size_is_written_into_the_dense_one():
    op = cut_batch_norm()
    dense = op._parameters["weight"]
    op.weight = nn.Parameter(torch.tensor([7.0, 8.0]))
    assert op._parameters["weight"] is dense
    assert dense.tolist() == [7.0, 1.0, 8.0]


def test_a_parameter_of_the_dense_size_replaces_it():
    op = cut_batch_norm()
    new = nn.Parameter(torch.tensor([7.0, 8.0, 9.0]))
    op.weight = new
    assert op._parameters["weight"] is new
    assert op.weight.tolist() == [7.0, 9.0]


def test_a_tensor_of_another_size_is_refused():
    op = cut_batch_norm()
    with pytest.raises(ConfigError, match=r"\[4\] for 'running_mean'.*\[3\] or \[2\]"):
        op.running_mean = torch.zeros(4)
    with pytest.raises(ConfigError, match=r"\[3, 1\] for 'weight'"):
        op.weight = nn.Parameter(torch.zeros(3, 1))


def test_none_and_plain_attributes_are_assigned_as_torch_does():
    op = ops.DynamicLinear.convert_from(nn.Linear(3, 2))
    op.bias = None
    op.note = "mine"
    assert op._parameters["bias"] is None
    assert op.bias is None
    assert op.note == "mine"
    with pytest.raises(TypeError, match="cannot assign"):
        op.weight = torch.zeros(2, 3)


def test_an_integer_that_follows_cannot_be_set_to_something_else():
    op = cut_batch_norm()
    op.num_features = 2
    op.num_features = 3
    assert op.num_features == 2
    with pytest.raises(ConfigError, match=r"num_features = 5.*now 2 of 3"):
        op.num_features = 5


def test_in_place_writes_to_a_lent_buffer_arrive():
    op = cut_batch_norm()
    op.running_mean.fill_(5.0)
    assert op.state_dict()["running_mean"].tolist() == [5.0, 0.0, 5.0]
    op.running_mean.add_(1.0)
    op.running_mean.add_(1.0)
    assert op.running_mean.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_statistics_move_without_gradients_too(grad):
    op = cut_batch_norm()
    exported = copy.deepcopy(op).to_static()
    example = torch.randn(8, 2)
    with grad():
        op(example)
        exported(example)
    assert torch.equal(op.running_var, exported.running_var)
    assert not torch.equal(exported.running_var, torch.ones(2))


def test_data_that_is_swapped_behind_autograd_is_seen():
    op = cut_batch_norm().eval()
    example = torch.randn(4, 2)
    with torch.no_grad():
        before = op(example)
        op._parameters["weight"].data.copy_(torch.tensor([3.0, 3.0, 3.0]))
        op._buffers["running_mean"].data.copy_(torch.tensor([1.0, 1.0, 1.0]))
        assert not torch.equal(op(example), before)
        assert op.weight.tolist() == [3.0, 3.0]
        assert op.running_mean.tolist() == [1.0, 1.0]


def test_a_parent_that_calls_batch_norm_on_the_statistics_moves_them():
    op = cut_batch_norm()
    exported = copy.deepcopy(op).to_static()
    example = torch.randn(8, 2)
    for layer in (op, exported):
        nn.functional.batch_norm(example, layer.running_mean, layer.running_var, training=True)
    assert torch.equal(op.running_mean, exported.running_mean)
    assert not torch.equal(exported.running_mean, torch.zeros(2))


def test_statistics_of_removed_channels_rest():
    op = cut_batch_norm()
    op(torch.randn(8, 2))
    assert op._buffers["running_mean"][1] == 0.0
    assert op._buffers["running_var"][1] == 1.0
    assert op.num_batches_tracked == 1


@pytest.mark.parametrize("method", ["reset_running_stats", "reset_parameters"])
def test_reset_reaches_the_dense_tensors(method):
    op = cut_batch_norm()
    for tensor in (*op.parameters(), op._buffers["running_mean"], op._buffers["running_var"]):
        tensor.data.fill_(9.0)
    getattr(op, method)()
    assert op._buffers["running_mean"].tolist() == [0.0, 0.0, 0.0]
    assert op._buffers["running_var"].tolist() == [1.0, 1.0, 1.0]
    assert type(op) is ops.DynamicBatchNorm1d


def test_a_failing_read_is_not_answered_with_the_dense_tensor(monkeypatch):
    op = cut_batch_norm()
    del op._dynamic.containers
    op._dynamic._cuts.clear()
    with pytest.raises(RuntimeError, match="Reading 'weight' of DynamicBatchNorm1d failed"):
        _ = op.weight


def test_a_deleted_tensor_is_missing_as_in_torch():
    op = ops.DynamicLinear.convert_from(nn.Linear(3, 2))
    del op.weight
    assert not hasattr(op, "weight")
