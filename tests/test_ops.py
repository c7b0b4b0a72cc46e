from __future__ import annotations

import copy
import inspect
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannel, MutableChannelContainer
from lightning_prune.ops import OPS, GenericDynamic, convert_, dynamic_ops, static_view, tensor_cuts, to_static_
from lightning_prune.ops.slicing import Cut, put_, take


@pytest.fixture(autouse=True)
def _exact_kernels():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def cut(container: MutableChannelContainer, *bits: int) -> MutableChannel:
    channel = MutableChannel(len(bits))
    container.register_mutable(channel, 0, len(bits))
    channel.current_choice = torch.tensor(bits, dtype=torch.bool)
    return channel


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that is neither 0 nor 1."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return module.double()


class Case(NamedTuple):
    make: object
    shape: tuple[int, ...]
    """Shape of the input, batch first, after the cut."""
    masks: dict[str, tuple[int, ...]]
    integers: dict[str, object]


SCATTERED, PREFIX, MIDDLE = (1, 0, 1, 1, 0, 1), (1, 1, 1, 0, 0, 0), (0, 1, 1, 1, 0, 0)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

CASES: dict[str, Case] = {}
for rank in (1, 2, 3):
    space = (5,) * rank
    for name, cls in (("conv", CONVS[rank]), ("transposed", TRANSPOSED[rank])):
        CASES[f"{name}{rank}d"] = Case(
            lambda cls=cls: cls(6, 4, 3, padding=1),
            (2, 4, *space),
            {"in_channels": SCATTERED, "out_channels": (0, 1, 0, 1)},
            {"in_channels": 4, "out_channels": 2, "groups": 1},
        )
    for name, cls in (("batch norm", BATCH_NORMS[rank]), ("instance norm", INSTANCE_NORMS[rank])):
        CASES[f"{name} {rank}d"] = Case(
            lambda cls=cls: cls(6, affine=True, track_running_stats=True),
            (3, 4, *space),
            {"num_features": SCATTERED},
            {"num_features": 4},
        )
