"""Scores against Torch-Pruning's on the same weights, where both mean the same.

Where they do not, and why:

- GroupMagnitude sums ``|w| ** p`` and takes no root: with several layers only p = 1 is the same. It has norms among the
  layers that count, and always the layers that read a channel: here both are made alike by its `target_types` and our
  `input_related`.
- For grouped convolutions Torch-Pruning averages the groups, we sum over them: the same order where all layers of the
  unit repeat its channels once per group, or one layer counts.
- Depthwise weights count for nothing there; here they are alike, so that they change no order.
- FPGM there measures distances between ``|w| ** p``, the paper and we between w: the same for p = 1 and no negative
  weight.
- GroupTaylor takes the mean gradient and no square, and leaves norms and depthwise layers out: with one step the order
  is that of our squares where one layer decides, so with the reduction "first" or "max". Over groups it adds absolute
  values, we add before the square: the same where all products of weight and gradient are positive.
- LAMP breaks ties by the order of an unstable sort.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.importance import Importance
from lightning_prune.importance.observer import LossScale, MeansObserver
from lightning_prune.mutator import ChannelMutator
from lightning_prune.units import MutableChannelUnit
from tests.torchvision_shim import import_torch_pruning

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")


def conv(c_in: int, c_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups, bias=False)


class Residual(nn.Module):
    """The stem and the second convolution make one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 12), nn.BatchNorm2d(12)
        self.one, self.norm1 = conv(12, 10), nn.BatchNorm2d(10)
        self.two, self.norm2 = conv(10, 12), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.norm2(self.two(self.norm1(self.one(x)).relu()))
        return self.head(x.relu().mean((2, 3)))


class Grouped(nn.Module):
    """A depthwise convolution, then one of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.depthwise, self.norm1 = conv(8, 8, groups=8), nn.BatchNorm2d(8)
        self.mix = conv(8, 10)
        self.grouped, self.norm2 = conv(10, 12, groups=2), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.depthwise(self.norm(self.stem(x)).relu())).relu()
        return self.head(self.norm2(self.grouped(self.mix(x).relu())).relu().mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side in one norm and one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 7), conv(3, 9)
        self.norm, self.fuse = nn.BatchNorm2d(16), conv(16, 11)
        self.norm1, self.head = nn.BatchNorm2d(11), nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.head(self.norm1(self.fuse(x)).relu().mean((2, 3)))


# how the name of a unit begins -> how often its layers repeat its channels, one after another
UNITS: dict[type[nn.Module], dict[str, int]] = {
    Residual: {"stem_(0, 12)": 1, "one_(0, 10)": 1},
    Grouped: {"stem_(0, 8)": 1, "grouped_(0, 12)": 2},
    Concat: {"left_(0, 7)": 1, "right_(0, 9)": 1, "fuse_(0, 11)": 1},
}
WEIGHTS = [nn.modules.conv._ConvNd, nn.Linear]
IMAGES = (2, 3, 6, 6)


def built(make: type[nn.Module], *, positive: bool, norms: bool) -> nn.Module:
    """A network in double precision whose norms, if any, differ by channel."""
    model = make().double()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if not norms:
                model.set_submodule(name, nn.Identity())
        elif isinstance(module, nn.Conv2d) and module.groups == module.out_channels:
            nn.init.constant_(module.weight, 0.1)
    if positive:
        for parameter in model.parameters():
            parameter.data.abs_()
    return model


def both(
    make: type[nn.Module],
    ours: Importance,
    theirs: Callable[[Any], Any],
    *,
    positive: bool = False,
    gradients: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how a unit's name begins -> our scores and theirs.

    Args:
        make: The network.
        ours: Our importance.
        theirs: Makes theirs out of the module that has them.
        positive: Whether all weights are positive, and with them all gradients.
        gradients: Whether both see one backward; without norms, which count for one of the two only.
    """
    torch_pruning = import_torch_pruning()
    model = built(make, positive=positive, norms=not gradients)
    plain, images = copy.deepcopy(model), torch.rand(IMAGES, dtype=torch.float64)
    mutator = ChannelMutator(example_input=images)
    mutator.prepare_from_supernet(model)
    chosen = {start: unit for unit in mutator.units for start in UNITS[make] if unit.name.startswith(start)}
    assert chosen.keys() == UNITS[make].keys()
    scorer = (ours.observer(chosen.values()) if gradients else None) or ours
    for network in (model, plain) if gradients else ():
        network(images).square().sum().backward()
    if isinstance(scorer, MeansObserver):
        scorer.before_step({id(parameter) for parameter in model.parameters()}, LossScale())
    scores = scorer.scores(chosen.values(), "local")
    graph = torch_pruning.DependencyGraph().build_dependency(plain, images)
    importance = theirs(torch_pruning.importance)
    return {
        start: (
            scores[unit.name],
            their_scores(torch_pruning, graph, importance, plain, unit, UNITS[make][start]),
        )
        for start, unit in chosen.items()
    }


