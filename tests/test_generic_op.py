from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannelContainer
from lightning_prune.ops import OPS, GenericDynamic, convert_
from tests.op_cases import cut, pickled

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
    def mutable_attrs(self):
        return "mine"


class Answering(nn.Linear):
    def __getattr__(self, name):
        return "mine" if name == "mutable_attrs" else super().__getattr__(name)


@pytest.mark.parametrize("value", [3, nn.ReLU(), nn.Parameter(torch.ones(1))], ids=["number", "child", "parameter"])
def test_a_layer_that_holds_our_names_is_refused(value):
    layer = nn.Linear(2, 2)
    layer.mutable_attrs = value
    with pytest.raises(ConfigError, match="Linear, which defines mutable_attrs"):
        convert_(layer)


@pytest.mark.parametrize("cls", [Crowded, Answering])
def test_a_class_that_uses_our_names_is_refused(cls):
    with pytest.raises(ConfigError, match=f"{cls.__name__}, which defines mutable_attrs"):
        convert_(cls(2, 2))


@pytest.mark.parametrize("is_method", [True, False], ids=["method", "attribute"])
def test_kept_is_a_name_that_a_model_may_use(is_method):
    layer = type("Keeper", (nn.Linear,), {"kept": lambda self: "mine"} if is_method else {})(4, 2)
    if not is_method:
        layer.kept = 3
    cut(convert_(layer).get_mutable_attr("in_features"), 1, 0, 1, 0)
    assert (layer.kept() == "mine") if is_method else (layer.kept == 3)
    assert layer.to_static().weight.shape == (2, 2)
    assert (layer.kept() == "mine") if is_method else (layer.kept == 3)


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
