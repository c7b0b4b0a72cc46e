from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.errors import ConfigError
from lightning_prune.ops import convert_
from lightning_prune.ops.slicing import take
from tests.op_cases import cases, cut, dense_input, make_cut, pickled, randomize


@cases
def test_every_op_is_found_by_the_type_of_its_layer(case):
    static = case.make()
    op = convert_(static)
    assert type(op) is ops.OPS[op.static_type]
    assert type(op).__name__ == f"Dynamic{op.static_type.__name__}"
    assert op is static
    assert type(op).convert_from(op) is op
    assert convert_(op) is op


@cases
@pytest.mark.parametrize("training", [True, False])
def test_conversion_is_invisible(case, training):
    dense = randomize(case.make()).train(training)
    twin = copy.deepcopy(dense)
    before = {name: id(tensor) for name, tensor in (*dense.named_parameters(), *dense.named_buffers())}
    example = dense_input(case, dense)
    convert_(dense)
    assert torch.equal(dense(example), twin(example))
    after = {name: id(tensor) for name, tensor in (*dense.named_parameters(), *dense.named_buffers())}
    assert after == before
    assert list(dense.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), twin.state_dict().values(), strict=True))
    assert [*dense.modules()] == [dense]


@cases
def test_reading_an_uncut_tensor_gives_the_tensor_itself(case):
    op = convert_(case.make())
    for name, tensor in (*op._parameters.items(), *op._buffers.items()):
        assert getattr(op, name) is tensor


@cases
@pytest.mark.parametrize("training", [True, False])
def test_dynamic_equals_exported_bit_for_bit(case, training):
    op = make_cut(case).train(training)
    exported = copy.deepcopy(op).to_static()
    assert type(exported) is op.static_type
    for _ in range(2):
        example = torch.randn(case.shape, dtype=torch.float64)
        assert torch.equal(op(example), exported(example))
    in_the_end = copy.deepcopy(op).to_static().state_dict()
    assert list(in_the_end) == list(exported.state_dict())
    assert all(torch.equal(in_the_end[name], tensor) for name, tensor in exported.state_dict().items())


@cases
def test_integers_are_live_and_exported(case):
    op = make_cut(case)
    assert {name: getattr(op, name) for name in case.integers} == case.integers
    assert {name: op.integers[name] for name in case.integers} == case.integers
    exported = op.to_static()
    assert {name: exported.__dict__[name] for name in case.integers} == case.integers
    assert "_dynamic" not in exported.__dict__


@cases
def test_gradients_equal_the_exported_ones_and_are_zero_where_cut(case):
    op = make_cut(case)
    exported = copy.deepcopy(op).to_static()
    example = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    op(example).square().sum().backward()
    exported(example).square().sum().backward()
    for name, parameter in op.named_parameters():
        kept_grad = take(parameter.grad, op._dynamic.cuts(op, name))
        assert torch.equal(kept_grad, getattr(exported, name).grad)
        assert parameter.grad.count_nonzero() == kept_grad.count_nonzero()


@cases
def test_export_keeps_the_parameter_objects_and_owns_only_what_it_needs(case):
    op = make_cut(case)
    before = {name: id(parameter) for name, parameter in op.named_parameters()}
    exported = op.to_static()
    assert {name: id(parameter) for name, parameter in exported.named_parameters()} == before
    for tensor in exported.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@cases
@pytest.mark.parametrize("clone", [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(pickled, id="pickle")])
def test_copies_run_alike_and_have_their_own_masks(case, clone):
    op = make_cut(case).eval()
    twin = clone(op)
    example = torch.randn(case.shape, dtype=torch.float64)
    assert type(twin) is type(op)
    assert torch.equal(twin(example), op(example))
    mine = {span.mutable for axis in op.mutable_attrs.values() for span in axis.spans}
    assert mine.isdisjoint(span.mutable for axis in twin.mutable_attrs.values() for span in axis.spans)


@cases
def test_the_state_dict_stays_dense_and_loads_back(case):
    op = make_cut(case)
    state = {name: tensor.clone() for name, tensor in op.state_dict().items()}
    fresh = case.make().double()
    fresh.load_state_dict(state)
    randomize(op)
    op.load_state_dict(state)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in op.state_dict().items())


