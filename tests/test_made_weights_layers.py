"""Layers other than convolutions whose weight is made of other parameters, and what of them cannot be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_prune.export import export_pruned
from tests.made import LowRank, Sinh, Symmetric, parametrized
from tests.partial import CHAIN, Net, assert_pruned_alike, chain, check, conv, image, parts

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), *layers, nn.Linear(20, 3)).double()


def images(**given: Any) -> nn.Module:
    return Net(chain, **parts(**given)).double()


WEIGHT_NORM = parametrizations.weight_norm


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Mapping[str, int]]] = {
    "grouped convolution": (
        lambda: images(
            stem=conv(3, 24), norm=nn.BatchNorm2d(24), body=WEIGHT_NORM(conv(24, 28, groups=4)), head=conv(28, 5)
        ),
        (2, 3, 8, 8),
        {"stem_(0, 24)_out_2_in_2": 6, "stem_(0, 24)_out_3_in_3_groups": 4, "body_(0, 28)_out_1_in_1": 7},
    ),
    "depthwise convolution": (
        lambda: images(
            stem=conv(3, 12), norm=nn.BatchNorm2d(12), body=WEIGHT_NORM(conv(12, 12, groups=12)), head=conv(12, 5)
        ),
        (2, 3, 8, 8),
        {"stem_(0, 12)_out_3_in_3": 12},
    ),
    "transposed convolution": (
        lambda: images(body=WEIGHT_NORM(nn.ConvTranspose2d(8, 12, 3, padding=1), dim=1)),
        (2, 3, 8, 8),
        CHAIN,
    ),
    "batch norm": (lambda: images(norm=parametrized(nn.BatchNorm2d(8), Sinh())), (2, 3, 8, 8), CHAIN),
    "masked batch norm": (
        lambda: images(norm=prune.l1_unstructured(nn.BatchNorm2d(8), "bias", 3)),
        (2, 3, 8, 8),
        CHAIN,
    ),
    "group norm": (
        lambda: images(norm=parametrized(nn.GroupNorm(8, 8), Sinh())),
        (2, 3, 8, 8),
        CHAIN,
    ),
    "layer norm": (
        lambda: linear(parametrized(nn.LayerNorm(20), Sinh())),
        (2, 6),
        {"0_(0, 20)_out_2_in_2": 20},
    ),
    "low rank": (
        lambda: images(body=parametrized(conv(8, 12), LowRank())),
        (2, 3, 8, 8),
        # its right factor reads the stem: in a product of two parameters it counts as making what the other reads
        {"stem_(0, 8)_out_3_in_1": 8, "body_(0, 4)_out_1_in_1": 4, "body_(0, 12)_out_1_in_1": 12},
    ),
    "symmetric": (
        lambda: linear(parametrized(nn.Linear(20, 20), Symmetric())),
        (2, 6),
        {"0_(0, 20)_out_2_in_2": 20},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_other_layers_with_made_weights(name: str) -> None:
    build, shape, units = LAYERS[name]
    model = build()
    mutator = check(model, (image(*shape),), units)
    mutator.set_choices({"*": 0.5})
    assert_pruned_alike(model, (image(*shape),))


def test_a_parent_that_reads_a_made_weight_sees_the_kept_part() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.linear(net.stem(x), net.body.weight, net.body.bias).relu())

    model = Net(forward, stem=nn.Linear(6, 20), body=WEIGHT_NORM(nn.Linear(20, 28)), head=nn.Linear(28, 3)).double()
    check(model, (image(2, 6),), {"stem_(0, 20)_out_1_in_1": 20, "body_(0, 28)_out_1_in_1": 28})


def test_made_weights_that_share_a_parameter_stay_tied() -> None:
    one, two = WEIGHT_NORM(nn.Linear(20, 20)), WEIGHT_NORM(nn.Linear(20, 20))
    two.parametrizations.weight.original1 = one.parametrizations.weight.original1
    model = linear(one, nn.ReLU(), two)
    check(model, (image(2, 6),), {"0_(0, 20)_out_3_in_3": 20})
    small = export_pruned(model)
    assert small[1].parametrizations.weight.original1 is small[3].parametrizations.weight.original1


# What cannot be cut


@pytest.mark.parametrize(
    ("free", "units"),
    [
        # each output is a row of the buffer `base`: it goes alone
        pytest.param(True, {"2_(0, 20)_out_1_in_1": 20}, id="with a base"),
        pytest.param(False, {}, id="alone"),
    ],
)
def test_what_an_orthogonal_weight_mixes_keeps_its_size(free: bool, units: Mapping[str, int]) -> None:
    layer = parametrizations.orthogonal(
        nn.Linear(20, 20).double(), orthogonal_map="householder", use_trivialization=free
    )
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), layer, nn.ReLU(), nn.Linear(20, 3)).double()
    mutator = check(model, (image(2, 6),), units)
    frozen = {row[:2]: row[3] for row in mutator.report().frozen}
    assert "in `tril`" in frozen["2.parametrizations.weight.original", 0]
    assert "in `tril`" in frozen["0.weight", 0]
    assert ("2.bias" in {name for name, _ in frozen}) == (not free)


@pytest.mark.parametrize(
    "wrap", [pytest.param(WEIGHT_NORM, id="parametrised"), pytest.param(nn.utils.weight_norm, id="hook")]
)
def test_a_recurrent_layer_with_made_weights_keeps_its_sizes(wrap: Any) -> None:
    rnn = wrap(nn.LSTM(8, 10, batch_first=True), "weight_hh_l0")
    model = Net(lambda net, x: net.head(net.rnn(net.stem(x))[0]), stem=nn.Linear(6, 8), rnn=rnn, head=nn.Linear(10, 3))
    model.double()
    check(model, (image(2, 5, 6),), {})
