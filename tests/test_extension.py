"""What a user adds: a rule for an op, a dynamic op for a layer; each from conversion to the exported model."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import KEY, load_pruned, structure_of
from lightning_prune.errors import ConfigError
from lightning_prune.export import export_pruned
from lightning_prune.graph.call import Call
from lightning_prune.graph.rules import RuleEntry
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import DynamicConv2d, presented_tensor
from tests.compare import assert_same, outputs, scattered, zeroed_outputs
from tests.zoo_models import conv_norm, pooled_head

INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(),)


@torch.library.custom_op("lightning_prune_extension::scale_channels", mutates_args=())
def scale_channels(x: Tensor, gain: Tensor) -> Tensor:
    """`x[:, c] * gain[c]`."""
    return x * gain.view(-1, *[1] * (x.dim() - 2))


@torch.library.custom_op("lightning_prune_extension::add_to", mutates_args=("x",))
def add_to(x: Tensor, y: Tensor) -> None:
    """`x += y`."""
    x.add_(y)


@torch.library.custom_op("lightning_prune_extension::halves", mutates_args=())
def halves(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first channels, and the others."""
    return x[:, :first].clone(), x[:, first:].clone()


@scale_channels.register_fake
def _(x: Tensor, gain: Tensor) -> Tensor:
    return torch.empty_like(x)


@add_to.register_fake
def _(x: Tensor, y: Tensor) -> None:
    return None


@halves.register_fake
def _(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], first, *x.shape[2:]), x.new_empty(x.shape[0], x.shape[1] - first, *x.shape[2:])


def rule_for_scale(call: Call) -> None:
    axes = call.axes(call["x"])
    axes[1] = call.bind(axes[1], call.axes(call["gain"])[0])
    call.put(call.out, axes)


def rule_for_add(call: Call) -> None:
    both = zip(call.axes(call["x"]), call.axes(call["y"]), strict=True)
    call.put(call["x"], [call.bind(a, b) for a, b in both])