@cases
def test_a_cut_that_is_undone_gives_the_dense_layer_back(case):
    op = make_cut(case).eval()
    dense = randomize(case.make()).eval()
    dense.load_state_dict(op.state_dict())
    for axis in op.mutable_attrs.values():
        for span in axis.spans:
            span.mutable.current_choice = torch.ones(span.mutable.num_channels, dtype=torch.bool)
    example = dense_input(case, dense)
    assert torch.equal(op(example), dense(example))


# Embedding


def test_embedding_looks_up_kept_features():
    op = ops.DynamicEmbedding.convert_from(nn.Embedding(5, 4, padding_idx=3).double())
    cut(op.get_mutable_attr("out_channels"), 1, 0, 0, 1)
    exported = copy.deepcopy(op).to_static()
    tokens = torch.tensor([[0, 3], [4, 1]])
    assert torch.equal(op(tokens), exported(tokens))
    assert (exported.embedding_dim, exported.num_embeddings, exported.padding_idx) == (2, 5, 3)
    op(tokens).sum().backward()
    assert op._parameters["weight"].grad.tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [0] * 4, [0] * 4, [1, 0, 0, 1]]


def test_embedding_rows_are_renumbered_with_the_padding():
    op = ops.DynamicEmbedding.convert_from(nn.Embedding(5, 4, padding_idx=3).double())
    vocabulary = cut(op.get_mutable_attr("in_channels"), 1, 0, 1, 1, 0)
    exported = copy.deepcopy(op).to_static()
    tokens = torch.tensor([0, 1, 2])
    assert torch.equal(op(tokens), exported(tokens))
    assert (exported.num_embeddings, exported.padding_idx, op.padding_idx) == (3, 2, 2)
    vocabulary.current_choice = torch.tensor([True, True, True, False, True])
    assert op.padding_idx is None


def test_embedding_writes_shortened_rows_back():
    op = ops.DynamicEmbedding.convert_from(nn.Embedding(3, 4, max_norm=1.0).double())
    op._parameters["weight"].data.fill_(2.0)
    cut(op.get_mutable_attr("out_channels"), 1, 0, 0, 0)
    exported = copy.deepcopy(op).to_static()
    with torch.no_grad():
        assert torch.equal(op(torch.tensor([1])), exported(torch.tensor([1])))
    assert torch.equal(op.weight, exported.weight)
    assert op._parameters["weight"][1, 1:].tolist() == [2.0, 2.0, 2.0]


# Groups


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        pytest.param(((1, 0, 0, 1), (1, 1, 1, 1)), "in different places", id="columns differ"),
        pytest.param(((1, 1, 1, 1), (1, 0, 1, 1)), r"\[2, 2\].*\[1, 2\]", id="unequal outputs"),
        pytest.param(((1, 1, 0, 0), (1, 1, 1, 1)), r"\[2, 0\].*\[2, 2\]", id="a dead group with outputs"),
        pytest.param(((1, 1, 1, 1), (1, 1, 0, 0)), r"\[2, 2\].*\[2, 0\]", id="a living group without outputs"),
    ],
)
@pytest.mark.parametrize("read", ["weight", "groups"])
def test_masks_that_no_grouped_convolution_has_are_refused(masks, message, read):
    op = ops.DynamicConv2d.convert_from(nn.Conv2d(4, 4, 3, groups=2))
    cut(op.get_mutable_attr("in_channels"), *masks[0])
    cut(op.get_mutable_attr("out_channels"), *masks[1])
    with pytest.raises(ConfigError, match=f"(?s)groups=2.*{message}"):
        getattr(op, read)


def test_uneven_norm_groups_are_refused():
    op = ops.DynamicGroupNorm.convert_from(nn.GroupNorm(2, 4))
    cut(op.get_mutable_attr("in_channels"), 1, 0, 1, 1)
    with pytest.raises(ConfigError, match=r"\[1, 2\] channels for DynamicGroupNorm\(num_groups=2"):
        op(torch.randn(2, 3, 4))


def test_a_single_slope_serves_any_number_of_channels():
    op = ops.DynamicPReLU.convert_from(nn.PReLU())
    assert op.mutable_attrs["num_parameters"].num_channels == 1
    assert torch.equal(op(torch.tensor([[-4.0, 2.0]])), torch.tensor([[-1.0, 2.0]]))