CASES |= {
    "conv, output prefix": Case(
        lambda: nn.Conv2d(3, 6, 3), (2, 3, 5, 5), {"out_channels": PREFIX}, {"in_channels": 3, "out_channels": 3}
    ),
    "conv, input prefix": Case(
        lambda: nn.Conv2d(6, 3, 3, bias=False),
        (2, 3, 5, 5),
        {"in_channels": PREFIX},
        {"in_channels": 3, "out_channels": 3},
    ),
    "conv, input middle": Case(
        lambda: nn.Conv2d(6, 3, 3), (2, 3, 5, 5), {"in_channels": MIDDLE}, {"in_channels": 3, "out_channels": 3}
    ),
    "conv, channels last": Case(
        lambda: nn.Conv2d(6, 6, 3).to(memory_format=torch.channels_last),
        (2, 4, 5, 5),
        {"in_channels": SCATTERED, "out_channels": MIDDLE},
        {"in_channels": 4, "out_channels": 3},
    ),
    "conv, reflect padding": Case(
        lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        (2, 4, 5, 5),
        {"in_channels": SCATTERED},
        {"in_channels": 4, "out_channels": 6},
    ),
    "depthwise": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        (2, 4, 5, 5),
        {"in_channels": SCATTERED, "out_channels": SCATTERED},
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "depthwise, two filters each": Case(
        lambda: nn.Conv2d(3, 6, 3, groups=3),
        (2, 2, 5, 5),
        {"in_channels": (1, 0, 1), "out_channels": (1, 0, 0, 0, 0, 1)},
        {"in_channels": 2, "out_channels": 2, "groups": 2},
    ),
    "grouped, whole groups": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=3),
        (2, 4, 5, 5),
        {"in_channels": (1, 1, 0, 0, 1, 1), "out_channels": (1, 1, 0, 0, 1, 1)},
        {"in_channels": 4, "out_channels": 4, "groups": 2},
    ),
    "grouped, inside the groups": Case(
        lambda: nn.Conv1d(6, 6, 3, groups=2),
        (2, 4, 5),
        {"in_channels": (1, 0, 1, 1, 0, 1), "out_channels": (1, 0, 0, 0, 0, 1)},
        {"in_channels": 4, "out_channels": 2, "groups": 2},
    ),
    "grouped, groups and inside": Case(
        lambda: nn.Conv3d(9, 6, 2, groups=3),
        (2, 4, 3, 3, 3),
        {"in_channels": (1, 0, 1, 0, 0, 0, 1, 0, 1), "out_channels": (0, 1, 0, 0, 1, 0)},
        {"in_channels": 4, "out_channels": 2, "groups": 2},
    ),
    "grouped transposed": Case(
        lambda: nn.ConvTranspose2d(6, 9, 3, groups=3),
        (2, 2, 4, 4),
        {"in_channels": (0, 1, 0, 0, 1, 0), "out_channels": (1, 0, 1, 0, 0, 0, 1, 0, 1)},
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "linear": Case(
        lambda: nn.Linear(6, 4),
        (2, 5, 4),
        {"in_features": SCATTERED, "out_features": (0, 1, 0, 1)},
        {"in_features": 4, "out_features": 2},
    ),
    "linear, both prefixes": Case(
        lambda: nn.Linear(6, 6, bias=False),
        (5, 3),
        {"in_features": PREFIX, "out_features": PREFIX},
        {"in_features": 3, "out_features": 3},
    ),
    "sync batch norm": Case(lambda: nn.SyncBatchNorm(6), (3, 4, 5), {"num_features": SCATTERED}, {"num_features": 4}),
    "batch norm, prefix": Case(lambda: nn.BatchNorm2d(6), (3, 3, 4, 4), {"num_features": PREFIX}, {"num_features": 3}),
    "batch norm, no affine": Case(
        lambda: nn.BatchNorm2d(6, affine=False), (3, 4, 4, 4), {"num_features": SCATTERED}, {"num_features": 4}
    ),
    "batch norm, no statistics": Case(
        lambda: nn.BatchNorm1d(6, track_running_stats=False, momentum=None),
        (3, 4),
        {"num_features": SCATTERED},
        {"num_features": 4},
    ),
    "layer norm": Case(lambda: nn.LayerNorm(6), (2, 3, 4), {"num_features": SCATTERED}, {"normalized_shape": (4,)}),
    "layer norm over two axes": Case(
        lambda: nn.LayerNorm((3, 6)),
        (2, 2, 4),
        {"normalized_shape.0": (1, 0, 1), "normalized_shape.1": SCATTERED},
        {"normalized_shape": (2, 4)},
    ),
    "layer norm without affine": Case(
        lambda: nn.LayerNorm(6, elementwise_affine=False),
        (2, 4),
        {"num_features": SCATTERED},
        {"normalized_shape": (4,)},
    ),
    "RMS norm": Case(lambda: nn.RMSNorm(6), (2, 3, 4), {"num_features": SCATTERED}, {"normalized_shape": (4,)}),
    "group norm, whole groups": Case(
        lambda: nn.GroupNorm(3, 6),
        (2, 4, 5),
        {"num_channels": (1, 1, 0, 0, 1, 1)},
        {"num_channels": 4, "num_groups": 2},
    ),
    "group norm, inside the groups": Case(
        lambda: nn.GroupNorm(2, 6),
        (2, 4, 5),
        {"num_channels": (1, 0, 1, 1, 0, 1)},
        {"num_channels": 4, "num_groups": 2},
    ),
    "PReLU": Case(lambda: nn.PReLU(6), (2, 4, 5), {"num_parameters": SCATTERED}, {"num_parameters": 4}),
}
cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def dense_input(case: Case, module: nn.Module) -> torch.Tensor:
    """Return an input of the dense size: the kept size with the cut axes put back."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        lead = case.shape[: len(case.shape) - len(module.normalized_shape)]
        shape = (*lead, *module.normalized_shape)
    elif isinstance(module, nn.Linear):
        shape = (*case.shape[:-1], module.in_features)
    else:
        size = next(
            getattr(module, name)
            for name in ("in_channels", "num_features", "num_channels", "num_parameters")
            if hasattr(module, name)
        )
        shape = (case.shape[0], size, *case.shape[2:])
    return torch.randn(shape, dtype=torch.float64)


def make_cut(case: Case) -> ops.DynamicOp:
    op = convert_(randomize(case.make()))
    for attr, bits in case.masks.items():
        cut(op.get_mutable_attr(attr), *bits)
    return op


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


def pickled(module):
    return pickle.loads(pickle.dumps(module))


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
    assert [None if axis is None else axis.tolist() for axis in op.kept("weight")] == [None, [1, 2], None, None]
    assert op.kept("bias") == (None,)


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


def cut_batch_norm() -> ops.DynamicOp:
    op = ops.DynamicBatchNorm1d.convert_from(nn.BatchNorm1d(3))
    cut(op.get_mutable_attr("in_channels"), 1, 0, 1)
    return op


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


# Subclasses, and everything else


class Standardized(nn.Conv2d):
    """A convolution with a weight of its own making and one more parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain
        return nn.functional.conv2d(x, weight, self.bias)


