"""What counts as an output: every tensor that forward returns, but for an object that only goes back into the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from tests.compare import assert_same, scattered


class Memory:
    """What a decoder keeps between calls."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@dataclass
class Result:
    """What a decoder returns."""

    out: Tensor
    memory: Any


class Decoder(nn.Module):
    """Sums up what it has seen: a width of 8 that lives in the memory as well.

    Args:
        give: Makes the result of the output and the keys.
    """

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.enter, self.leave, self.give = nn.Linear(5, 8), nn.Linear(8, 3), give

    def forward(self, x: Tensor, memory: Memory | None = None) -> Any:
        keys = self.enter(x)
        if memory is not None:
            keys = torch.cat([memory.keys, keys])
        return self.give(self.leave(keys.cumsum(0))[-len(x) :], keys)


class Wrapper(nn.Module):
    """A module that hands its arguments on, as a LightningModule does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)


def widths(give: Callable[[Tensor, Tensor], Any], wrap: bool = False) -> list[int]:
    model: nn.Module = Decoder(give)
    mutator = ChannelMutator(example_input={"x": torch.randn(4, 5)})
    mutator.prepare_from_supernet(Wrapper(model) if wrap else model)
    return [unit.num_channels for unit in mutator.units]


@pytest.mark.parametrize("wrap", [False, True], ids=["root", "wrapped"])
@pytest.mark.parametrize(
    "give",
    [lambda out, keys: {"out": out, "memory": Memory(keys)}, lambda out, keys: Result(out, Memory(keys))],
    ids=["mapping", "dataclass"],
)
def test_a_state_that_goes_back_into_the_model_shrinks_with_it(
    give: Callable[[Tensor, Tensor], Any], wrap: bool
) -> None:
    assert widths(give, wrap) == [8]


@pytest.mark.parametrize(
    "give",
    [
        pytest.param(lambda out, keys: {"out": out, "memory": keys}, id="a tensor under the name of an argument"),
        pytest.param(lambda out, keys: {"out": out, "memory": [keys]}, id="a list under the name of an argument"),
        pytest.param(lambda out, keys: {"out": out, "seen": Memory(keys)}, id="an object under another name"),
        pytest.param(lambda out, keys: (out, Memory(keys)), id="an object without a name"),
    ],
)
def test_every_other_output_keeps_its_shape(give: Callable[[Tensor, Tensor], Any]) -> None:
    assert widths(give) == []


def test_an_object_that_is_all_a_model_returns_is_its_output() -> None:
    assert widths(lambda out, keys: {"memory": Memory(out)}) == [8]  # and not the 3 of `out`


def test_the_report_names_the_state_and_the_small_model_takes_its_own() -> None:
    model = Decoder(lambda out, keys: {"out": out, "memory": Memory(keys)}).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    mutator = ChannelMutator(example_input={"x": x})
    mutator.prepare_from_supernet(model)
    assert "`memory` goes back into the model alone: it shrinks too" in mutator.report().notes
    mutator.apply(scattered(mutator.units))
    small = export_pruned(model)
    first = small(x)
    assert first["memory"].keys.shape == (4, mutator.units[0].activated_channels)
    again = [net(x, net(x)["memory"])["out"] for net in (model, small)]
    assert_same(again[:1], again[1:])
