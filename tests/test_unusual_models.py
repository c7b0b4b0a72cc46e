"""Models of unusual parts: types of parameters, no data, scripted code, random control flow."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops
from tests.compare import assert_same, scattered
from tests.partial import CHAIN, Net, assert_pruned_alike, chain, check, conv, image, parts, run

Build = Callable[[], nn.Module]
EMPTY = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


# Types, layouts and sizes of parameters


def test_complex_parameters_are_pruned() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.einsum("bchw,oc->bohw", net.stem(x).to(net.mix.dtype), net.mix).abs())

    mix = nn.Parameter(torch.randn(12, 8, dtype=torch.complex128))
    model = Net(forward, stem=conv(3, 8).double(), mix=mix, head=conv(12, 5).double())
    check(model, (image(),), {"mix_(0, 12)_out_1_in_1": 12, "stem_(0, 8)_out_1_in_1": 8})


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="half"), pytest.param(torch.bfloat16, id="bfloat16")])
def test_parameters_of_low_precision(dtype: torch.dtype) -> None:
    model = Net(chain, **parts()).to(dtype)
    mutator = ChannelMutator(example_input=(image().to(dtype),))
    mutator.prepare_from_supernet(model)
    mutator.apply(scattered(mutator.units))
    small = assert_pruned_alike(model, (image().to(dtype),))
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_parameters_of_several_precisions() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.norm(net.stem(x.bfloat16()).float()).relu()
        return net.head(net.body(y.bfloat16()).float().relu())

    model = Net(forward, **parts(stem=conv(3, 8).bfloat16(), body=conv(8, 12).bfloat16()))
    mutator = ChannelMutator(example_input=(image().float(),))
    mutator.prepare_from_supernet(model)
    assert {unit.name: unit.num_channels for unit in mutator.units} == CHAIN
    mutator.apply(scattered(mutator.units))
    assert_pruned_alike(model, (image().float(),))


def test_parameters_that_are_channels_last() -> None:
    model = Net(chain, **parts()).double().to(memory_format=torch.channels_last)
    check(model, (image().to(memory_format=torch.channels_last),), CHAIN)
    assert export_pruned(model).body.weight.is_contiguous(memory_format=torch.channels_last)


def test_scalars_and_single_parameters_are_left_alone() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(net.norm(net.stem(x)).relu() * net.scale).relu() * net.one)

    scale, one = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(1))
    check(Net(forward, **parts(scale=scale, one=one)).double(), (image(),), CHAIN)


@EMPTY
def test_layers_without_inputs_are_cut_on_their_other_side() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.stem(x) + net.constant(x[:, :0]))

    model = Net(forward, stem=nn.Linear(6, 8), constant=nn.Linear(0, 8), head=nn.Linear(8, 3)).double()
    check(model, (image(2, 6),), {"stem_(0, 8)_out_2_in_1": 8})
    small = export_pruned(model)
    assert small.constant.weight.shape == (small.constant.out_features, 0) == (small.stem.weight.shape[0], 0)


# Models that hold no data, or none yet


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_on_the_meta_device_is_certified_priced_and_cut(device: str) -> None:
    with torch.device("meta"):
        model = Net(chain, **parts())
    mutator = ChannelMutator(example_input=(image().float().to(device),))
    mutator.prepare_from_supernet(model)
    assert {unit.name: unit.num_channels for unit in mutator.units} == CHAIN
    mutator.apply(scattered(mutator.units))
    stem, body = (unit.activated_channels for unit in mutator.units)
    assert mutator.cost().macs == 2 * 64 * 9 * (3 * stem + stem * body + body * 5)
    small = export_pruned(model)
    assert small.body.weight.shape == (body, stem, 3, 3)
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"meta"}


def test_lazy_modules_raise_before_anything_is_touched() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Conv2d(8, 5, 3))
    types = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"lazy parameters without sizes: 0.weight, 0.bias, .* Initialise them first"):
        ChannelMutator(example_input=image().float()).prepare_from_supernet(model)
    assert [type(module) for module in model.modules()] == types
    model(image().float())
    ChannelMutator(example_input=image().float()).prepare_from_supernet(model)
    assert len(dynamic_ops(model)) == 3


@pytest.mark.parametrize(
    "model", [pytest.param(nn.Sequential(), id="empty"), pytest.param(nn.ReLU(), id="without parameters")]
)
def test_a_model_without_parameters_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="without a parameter; expected a model with channels to prune"):
        ChannelMutator(example_input=image()).prepare_from_supernet(model)


def test_a_model_that_cannot_be_converted_is_left_as_it_was() -> None:
    class Keeper(nn.Linear):
        def mutable_attrs(self) -> None:
            """Take a name that dynamic ops use."""

    model = nn.Sequential(nn.Linear(4, 8), Keeper(8, 3))
    with pytest.raises(ConfigError, match="Got Keeper, which defines mutable_attrs"):
        ChannelMutator(example_input=torch.randn(2, 4)).prepare_from_supernet(model)
    assert not dynamic_ops(model)


# Scripted parts


class Script(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(12), conv(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(self.norm(x)))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.jit.script(Script().double()), id="script"),
        pytest.param(lambda: torch.jit.trace(Script().double().eval(), image(2, 12, 8, 8)), id="trace"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_keep_their_sizes(make: Build) -> None:
    model = Net(lambda net, x: net.last(net.script(chain(net, x))), **parts(head=conv(12, 12), last=conv(12, 5)))
    model.script = make()
    mutator = check(model.double(), (image(),), CHAIN)
    for _ in range(4):  # the interpreter optimises what ran before
        run(model, (image(),), train=True)
    mutator.apply(scattered(mutator.units, seed=5))
    assert "script.conv.weight" in {row[0] for row in mutator.report().frozen}


# Random control flow


def skipping(draw: Callable[[nn.Module], Any]) -> nn.Module:
    """Return four residual blocks, of which some are skipped at random in train mode, after a dropout."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.drop(net.stem(x))
        for block in net.blocks:
            if not net.training or draw(net):
                y = y + block(y)
        return net.head(y) + (net.extra(y) if net.training else 0)

    blocks = nn.ModuleList(nn.Sequential(conv(8, 12), nn.ReLU(), conv(12, 8)) for _ in range(4))
    return Net(forward, stem=conv(3, 8), drop=nn.Dropout(0.1), blocks=blocks, head=conv(8, 5), extra=conv(8, 5))


