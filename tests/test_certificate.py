"""Programs that slip through a weaker check: each is refused, or computes what the zero-masked model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, double, full, macs_of, outputs, scattered, zeroed_outputs
from tests.trap_models import MODELS, CountsAlike
from tests.traps import TRAPS


def prepare(model: nn.Module, inputs: tuple[Tensor, ...]) -> ChannelMutator:
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    return mutator


def structures(mutator: ChannelMutator) -> list[KeepPlan]:
    """Return plans for all units at once, and for each with one channel left."""
    everything = full(mutator.units).kept
    alone = [KeepPlan({**everything, unit.name: (1,)}) for unit in mutator.units]
    return [scattered(mutator.units), scattered(mutator.units, seed=1), *alone]


def assert_sound(mutator: ChannelMutator, inputs: tuple[Tensor, ...]) -> int:
    """Assert that every accepted structure computes what it must; return how many were refused."""
    model, refused, sizes = mutator.model, 0, {unit.name: unit.num_channels for unit in mutator.units}
    rescaled = {unit.name for unit in mutator.graph.units if unit.renormalizing or unit.rescaling}
    for plan in structures(mutator):
        try:
            mutator.apply(plan)
        except TraceError:
            refused += 1
            continue
        small = export_pruned(model)
        cut = {name for name, kept in plan.kept.items() if len(kept) < sizes[name]}
        for train in (False, True):
            found = outputs(model, inputs, train=train)
            torch.testing.assert_close(found, outputs(small, inputs, train=train), rtol=0, atol=1e-12)
            if not cut & rescaled:
                zeroed = zeroed_outputs(model, inputs, train=train)
                torch.testing.assert_close(found, zeroed, rtol=0, atol=1e-10)
        assert macs_of(small, inputs) == mutator.cost().macs
        assert sum(p.numel() for p in small.parameters()) == mutator.cost().params
    return refused


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_refused_or_computes_what_the_zero_masked_model_does(name: str) -> None:
    inputs = (torch.randn(2, 3, 8, 8).double(),)
    mutator = prepare(TRAPS[name].make(), inputs)
    expected = {**TRAPS[name].units, "out_(0, 7)_out_1_in_1": 7}
    assert {unit.name: unit.num_channels for unit in mutator.units} == expected
    assert assert_sound(mutator, inputs) == (1 if name == "squeezed" else 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_or_computes_what_the_zero_masked_model_does(name: str) -> None:
    build, shape, units = MODELS[name]
    inputs = double((torch.randint(11, shape) if len(shape) == 2 else torch.randn(shape),))
    mutator = prepare(build().double(), inputs)
    assert {unit.name: unit.num_channels for unit in mutator.units} == units
    assert assert_sound(mutator, inputs) == 0


@pytest.mark.parametrize("kind", [int, np.int64], ids=["int", "NumPy"])
def test_only_the_integer_that_counts_heads_follows(kind: type) -> None:
    model = CountsAlike()
    model.heads = kind(model.heads)
    mutator = prepare(model, (torch.randn(2, 9, 7),))
    own = [f for f in mutator.graph.followers if not f.module]
    assert [(f.attribute, f.element) for f in own] == [("heads", None)]
    mutator.apply(KeepPlan({"embed_(0, 32)_out_1_in_1": (1, 4, 6)}))
    assert (mutator.model.heads, mutator.model.steps, mutator.model.temperature) == (3, 8, 8)


def test_a_refused_plan_leaves_the_model_as_it_was() -> None:
    inputs = (torch.randn(2, 3, 8, 8).double(),)
    mutator = prepare(TRAPS["squeezed"].make(), inputs)
    mutator.apply(scattered(mutator.units))
    plan, expected = mutator.current_plan(), outputs(mutator.model, inputs)
    with pytest.raises(TraceError, match=r"`squeeze`: 1 axes instead of 2\. The model is unchanged"):
        mutator.apply(KeepPlan({"stem_(0, 16)_out_1_in_1": (3,)}))
    assert mutator.current_plan() == plan
    assert_same(outputs(mutator.model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        pytest.param("parts scaled apart", "stem.weight", "a slice by constant numbers in Body", id="slice"),
        pytest.param("softmax", "stem.weight", "softmax over channels in `softmax` of Body", id="softmax"),
        pytest.param("taken by a permutation", "stem.weight", "taken by index in `index` of Body", id="index"),
        pytest.param("a weight in a list", "first", "reached around the module that owns it", id="list"),
        pytest.param("shift by slices", "head.linear.weight", "model output", id="output"),
        pytest.param("half of it rolled", "stem.weight", "rolled by a constant number in `roll` of Body", id="roll"),
        pytest.param(
            "divided by the number", "stem.weight", "where the dense model takes ('other', 16) in Body", id="scalar"
        ),
    ],
)
def test_a_frozen_axis_says_why(name: str, tensor: str, reason: str) -> None:
    mutator = prepare(TRAPS[name].make(), (torch.randn(2, 3, 8, 8).double(),))
    assert reason in {f.tensor: f.reason for f in reversed(mutator.graph.frozen)}[tensor]


class OnlyInTraining(nn.Module):
    """In train mode alone it loses the axis of a single channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(x.unsqueeze(2).squeeze()) if self.training else self.head(x)


def test_what_train_mode_alone_does_is_certified_for_every_structure() -> None:
    mutator = prepare(OnlyInTraining(), (torch.randn(2, 3, 8, 8),))
    mutator.apply(KeepPlan({"stem_(0, 8)_out_1_in_1": (1, 4)}))
    with pytest.raises(TraceError, match="squeeze"):
        mutator.apply(KeepPlan({"stem_(0, 8)_out_1_in_1": (3,)}))