def rule_for_halves(call: Call) -> None:
    axes, first = call.axes(call["x"]), call["first"]
    for out, part in zip(call.outputs, (axes[1][:first], axes[1][first:]), strict=True):
        call.put(out, [axes[0], part, *axes[2:]])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv_norm(3, 8), nn.Conv2d(8, 12, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(12) + 0.5)
        self.head = pooled_head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(scale_channels(self.two(self.one(x)), self.gain))


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = conv_norm(3, 12), conv_norm(12, 12), pooled_head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = torch.zeros_like(x)
        add_to(y, self.two(x))
        return self.head(y + x)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = 5
        self.one, self.left, self.right = conv_norm(3, 12), nn.Conv2d(5, 6, 1), nn.Conv2d(7, 6, 1)
        self.head = pooled_head(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = halves(self.one(x), self.first)
        return self.head(self.left(left) + self.right(right))


RULES: dict[str, Any] = {
    "lightning_prune_extension::scale_channels": rule_for_scale,
    "lightning_prune_extension::add_to": rule_for_add,
    "lightning_prune_extension::halves": RuleEntry(rule_for_halves, frozenset({"first"}), index=True),
}
MODELS = {
    "a parameter": (Scaled, {"one.conv_(0, 8)_out_2_in_2": 8, "gain_(0, 12)_out_2_in_2": 12}),
    "in place": (Added, {"one.conv_(0, 12)_out_4_in_4": 12}),
    "sizes and several results": (
        Halved,
        {"one.conv_(0, 5)_out_2_in_2": 5, "one.conv_(5, 12)_out_2_in_2": 7, "left_(0, 6)_out_2_in_1": 6},
    ),
}
PARTS = pytest.mark.parametrize(("build", "units"), [pytest.param(*m, id=name) for name, m in MODELS.items()])


def prepared(model: nn.Module, **arguments: Any) -> ChannelMutator:
    mutator = ChannelMutator(example_input=INPUTS, **arguments)
    mutator.prepare_from_supernet(model)
    return mutator


def assert_exports(mutator: ChannelMutator) -> nn.Module:
    """Assert that what is cut at random computes the same dynamic, exported and zero-masked; return the export."""
    mutator.apply(scattered(mutator.units))
    small = export_pruned(mutator.model)
    for train in (False, True):
        found = outputs(mutator.model, INPUTS, train=train)
        assert_same(outputs(small, INPUTS, train=train), found)
        for a, b in zip(found, zeroed_outputs(mutator.model, INPUTS, train=train), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    return small


@PARTS
def test_an_op_with_a_rule_is_pruned_through(build: type[nn.Module], units: dict[str, int]) -> None:
    mutator = prepared(build().double(), rules=RULES, strict=True)
    assert {unit.name: unit.num_channels for unit in mutator.units} == units
    small = assert_exports(mutator)
    assert torch.export.export(small.eval(), INPUTS).module()(*INPUTS).shape == (2, 5)


@PARTS
def test_an_op_without_a_rule_freezes_what_it_touches(build: type[nn.Module], units: dict[str, int]) -> None:
    mutator = prepared(build().double())
    assert {unit.name for unit in mutator.units} < set(units)
    assert len(mutator.graph.unknown) == 1
    assert_exports(mutator)


def test_a_rule_for_an_op_of_torch_goes_before_ours() -> None:
    seen = []

    def fixed(call: Call) -> None:
        seen.append(call.where())
        for axis in call.axes(call["self"]):
            call.freeze(axis, "as I say")
        call.put(call.out, call.axes(call["self"]))

    model = nn.Sequential(OrderedDict(one=nn.Conv2d(3, 8, 1), act=nn.ReLU(), two=nn.Conv2d(8, 4, 1))).double()
    assert prepared(model, rules={"aten::relu": fixed}).units == []
    assert seen[0] == "`relu`"


def test_a_rule_that_fails_is_named() -> None:
    def broken(call: Call) -> None:
        call.put(call.out, [])

    with pytest.raises(ConfigError, match=r"a rule for \S+::scale_channels that raises AssertionError: 0 axes for a"):
        prepared(Scaled().double(), rules={"lightning_prune_extension::scale_channels": broken})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        pytest.param({"relu": rule_for_add}, r"a rule for 'relu'; expected the schema name of an op", id="namespace"),
        pytest.param({"aten::add.Tensor": rule_for_add}, "a rule for 'aten::add.Tensor'; expected", id="overload"),
        pytest.param({"my::op": 3}, "Got 3 as the rule for my::op; expected a function", id="no function"),
    ],
)
def test_a_rule_that_is_none_is_an_error_at_once(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChannelMutator(example_input=INPUTS, rules=rules)


class GainConv(nn.Conv2d):
    """A convolution whose output channels have a gain each."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain.view(-1, 1, 1)


class DynamicGainConv(DynamicConv2d, GainConv):
    """Its dynamic form."""

    static_op = GainConv
    gain: Any = presented_tensor("gain")

    def _describe(self) -> None:
        super()._describe()
        self._add_axes(gain=("out_channels",))


def gains() -> nn.Module:
    layers = {"one": GainConv(3, 8, 3), "act": nn.ReLU(), "two": GainConv(8, 12, 3), "head": pooled_head(12)}
    return nn.Sequential(OrderedDict(layers)).double()


@pytest.mark.parametrize(
    ("ops", "kind"),
    [
        pytest.param({GainConv: DynamicGainConv}, DynamicGainConv, id="own"),
        pytest.param(None, DynamicConv2d, id="ours"),
    ],
)
def test_a_layer_of_the_user_is_pruned_exported_and_loaded(ops: Any, kind: type, tmp_path: Any) -> None:
    mutator = prepared(gains(), ops=ops)
    assert type(mutator.model.one) is kind or ops is None
    assert isinstance(mutator.model.one, kind)
    assert {u.name: u.num_channels for u in mutator.units} == {"one_(0, 8)_out_1_in_1": 8, "two_(0, 12)_out_1_in_1": 12}
    small = assert_exports(mutator)
    assert type(small.one) is GainConv
    assert len(small.one.gain) == small.one.out_channels == mutator.units[0].activated_channels
    torch.save({"state_dict": small.state_dict(), KEY: structure_of(small)}, tmp_path / "pruned.ckpt")
    assert_same(outputs(load_pruned(tmp_path / "pruned.ckpt", gains()), INPUTS), outputs(small, INPUTS))