RANDOM = {
    "python": lambda net: random.random() < 0.5,
    "numpy": lambda net: np.random.rand() < 0.5,
    "torch": lambda net: torch.rand(1) < 0.5,
    "item": lambda net: torch.rand(1).item() < 0.5,
    "own python": lambda net: net.own.random() < 0.5,
    "own numpy": lambda net: net.own.random() < 0.5,
    "own old numpy": lambda net: net.own.rand() < 0.5,
    "own torch": lambda net: torch.rand(1, generator=net.own) < 0.5,
}
OWN: dict[str, Callable[[], Any]] = {
    "own python": lambda: random.Random(1),
    "own numpy": lambda: np.random.default_rng(1),
    "own old numpy": lambda: np.random.RandomState(1),
    "own torch": lambda: torch.Generator().manual_seed(1),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_blocks_that_are_skipped_at_random_are_certified(kind: str) -> None:
    model = skipping(RANDOM[kind]).double()
    model.own = OWN.get(kind, int)()
    twin = copy.deepcopy(model)
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    assert {u.name: u.num_channels for u in mutator.units} == {
        "stem_(0, 8)_out_5_in_6": 8,
        **{f"blocks.{k}.0_(0, 12)_out_1_in_1": 12 for k in range(4)},
    }
    assert not mutator.report().notes, "both modes are traced"
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        mutator.apply(scattered(mutator.units, seed))
    assert_same(run(export_pruned(model), (image(),)), run(model, (image(),)))
    drawn = [RANDOM[kind](net) for net in (model, twin) for _ in range(0 if net is model else 8)]
    assert kind not in OWN or drawn == [RANDOM[kind](model) for _ in range(8)], "the trace drew from the model's own"


def test_blocks_that_no_seed_decides_on_are_frozen_with_a_note() -> None:
    unreachable = np.random.default_rng(1)
    model = skipping(lambda net: unreachable.random() < 0.5).double()
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    assert not mutator.units
    (note,) = mutator.report().notes
    assert note.startswith("in train mode the model runs other ops each time, whatever the seed")
    mutator.set_choices({})  # nothing to certify


def generator_states() -> list[Any]:
    """Return the states of all common generators as plain data."""
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("kind", ["python", "torch", "item"])
def test_no_random_number_is_drawn(kind: str) -> None:
    before = generator_states()
    model = skipping(RANDOM[kind]).double()
    made = generator_states()
    assert before != made
    ChannelMutator(example_input=image()).prepare_from_supernet(model)
    assert generator_states() == made
