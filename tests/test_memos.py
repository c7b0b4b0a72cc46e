"""Functions that remember what they returned: a trace leaves nothing in them, and finds nothing there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from tests import memo_steps as steps
from tests.compare import assert_same, outputs, scattered


@functools.cache
def positions(count: int) -> Tensor:
    return torch.arange(count) / count


def hidden_by_a_decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers does: the cached function is in the closure of another one."""
    remembering = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return remembering(*args)

    return call


@hidden_by_a_decorator
def decorated(count: int) -> Tensor:
    return torch.arange(count) / count


BY_COUNT: dict[int, Tensor] = {}


def from_a_dict(count: int) -> Tensor:
    if count not in BY_COUNT:
        BY_COUNT[count] = torch.arange(count) / count
    return BY_COUNT[count]


def by_two_steps(count: int) -> Tensor:
    """Reach a cached function of another file through a plain one."""
    return steps.positions(count)


class Table:
    """A plain object."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def of(self, count: int) -> Tensor:
        if self.values is None or len(self.values) != count:
            self.values = torch.arange(count) / count
        return self.values


class Net(nn.Module):
    """Adds the position of each token.

    Args:
        where: Which function gives it.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.enter, self.leave, self.where = nn.Linear(5, 8), nn.Linear(8, 3), where
        self.table = Table()

    @functools.lru_cache(maxsize=2)  # noqa: B019  # what is tested
    def by_method(self, count: int) -> Tensor:
        return torch.arange(count) / count

    @staticmethod
    @functools.lru_cache
    def by_static_method(count: int) -> Tensor:
        return torch.arange(count) / count

    by_class: ClassVar[dict[int, Tensor]] = {}

    def from_the_class(self, count: int) -> Tensor:
        return self.by_class.setdefault(count, torch.arange(count) / count)

    def forward(self, x: Tensor) -> Tensor:
        functions = {
            "function": positions,
            "decorated": decorated,
            "method": self.by_method,
            "static method": self.by_static_method,
            "dict": from_a_dict,
            "dict of the class": self.from_the_class,
            "object": self.table.of,
            "two steps": by_two_steps,
        }
        function = functions[self.where]
        return self.leave(self.enter(x).relu() + function(x.shape[1])[:, None])


WHERE = (
    "function", "decorated", "method", "static method", "dict", "dict of the class", "object", "two steps",
)  # fmt: skip


@pytest.mark.parametrize("ran_before", [False, True], ids=["first", "after a run"])
@pytest.mark.parametrize("where", WHERE)
def test_a_remembered_tensor_is_neither_left_behind_nor_taken_for_the_program(where: str, ran_before: bool) -> None:
    model, x = Net(where).double(), torch.randn(2, 6, 5, dtype=torch.float64)
    for memo in (positions, decorated.__wrapped__, Net.by_static_method, steps.positions):
        getattr(memo, "cache_clear", lambda: None)()
    BY_COUNT.clear()
    Net.by_class.clear()
    if ran_before:
        model(x)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    model(x).sum().backward()
    assert [unit.num_channels for unit in mutator.units] == [8]
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


def test_what_a_real_run_remembered_stays() -> None:
    model, x = Net("dict").double(), torch.randn(2, 6, 5, dtype=torch.float64)
    BY_COUNT.clear()
    model(x)
    remembered = BY_COUNT[6]
    ChannelMutator(example_input=x[:, :4]).prepare_from_supernet(model)
    assert list(BY_COUNT) == [6]
    assert BY_COUNT[6] is remembered


class Halves:
    """Remembers without a look at the size."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        if self.values is None:
            self.values = torch.ones(x.shape[-1]).to(x) / 2
        return self.values


def test_what_a_plain_object_remembers_is_dropped_when_channels_go() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave, self.halves = nn.Linear(5, 8), nn.Linear(8, 3), Halves()

        def forward(self, x: Tensor) -> Tensor:
            y = self.enter(x)
            return self.leave(y * self.halves.of(y))

    model, x = Halved().double(), torch.randn(2, 5, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    for seed in (0, 1):
        mutator.apply(scattered(mutator.units, seed))
        assert model(x).shape == (2, 3)
        assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))
