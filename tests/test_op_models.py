from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannelContainer
from lightning_prune.ops import convert_, dynamic_ops, static_view, tensor_cuts, to_static_
from lightning_prune.ops.slicing import Cut, put_, take
from tests.op_cases import cut, cut_batch_norm

# Whole models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def tied() -> Tied:
    model = Tied().double()
    convert_(model.embed)
    convert_(model.head)
    return model


def test_tied_weights_are_cut_once_and_stay_tied():
    model = tied()
    width = cut(model.embed.get_mutable_attr("out_channels"), 1, 0, 1, 1)
    model.head.get_mutable_attr("in_channels").register_mutable(width, 0, 4)
    small = to_static_(copy.deepcopy(model))
    tokens = torch.tensor([[0, 4]])
    assert torch.equal(model(tokens), small(tokens))
    assert small.head.weight is small.embed.weight
    assert small.head.weight.shape == (5, 3)
    assert small.head.in_features == 3


def test_tied_weights_with_different_masks_are_refused_before_anything_changes():
    model = tied()
    cut(model.embed.get_mutable_attr("out_channels"), 1, 0, 1, 1)
    with pytest.raises(ConfigError, match=r"'embed.weight' and 'head.weight'"):
        to_static_(model)
    assert isinstance(model.embed, ops.DynamicEmbedding)
    assert model.embed._parameters["weight"].shape == (5, 4)


def test_a_bad_grouped_layer_stops_the_export_before_anything_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    for layer in model:
        convert_(layer)
    cut(model[0].get_mutable_attr("out_channels"), 1, 1, 0, 1)
    cut(model[1].get_mutable_attr("in_channels"), 1, 1, 0, 1)
    with pytest.raises(ConfigError, match="groups=2"):
        to_static_(model)
    assert isinstance(model[0], ops.DynamicConv2d)


def test_dynamic_ops_are_listed_once_by_name():
    shared = convert_(nn.Linear(2, 2))
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, convert_(nn.Linear(2, 2))))
    assert dynamic_ops(model) == {"0": shared, "2.1": model[2][1]}
    assert dynamic_ops(shared) == {"": shared}


def test_tensor_cuts_lists_what_loses_entries():
    model = nn.Sequential(convert_(nn.Linear(3, 2)), nn.Linear(2, 2))
    cut(model[0].get_mutable_attr("in_channels"), 0, 1, 1)
    ((tensor, cuts),) = tensor_cuts(model).values()
    assert tensor is model[0]._parameters["weight"]
    assert [(dim, kept.indices.tolist()) for dim, kept in cuts] == [(1, [1, 2])]


def test_static_view_shows_the_dense_model_and_restores():
    op = cut_batch_norm()
    model = nn.Sequential(op)
    with pytest.raises(KeyError), static_view(model):  # noqa: PT012 - the exit by an error is the point
        assert type(op) is nn.BatchNorm1d
        assert op.num_features == 3
        assert op.weight.shape == (3,)
        raise KeyError
    assert type(op) is ops.DynamicBatchNorm1d
    assert op.num_features == 2


def test_the_print_is_that_of_the_seed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    convert_(model[0])
    cut(model[0].get_mutable_attr("out_channels"), 1, 1, 1, 1, 0, 0, 0, 0)
    assert repr(model) == (
        "Sequential(\n"
        "  (0): DynamicConv2d(\n"
        "    3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)\n"
        "    (mutable_attrs): ModuleDict(\n"
        "      (in_channels): MutableChannelContainer(name=, num_channels=3, activated_channels: 3)\n"
        "      (out_channels): MutableChannelContainer(name=, num_channels=8, activated_channels: 4)\n"
        "    )\n"
        "  )\n"
        "  (1): ReLU()\n"
        ")"
    )


def test_a_generic_parent_prints_its_children():
    model = nn.Sequential(nn.ReLU())
    convert_(model, generic=True)
    assert repr(model) == "DynamicSequential(\n  (0): ReLU()\n  (mutable_attrs): ModuleDict()\n)"


