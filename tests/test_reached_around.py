"""Parameters that a forward does not read as attributes of their modules, or writes to: dynamic ops do not see that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.partial import CHAIN, Net, chain, check, image, parts

AROUND = "reached around the module that owns it"


def with_weight(read: Callable[[Any], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return the chain, with the weight of its body read in another way."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.norm(net.stem(x)).relu()
        return net.head(F.conv2d(y, read(net), net.body.bias, padding=1).relu())

    return forward


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda net: net.body._parameters["weight"], id="from the dict"),
        pytest.param(lambda net: net.body._parameters.get("weight"), id="from the dict by get"),
        pytest.param(lambda net: vars(net.body)["_parameters"]["weight"], id="from vars"),
        pytest.param(lambda net: next(iter(net.body._parameters.values())), id="from the values"),
        pytest.param(lambda net: dict(net.named_parameters())["body.weight"], id="named_parameters"),
        pytest.param(lambda net: next(net.body.parameters()), id="parameters"),
        pytest.param(lambda net: net.state_dict()["body.weight"], id="state_dict"),
        pytest.param(lambda net: net.get_parameter("body.weight"), id="get_parameter"),
        pytest.param(lambda net: next(net.body.parameters()).detach(), id="detached"),
    ],
)
def test_a_parameter_that_is_no_attribute_when_it_is_read_keeps_its_size(read: Callable[[Any], Tensor]) -> None:
    mutator = check(Net(with_weight(read), **parts()).double(), (image(),), {})
    assert ("body.weight", 0, 12, AROUND) in mutator.report().frozen


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda net: net.body.weight, id="attribute"),
        pytest.param(lambda net: getattr(net, "body").weight.data, id="data"),  # noqa: B009 - as models do
        pytest.param(lambda net: net.get_submodule("body").weight.detach(), id="get_submodule"),
    ],
)
def test_a_parameter_that_is_an_attribute_when_it_is_read_is_cut(read: Callable[[Any], Tensor]) -> None:
    check(Net(with_weight(read), **parts()).double(), (image(),), CHAIN)


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda net, x: x.to(next(net.parameters()).dtype), id="dtype"),
        pytest.param(lambda net, x: x.to(next(net.buffers()).device), id="device"),
        pytest.param(lambda net, x: x * len(list(net.body.named_parameters())), id="number"),
    ],
)
def test_what_only_asks_about_the_parameters_changes_nothing(ask: Callable[[Any, Tensor], Tensor]) -> None:
    check(Net(lambda net, x: chain(net, ask(net, x)), **parts()).double(), (image(),), CHAIN)


def test_a_sum_over_all_parameters_freezes_them() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return chain(net, x) + sum(p.square().sum() for p in net.parameters())

    check(Net(forward, **parts()).double(), (image(),), {})


@pytest.mark.parametrize(
    ("factor", "units"), [pytest.param(None, CHAIN, id="its own parameters"), pytest.param(2.0, {}, id="other ones")]
)
def test_functional_calls(factor: float | None, units: Mapping[str, int]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        given = {n: p if factor is None else p * factor for n, p in net.body.named_parameters()}
        return net.head(functional_call(net.body, given, (net.norm(net.stem(x)).relu(),)).relu())

    check(Net(forward, **parts()).double(), (image(),), units)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda weight: weight.mul_(0.9), id="in place"),
        pytest.param(lambda weight: weight.data.clamp_(-0.05, 0.05), id="through data"),
    ],
)
def test_a_parameter_that_forward_writes_to_keeps_its_size(write: Callable[[Tensor], Any]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(net.body.weight)
        return chain(net, x)

    mutator = check(Net(forward, **parts()).double(), (image(),), {})
    assert ("body.weight", 0, 12, "written to by forward") in mutator.report().frozen


def test_a_parameter_that_forward_replaces_is_cut() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.body.weight = nn.Parameter(net.body.weight.detach() * 1.0)
        return chain(net, x)

    check(Net(forward, **parts()).double(), (image(),), CHAIN)