def their_scores(
    package: Any, graph: Any, importance: Any, model: nn.Module, unit: MutableChannelUnit, repeats: int
) -> Tensor:
    """Their scores of the group that starts where our unit does, averaged over groups as their pruner does it."""
    layer = model.get_submodule(unit.output_related[0].name)
    channels = list(range(unit.num_channels * repeats))
    group = graph.get_pruning_group(layer, package.prune_conv_out_channels, channels)
    scores: Tensor = importance(group)
    return scores.view(repeats, -1).mean(0)


def assert_alike(found: dict[str, tuple[Tensor, Tensor]], make: type[nn.Module], *, values: bool = True) -> None:
    """Assert the same order, and where no layers are left out or summed over groups the same values."""
    for name, (ours, theirs) in found.items():
        assert len(set(ours.tolist())) == len(ours), f"ties would hide a difference in {name}"
        assert ours.argsort().tolist() == theirs.argsort().tolist(), name
        if values and make is not Grouped:
            torch.testing.assert_close(ours, theirs.float())


MODELS = pytest.mark.parametrize("make", list(UNITS), ids=lambda make: make.__name__.lower())


@MODELS
def test_group_magnitude(make: type[nn.Module]) -> None:
    ours = Importance("l1", input_related=True)
    found = both(make, ours, lambda them: them.GroupMagnitudeImportance(p=1, normalizer=None, target_types=WEIGHTS))
    assert_alike(found, make)


@MODELS
def test_group_magnitude_of_the_first_layer(make: type[nn.Module]) -> None:
    """Of one layer the order is the same with a root and without."""
    ours = Importance("l2", reduction="first")
    found = both(make, ours, lambda them: them.GroupMagnitudeImportance(p=2, group_reduction="first"))
    assert_alike(found, make, values=False)


@MODELS
def test_bn_scale(make: type[nn.Module]) -> None:
    assert_alike(both(make, Importance("bn_scale"), lambda them: them.BNScaleImportance(normalizer=None)), make)


@MODELS
def test_lamp(make: type[nn.Module]) -> None:
    def theirs(them: Any) -> Any:
        importance = them.LAMPImportance()
        importance.target_types = WEIGHTS
        return importance

    found = both(make, Importance("lamp", input_related=True), theirs)
    found.pop("grouped_(0, 12)", None)  # averaged over groups after the comparison there, summed before here
    assert_alike(found, make)


@MODELS
def test_fpgm(make: type[nn.Module]) -> None:
    ours = Importance("fpgm", input_related=True)
    found = both(make, ours, lambda them: them.FPGMImportance(p=1, normalizer=None), positive=True)
    found.pop("grouped_(0, 12)", None)  # a filter is measured against other groups' there, not here
    assert_alike(found, make)


@MODELS
def test_group_taylor_of_the_first_layer(make: type[nn.Module]) -> None:
    ours = Importance("taylor", reduction="first")
    found = both(
        make,
        ours,
        lambda them: them.GroupTaylorImportance(group_reduction="first", normalizer=None, multivariable=True),
        positive=True,
        gradients=True,
    )
    assert_alike(found, make, values=False)


@pytest.mark.parametrize("make", [Residual, Concat], ids=["residual", "concat"])
def test_group_taylor_of_the_strongest_layer(make: type[nn.Module]) -> None:
    ours = Importance("taylor", reduction="max", input_related=True)
    found = both(
        make,
        ours,
        lambda them: them.GroupTaylorImportance(group_reduction="max", normalizer=None, multivariable=True),
        gradients=True,
    )
    assert_alike({name: (scores.sqrt(), theirs) for name, (scores, theirs) in found.items()}, make)
