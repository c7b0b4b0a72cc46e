"""Models of which only a part can be pruned, or that are put together in unusual ways."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.checkpoint import KEY, load_pruned, structure_of
from lightning_prune.compact import compact_
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from tests.compare import assert_same, scattered
from tests.partial import CHAIN, Net, assert_pruned_alike, chain, check, conv, image, parts, run

Build = Callable[[], nn.Module]
EMPTY = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


# Parts that take no part


@EMPTY
def test_what_no_output_depends_on_keeps_its_size() -> None:
    more = {"alone": nn.Parameter(torch.randn(8)), "idle": nn.Linear(8, 8), "nothing": nn.Linear(0, 4)}
    model = Net(chain, **parts(**more)).double()
    mutator = check(model, (image(),), CHAIN)
    reasons = {row[0]: row[3] for row in mutator.report().frozen}
    assert all(reasons[name] == "no traced op reads it" for name in ("alone", "idle.weight", "idle.bias"))
    small = export_pruned(model)
    assert small.idle.weight.shape == (8, 8)
    assert small.nothing.weight.shape == (4, 0)


def test_frozen_parts_are_pruned_and_stay_frozen() -> None:
    model = Net(chain, **parts()).double()
    for part in (model.stem, model.norm):
        part.requires_grad_(False)
    check(model, (image(),), CHAIN)
    small = export_pruned(model)
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == [
        "stem.weight",
        "stem.bias",
        "norm.weight",
        "norm.bias",
    ]
    run(small, (image(),))


# Shared modules and tensors


def reused() -> nn.Module:
    same = conv(8, 8)
    return Net(
        lambda net, x: net.head(net.same(net.same(net.stem(x)).relu())), stem=conv(3, 8), same=same, head=conv(8, 5)
    )


def tied() -> nn.Module:
    model = Net(
        lambda net, x: net.head(net.two(net.one(net.stem(x)).relu())),
        stem=conv(3, 8),
        one=conv(8, 8),
        two=conv(8, 8),
        head=conv(8, 5),
    )
    model.two.weight = model.one.weight
    return model


def test_a_module_used_twice_is_cut_once() -> None:
    check(reused().double(), (image(),), {"stem_(0, 8)_out_2_in_2": 8})


@pytest.mark.parametrize("way", ["export", "compact", "load"])
def test_tied_weights_stay_tied(way: str, tmp_path: Path) -> None:
    model = tied().double()
    check(model, (image(),), {"stem_(0, 8)_out_3_in_3": 8})
    expected = run(model, (image(),))
    if way == "export":
        small = export_pruned(model)
    elif way == "compact":
        small = model
        compact_(small)
    else:
        torch.save({"state_dict": model.state_dict(), KEY: structure_of(model)}, tmp_path / "tied.ckpt")
        small = load_pruned(tmp_path / "tied.ckpt", tied().double())
    assert small.two.weight is small.one.weight
    assert small.one.weight.shape[0] < 8
    assert_same(run(small, (image(),)), expected)


# Outputs of every kind


@dataclass
class Output:
    image: Tensor
    extra: Any = None


Pair = namedtuple("Pair", "first second")


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda a, b: (a, [b, (a,)]), id="nested tuples"),
        pytest.param(lambda a, b: {"image": a, "levels": [b, None, 3, "text"]}, id="dict with a list"),
        pytest.param(lambda a, b: Output(a, {"inner": Output(b)}), id="dataclass"),
        pytest.param(Pair, id="namedtuple"),
        pytest.param(lambda a, b: Plain(Plain((a, b))), id="plain objects"),
        pytest.param(lambda a, b: Slotted([a, b]), id="object with slots"),
    ],
)
def test_channels_of_outputs_stay_in_any_object(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = net.stem(x)
        return wrap(net.body(y), net.head(y))

    model = Net(forward, stem=conv(3, 8), body=conv(8, 12), head=conv(8, 5)).double()
    check(model, (image(),), {"stem_(0, 8)_out_1_in_2": 8})


# Inputs of every kind


def test_keyword_inputs_and_flags() -> None:
    def forward(net: Any, *, left: Tensor, right: Tensor, scale: float = 1.0, flag: bool = False) -> Tensor:
        y = net.stem(left) * net.gate(right)[:, :, None, None] * scale
        return net.head(y) if flag else -net.head(y)

    model = Net(forward, stem=conv(3, 8), gate=nn.Linear(6, 8), head=conv(8, 5)).double()
    inputs = {"left": image(), "right": image(2, 6), "scale": 2.0, "flag": True}
    check(model, inputs, {"stem_(0, 8)_out_2_in_1": 8})


def test_token_ids_beside_real_inputs() -> None:
    def forward(net: Any, tokens: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        return net.head((net.embed(tokens) * mask[..., None] + net.table(table)[:, None]).relu())

    model = Net(forward, embed=nn.Embedding(11, 8), table=nn.Linear(6, 8), head=nn.Linear(8, 3)).double()
    inputs = (torch.arange(10).view(2, 5), image(2, 6), torch.ones(2, 5, dtype=torch.bool))
    check(model, inputs, {"embed_(0, 8)_out_2_in_1": 8})


# Buffers


@pytest.mark.parametrize(
    ("buffer", "use", "units"),
    [
        pytest.param(
            torch.arange(8) % 3 == 0,
            lambda y, b: y.masked_fill(b[:, None, None], 0.0),
            {"body_(0, 12)_out_1_in_1": 12},
            id="bool mask",
        ),
        pytest.param(
            torch.arange(8), lambda y, b: y * b[:, None, None], {"body_(0, 12)_out_1_in_1": 12}, id="whole numbers"
        ),
        pytest.param(torch.arange(8).flip(0), lambda y, b: y[:, b], {"body_(0, 12)_out_1_in_1": 12}, id="permutation"),
        pytest.param(torch.tensor(3), lambda y, b: y * b, CHAIN, id="counter"),
    ],
)
def test_buffers_that_are_not_floating_keep_their_size(
    buffer: Tensor, use: Callable[[Tensor, Tensor], Tensor], units: Mapping[str, int]
) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(use(net.norm(net.stem(x)), net.held)).relu())

    model = Net(forward, **parts(held=buffer)).double()
    check(model, (image(),), units)


def test_a_quantised_weight_is_frozen_with_what_meets_it() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        weight = (net.quantised.to(x.dtype) - 128) * net.scale[:, None, None, None]
        return net.head(F.conv2d(net.stem(x), weight, padding=1).relu())

    quantised = torch.randint(255, (12, 8, 3, 3), dtype=torch.uint8)
    model = Net(forward, stem=conv(3, 8), quantised=quantised, scale=torch.rand(12), head=conv(12, 5)).double()
    mutator = check(model, (image(),), {})
    reasons = {row[:2]: row[3] for row in mutator.report().frozen}
    assert reasons["stem.weight", 0].startswith("meets a fixed size in `conv2d`")


def test_a_buffer_that_is_not_saved_is_cut_too() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.stem(x) * net.gain[:, None, None])

    model = Net(forward, stem=conv(3, 8), head=conv(8, 5))
    model.register_buffer("gain", torch.rand(8), persistent=False)
    check(model.double(), (image(),), {"stem_(0, 8)_out_2_in_2": 8})
    assert "gain" not in model.state_dict()


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(lambda old, new: old.mul_(0.9).add_(new, alpha=0.1), id="in place"),
        pytest.param(lambda old, new: old.copy_(new), id="copied"),
        pytest.param(lambda old, new: old * 0.9 + new * 0.1, id="assigned"),
    ],
)
def test_buffers_that_forward_changes(update: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        net.steps += 1
        net.total = net.total + 1
        if net.training:
            net.average = update(net.average, y.mean((0, 2, 3)).detach())
        return net.head(y - net.average[:, None, None])

    buffers = {"steps": torch.tensor(0), "total": torch.tensor(0.0), "average": torch.rand(8)}
    model = Net(forward, stem=conv(3, 8), head=conv(8, 5), **buffers).double()
    mutator = check(model, (image(),), {"stem_(0, 8)_out_2_in_2": 8})
    assert model.average.shape == (mutator.units[0].activated_channels,)


# Hooks, wrappers and decorated forwards


def test_hooks_that_change_inputs_and_outputs_go_on() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(net.norm(net.stem(x)).relu()).relu())

    model = Net(forward, stem=conv(3, 8), norm=nn.BatchNorm2d(8), body=conv(16, 12), head=conv(12, 5)).double()
    model.stem.register_forward_hook(lambda module, inputs, output: output * 2)
    model.body.register_forward_pre_hook(lambda module, inputs: (torch.cat([inputs[0], -inputs[0]], 1),))
    model.head.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    model.register_forward_hook(lambda module, inputs, output: {"image": output})
    check(model, (image(),), CHAIN)


def test_a_hook_that_keeps_activations_with_gradients_does_not_hinder_export() -> None:
    model = Net(chain, **parts()).double()
    model.stem.register_forward_hook(lambda module, inputs, output: setattr(model, "seen", [{"stem": output}]))
    check(model, (image(),), CHAIN)
    model(image())
    assert model.seen[0]["stem"].grad_fn is not None
    assert_pruned_alike(model, (image(),))


def data_parallel() -> nn.Module:
    return nn.DataParallel(Net(chain, **parts()))


def decorated() -> nn.Module:
    def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) * 2

        return wrapped

    class Decorated(Net):
        @doubled
        @torch.autocast("cpu", enabled=False)
        def forward(self, x: Tensor) -> Tensor:
            return chain(self, x)

    return Decorated(chain, **parts())


@pytest.mark.parametrize(
    ("build", "prefix"),
    [
        pytest.param(data_parallel, "module.", id="nn.DataParallel"),
        pytest.param(decorated, "", id="decorated forward"),
        pytest.param(lambda: Net(torch.no_grad()(chain), **parts()), "", id="no_grad"),
    ],
)
def test_wrapped_models(build: Build, prefix: str) -> None:
    check(build().double(), (image(),), {prefix + name: size for name, size in CHAIN.items()})


# Parts that are reached around the modules


def test_a_module_in_a_plain_list_stays_and_freezes_what_meets_it() -> None:
    model = Net(lambda net, x: net.head(net.hidden[0](net.body(net.stem(x)))), **parts(head=conv(8, 5))).double()
    model.hidden = [conv(12, 8).double()]
    check(model, (image(),), {"stem_(0, 8)_out_1_in_1": 8})


def test_a_parameter_reached_through_a_list_stays_also_when_it_is_trained() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.conv2d(net.body(net.stem(x)), net.listed[0], padding=1))

    model = Net(forward, **parts(weight=nn.Parameter(torch.randn(6, 12, 3, 3)), head=conv(6, 5))).double()
    model.listed = [model.weight]
    mutator = check(model, (image(),), {"stem_(0, 8)_out_1_in_1": 8})
    assert ("weight", 0, 6, "reached around the module that owns it") in mutator.report().frozen
    with torch.no_grad():
        model.weight += 1  # the certificate must not take it for another program
    mutator.apply(scattered(mutator.units, seed=3))


def test_modules_in_a_plain_list_that_are_registered_too_are_pruned() -> None:
    model = Net(lambda net, x: net.head(net.listed[0](net.stem(x)).relu()), **parts()).double()
    model.listed = [model.body]
    mutator = ChannelMutator(example_input=(image(),))
    mutator.prepare_from_supernet(model)
    assert [unit.num_channels for unit in mutator.units] == [8, 12]
    mutator.apply(scattered(mutator.units))
    assert_pruned_alike(model, (image(),))


def test_parameter_lists_and_dicts_are_pruned() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.conv2d(net.stem(x).relu(), net.weights[0] * net.gains["one"], padding=1))

    weights = nn.ParameterList([torch.randn(12, 8, 3, 3)])
    gains = nn.ParameterDict({"one": torch.randn(12, 1, 1, 1)})
    model = Net(forward, stem=conv(3, 8), weights=weights, gains=gains, head=conv(12, 5)).double()
    check(model, (image(),), {"stem_(0, 8)_out_1_in_1": 8, "weights_(0, 12)_out_2_in_2": 12})