class Tokens(nn.Module):
    """Raw parameters, a statistic, sizes in Python ints, and a tuple of sizes."""

    heads = 2

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.register_buffer("seen", torch.zeros(4))
        self.width = 4
        self.grid = [3, 4]

    def forward(self, x, *, scale=1.0):
        token = self.cls_token.expand(x.shape[0], 1, self.width)
        self.seen.add_(x.mean((0, 1)))
        return torch.cat([token, x * scale], 1)


def make_tokens() -> GenericDynamic:
    op = convert_(Tokens().double(), generic=True)
    axis = op.axis_container("cls_token", 2)
    channel = cut(axis, 1, 0, 1, 1)
    op.axis_container("seen", 0).register_mutable(channel, 0, 4)
    op.follow_integer("width", axis)
    op.follow_integer("grid", axis, element=1)
    return op


def test_a_subclass_of_a_known_layer_runs_its_own_forward():
    op = convert_(Standardized(3, 4, 1).double())
    assert isinstance(op, ops.DynamicConv2d)
    assert isinstance(op, Standardized)
    out = cut(op.get_mutable_attr("out_channels"), 1, 0, 1, 0)
    op.axis_container("gain", 0).register_mutable(out, 0, 4)
    assert op.tensor_axes["gain"] == ("gain.0", None, None, None)
    twin = pickled(op)
    exported = copy.deepcopy(op).to_static()
    example = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert type(op).__name__ == "DynamicStandardized"
    assert type(twin) is type(op)
    assert type(exported) is Standardized
    assert torch.equal(op(example), exported(example))
    assert torch.equal(twin(example), exported(example))


def test_classes_of_the_same_kind_are_one_class():
    assert type(convert_(Standardized(3, 4, 1))) is type(convert_(Standardized(3, 4, 1)))


def test_a_known_layer_with_one_more_tensor_presents_it():
    conv = nn.Conv2d(3, 4, 1).double()
    conv.register_buffer("seen", torch.zeros(4, dtype=torch.float64))
    op = convert_(conv)
    cut(op.axis_container("seen", 0), 1, 0, 0, 1)
    assert op.seen.shape == (2,)
    assert type(op).__name__ == "DynamicConv2d"
    assert type(pickled(op)) is type(op)
    assert type(op.to_static()) is nn.Conv2d


@pytest.mark.parametrize("training", [True, False])
def test_generic_equals_exported_statistics_included(training):
    op = make_tokens().train(training)
    exported = copy.deepcopy(op).to_static()
    example = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.equal(op(example, scale=2.0), exported(example, scale=2.0))
    assert torch.equal(op.seen, exported.seen)
    assert op._buffers["seen"][1] == 0.0
    assert type(exported) is Tokens
    assert exported.width == 3
    assert exported.grid == [3, 3]


def test_generic_keeps_its_signature_and_its_class():
    op = make_tokens()
    assert list(inspect.signature(op.forward).parameters) == ["x", "scale"]
    assert isinstance(op, Tokens)
    assert op.static_type is Tokens
    assert op.integers == {"width": 3, "grid": [3, 3]}


@pytest.mark.parametrize("clone", [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(pickled, id="pickle")])
def test_generic_copies_run_alike(clone):
    op = make_tokens()
    twin = clone(op)
    example = torch.randn(2, 5, 3, dtype=torch.float64)
    assert type(twin) is type(op)
    assert torch.equal(twin(example), op(example))


