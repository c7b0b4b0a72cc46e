"""Functions that remember what they returned: a trace leaves nothing in them, and finds nothing there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
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


class Net(nn.Module):
    """Adds the position of each token.

    Args:
        where: Which function gives it.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.enter, self.leave, self.where = nn.Linear(5, 8), nn.Linear(8, 3), where

    @functools.lru_cache(maxsize=2)  # noqa: B019  # what is tested
    def by_method(self, count: int) -> Tensor:
        return torch.arange(count) / count

    @staticmethod
    @functools.lru_cache
    def by_static_method(count: int) -> Tensor:
        return torch.arange(count) / count

    def forward(self, x: Tensor) -> Tensor:
        functions = {"function": positions, "decorated": decorated, "method": self.by_method}
        function = functions.get(self.where, self.by_static_method)
        return self.leave(self.enter(x).relu() + function(x.shape[1])[:, None])


@pytest.mark.parametrize("ran_before", [False, True], ids=["first", "after a run"])
@pytest.mark.parametrize("where", ["function", "decorated", "method", "static method"])
def test_a_remembered_tensor_is_neither_left_behind_nor_taken_for_the_program(where: str, ran_before: bool) -> None:
    model, x = Net(where).double(), torch.randn(2, 6, 5, dtype=torch.float64)
    for memo in (positions, decorated.__wrapped__, Net.by_static_method):
        getattr(memo, "cache_clear", lambda: None)()
    if ran_before:
        model(x)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    model(x).sum().backward()
    assert [unit.num_channels for unit in mutator.units] == [8]
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))
