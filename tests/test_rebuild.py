"""The config of a model that saves itself with one: its numbers follow where they describe the pruned model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from lightning_prune.compact import compact_
from lightning_prune.ops import dynamic_ops


class Config:
    """Sizes under names of its own, some nested, some that only happen to be equal to a size."""

    def __init__(self, **numbers: Any) -> None:
        self.layers, self.width, self.token, self.sizes, self.inner = 2, 20, 20, (30, 28), {"hidden": [24]}
        self.__dict__.update(numbers)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))


class Net(nn.Module):
    """Made from nothing but its config."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, config.inner["hidden"][0]
        self.enter, self.leave = nn.Linear(5, width), nn.Linear(width, 3)
        self.up = nn.ModuleList([nn.Linear(width, size) for size in config.sizes])
        self.down = nn.ModuleList([nn.Linear(size, width) for size in config.sizes])
        self.more = nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.leave(x + self.more(x))

    def save_pretrained(self, folder: str) -> None:
        """What tells that the config is saved with the model."""


class Scaled(Net):
    """Divides by what it computes from a size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.config.width


class Buffered(Net):
    """Keeps what it computes from a size in a buffer that no state dict holds."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.full((3,), config.width**-0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Tabled(Net):
    """Adds a table that no state dict holds to the hidden channels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.linspace(0, 1, config.width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) * self.table
        return self.leave(x + self.more(x) + sum(d(u(x)) for u, d in zip(self.up, self.down, strict=True)))


class Wrapper(nn.Module):
    """As a LightningModule: no config of its own that it could be made from."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.out, self.config = net, nn.Linear(3, 2), net.config

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(x))


HALF = {"width": 10, "sizes": (15, 14), "inner": {"hidden": [12]}}


def pruned(model: nn.Module, choices: dict[str, Any] | None = None, **arguments: Any) -> ChannelMutator:
    mutator = ChannelMutator(example_input=torch.randn(4, 5), **arguments)
    mutator.prepare_from_supernet(model)
    mutator.set_choices(choices or {"*": 0.5})
    return mutator


def rebuilt(small: nn.Module) -> nn.Module:
    """Return what the class makes from the config of a small model, with its weights."""
    again = type(small)(copy.deepcopy(small.config))
    again.load_state_dict(small.state_dict())
    return again


def test_numbers_at_any_depth_follow_and_those_that_only_are_equal_stay() -> None:
    model = Net(Config())
    pruned(model)
    small = export_pruned(model)
    assert small.config.to_dict() == Config(**HALF).to_dict()
    assert model.config.to_dict() == Config().to_dict()
    x = torch.randn(4, 5)
    assert torch.equal(rebuilt(small)(x), small(x))


def test_a_part_of_a_model_has_its_config_whatever_is_exported() -> None:
    model = Wrapper(Net(Config()))
    pruned(model, {"*": 0.5, "net.leave*": 1.0})
    assert export_pruned(model).net.config.to_dict() == Config(**HALF).to_dict()
    assert export_pruned(model.net).config.to_dict() == Config(**HALF).to_dict()
    assert model.net.config.to_dict() == Config().to_dict()


def test_a_model_that_became_small_in_place_is_described_when_it_is_exported() -> None:
    model = Net(Config())
    mutator = pruned(model)
    compact_(model)
    assert not dynamic_ops(model)
    assert model.config.to_dict() == Config().to_dict()
    assert export_pruned(model).config.to_dict() == Config(**HALF).to_dict()
    assert not [note for note in mutator.report().notes if "config" in note]


def test_the_config_follows_after_the_mutator_is_gone_and_keeps_no_model_alive() -> None:
    model = Net(Config())
    mutator = weakref.ref(pruned(model))
    gc.collect()
    assert mutator() is None
    assert export_pruned(model).config.to_dict() == Config(**HALF).to_dict()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_that_nothing_is_cut_of_keeps_its_config() -> None:
    model = Net(Config())
    mutator = pruned(model, {"*": 1.0})
    assert export_pruned(model).config.to_dict() == Config().to_dict()
    assert not [note for note in mutator.report().notes if "config" in note]


class Strict(Net):
    """Takes only sizes that fit together."""

    def __init__(self, config: Config) -> None:
        if config.width * 3 != config.sizes[0] * 2:
            raise ValueError(f"{config.width} and {config.sizes[0]} do not fit")
        super().__init__(config)


def test_numbers_that_only_fit_together_follow_together() -> None:
    model = Strict(Config())
    pruned(model)
    assert export_pruned(model).config.to_dict() == Config(**HALF).to_dict()


class Fixed(Net):
    """Is not made from its config alone."""

    def __init__(self, config: Config, more: int) -> None:
        super().__init__(config)
        self.add = more


@pytest.mark.parametrize(
    ("make", "choices", "reason"),
    [
        (Scaled, {"*": 0.5}, "where the dense model takes"),
        (Buffered, {"*": 0.5}, "`scale` has other values, and is not among what is saved"),
        (Tabled, {"*": 0.5}, "`table` was cut, and is not among what is saved"),
        (lambda config: Fixed(config, 1), {"*": 0.5}, "Fixed does not make the dense model from it"),
        (Strict, {"up.0*": 0.5}, "with sizes.0=15: ValueError: 20 and 15 do not fit"),
        (
            lambda config: Net(Config(width=30, sizes=(30,))),
            {"up.0*": 10, "enter*": 15},
            "",
        ),
    ],
    ids=["a scale", "a buffer that is not saved", "a buffer that is cut", "more arguments", "refused", "two of a size"],
)
def test_a_config_that_does_not_describe_the_model_stays(make: Any, choices: dict[str, Any], reason: str) -> None:
    model = make(Config())
    dense = model.config.to_dict()
    mutator = pruned(model, choices)
    after = export_pruned(model).config.to_dict()
    notes = [note for note in mutator.report().notes if "config" in note]
    if reason:
        assert after == dense
        assert len(notes) == 1
        assert notes[0].startswith("the config still describes the dense model: ")
        assert reason in notes[0]
    else:
        assert (after["width"], after["sizes"], notes) == (15, (10,), [])