def test_a_class_attribute_can_follow_and_is_exported_to_the_instance():
    op = convert_(Tokens(), generic=True)
    heads = MutableChannelContainer(2)
    op.follow_integer("heads", heads)
    cut(heads, 0, 1)
    assert op.heads == 1
    assert op.to_static().heads == 1
    assert Tokens.heads == 2


def test_a_parameter_list_is_generic_too():
    op = convert_(nn.ParameterList([torch.arange(3.0), torch.arange(4.0)]), generic=True)
    cut(op.axis_container("1", 0), 1, 0, 0, 1)
    assert op[1].tolist() == [0.0, 3.0]
    assert [tensor.tolist() for tensor in op] == [[0.0, 1.0, 2.0], [0.0, 3.0]]


@pytest.mark.parametrize(
    ("attr", "size", "element", "message"),
    [
        pytest.param("widths", 4, None, "Did you mean 'width'", id="unknown"),
        pytest.param("width", 5, None, "width = 4.*expected the dense 5", id="another size"),
        pytest.param("grid", 4, 2, r"grid\[2\]", id="no such element"),
        pytest.param("grid", 4, None, r"grid = \[3, 4\]", id="not an int"),
        pytest.param("width", 4, 0, r"width\[0\]", id="no elements"),
    ],
)
def test_an_integer_that_cannot_follow_is_refused(attr, size, element, message):
    op = convert_(Tokens(), generic=True)
    with pytest.raises(ConfigError, match=message):
        op.follow_integer(attr, MutableChannelContainer(size), element)
    assert op.integers == {}


class Crowded(nn.Linear):
    def kept(self):
        return "mine"


def test_a_class_that_uses_our_names_is_refused():
    with pytest.raises(ConfigError, match="Crowded, which defines kept"):
        convert_(Crowded(2, 2))


def test_convert_from_refuses_another_layer():
    with pytest.raises(ConfigError, match=r"Got ReLU for DynamicConv2d\.convert_from; expected Conv2d"):
        ops.DynamicConv2d.convert_from(nn.ReLU())


def hooked(register, module):
    register(module)
    return module


MADE = [
    pytest.param(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), id="parametrised"),
    pytest.param(lambda: nn.utils.weight_norm(nn.Linear(2, 2)), id="weight norm"),
    pytest.param(lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), id="spectral norm"),
    pytest.param(lambda: nn.utils.prune.identity(nn.Linear(2, 2), "weight"), id="pruning hook"),
]
EMPTY = pytest.param(lambda: nn.Linear(0, 2), id="empty")
LAZY = pytest.param(lambda: nn.LazyLinear(2), id="lazy")
SCRIPTED = pytest.param(lambda: torch.jit.script(nn.Linear(2, 2)), id="scripted")
OLD_WAYS = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.* is deprecated:FutureWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:Initializing zero-element tensors:UserWarning",
)


@OLD_WAYS
@pytest.mark.parametrize("make", [*MADE, EMPTY, LAZY, SCRIPTED])
def test_layers_whose_weight_others_make_are_not_converted_for_their_class(make):
    module = make()
    before = type(module)
    assert convert_(module) is module
    assert type(module) is before


@OLD_WAYS
@pytest.mark.parametrize("make", [*MADE, EMPTY])
def test_layers_whose_weight_others_make_become_generic_where_something_is_cut(make):
    module = make()
    before = type(module)
    assert convert_(module, generic=True) is module
    assert isinstance(module, GenericDynamic)
    assert isinstance(module, before)
    assert not isinstance(module, OPS[nn.Linear])
    assert type(module.to_static()) is before


@OLD_WAYS
@pytest.mark.parametrize("make", [LAZY, SCRIPTED])
def test_layers_whose_tensors_are_out_of_reach_are_never_converted(make):
    module = make()
    before = type(module)
    assert convert_(module, generic=True) is module
    assert type(module) is before


class HalfLinear(ops.DynamicLinear):
    """An op that a user brings."""


def test_ops_of_the_user_come_first():
    assert type(convert_(nn.Linear(2, 2), ops={nn.Linear: HalfLinear})) is HalfLinear


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