def test_one_optimizer_step_moves_only_kept_entries():
    op = ops.DynamicLinear.convert_from(nn.Linear(3, 2))
    cut(op.get_mutable_attr("in_channels"), 1, 0, 1)
    op._parameters["weight"].data.fill_(1.0)
    optimizer = torch.optim.SGD(op.parameters(), lr=0.5)
    op(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert op._parameters["weight"].tolist() == [[0.5, 1.0, 0.5]] * 2


def test_export_slices_a_pending_gradient():
    op = ops.DynamicLinear.convert_from(nn.Linear(3, 2))
    cut(op.get_mutable_attr("in_channels"), 1, 0, 1)
    op(torch.ones(1, 2)).sum().backward()
    op.to_static()
    assert torch.equal(op.weight.grad, torch.ones(2, 2))
    op(torch.ones(1, 2)).sum().backward()
    assert torch.equal(op.weight.grad, torch.full((2, 2), 2.0))


# Slicing


def test_put_is_the_inverse_of_take():
    axes = [MutableChannelContainer(3), MutableChannelContainer(4)]
    cut(axes[0], 1, 0, 1)
    cut(axes[1], 0, 1, 1, 0)
    cuts = [Cut(dim, axis.kept_indices()) for dim, axis in enumerate(axes)]
    full = torch.zeros(3, 4)
    put_(full, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), cuts)
    assert full.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 3, 4, 0]]
    assert take(full, cuts).tolist() == [[1, 2], [3, 4]]


def test_a_tensor_of_another_size_than_the_cut_is_refused():
    axis = MutableChannelContainer(3)
    cut(axis, 1, 0, 1)
    with pytest.raises(ConfigError, match=r"\[4\] whose axis 0 is 4 long; expected the dense 3"):
        take(torch.zeros(4), [Cut(0, axis.kept_indices())])


def scattered_linear() -> ops.DynamicLinear:
    op = ops.DynamicLinear.convert_from(nn.Linear(4, 3, bias=False))
    cut(op.get_mutable_attr("in_channels"), 0, 1, 0, 1)
    cut(op.get_mutable_attr("out_channels"), 1, 0, 1)
    op._parameters["weight"].data = torch.arange(12.0).view(3, 4)
    return op


@pytest.mark.parametrize("small", [pytest.param(0, id="axis by axis"), pytest.param(12, id="in one step")])
def test_a_weight_of_any_size_is_cut_alike(monkeypatch, small):
    monkeypatch.setattr("lightning_prune.ops.slicing.SMALL", small)
    op = scattered_linear()
    assert op.weight.tolist() == [[1, 3], [9, 11]]
    assert type(op.weight.grad_fn).__name__ == ("TakeBackward0" if small else "IndexSelectBackward0")
    (op.weight * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert op._parameters["weight"].grad.tolist() == [[0, 1, 0, 2], [0, 0, 0, 0], [0, 3, 0, 4]]


def test_a_weight_that_is_replaced_between_reads_is_cut_by_its_own_size():
    op = scattered_linear()
    assert op.weight.shape == (2, 2)
    op._parameters["weight"] = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ConfigError, match=r"\[4, 3\] whose axis 0 is 4 long; expected the dense 3"):
        _ = op.weight


def test_masks_that_move_between_reads_move_the_places():
    op = scattered_linear()
    assert op.weight.tolist() == [[1, 3], [9, 11]]
    op.get_mutable_attr("in_channels").spans[0].mutable.current_choice = torch.tensor([True, False, False, True])
    assert op.weight.tolist() == [[0, 3], [8, 11]]


def test_weights_can_be_batched_by_torch_func():
    op = scattered_linear()
    weights = torch.stack([op._parameters["weight"].detach(), torch.ones(3, 4)])
    outputs = torch.func.vmap(lambda w: torch.func.functional_call(op, {"weight": w}, torch.ones(1, 2)))(weights)
    assert outputs.tolist() == [[[4, 20]], [[2, 2]]]


def test_a_kept_weight_may_stand_in_for_the_dense_one():
    op = scattered_linear()
    outputs = torch.func.functional_call(op, {"weight": op.weight * 2}, torch.ones(1, 2))
    assert outputs.tolist() == [[8, 40]]
    assert op.weight.tolist() == [[1, 3], [9, 11]]
