"""Costs are the formula of the structure: multiply-adds, parameters and memory, by op and by example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.errors import ConfigError
from lightning_prune.graph import ChannelGraph, analyze
from tests.zoo import ZOO


def graph_of(name: str, **arguments: Any) -> ChannelGraph:
    return analyze(ZOO[name].make(), ZOO[name].inputs(), {}, **arguments)[0]


# units in the order of the arguments, multiply-adds of two examples, parameters
FORMULAS: dict[str, tuple[tuple[str, ...], Callable[..., int], Callable[..., int]]] = {
    # 64 pixels, 9 taps, then 5 classes
    "chain": (
        ("one.conv_(0, 8)_out_2_in_2", "two.conv_(0, 12)_out_2_in_2"),
        lambda a, b: 2 * (64 * 9 * (3 * a + a * b) + 5 * b),
        lambda a, b: 27 * a + 2 * a + 9 * a * b + 2 * b + 5 * b + 5,
    ),
    # stride 2 twice: 16 and 4 pixels; biases
    "two_convolutions": (
        ("feature.0_(0, 8)_out_1_in_1", "feature.1_(0, 16)_out_1_in_1"),
        lambda a, b: 2 * (16 * 27 * a + 4 * 9 * a * b + 1000 * b),
        lambda a, b: 28 * a + 9 * a * b + b + 1000 * b + 1000,
    ),
    # the depthwise convolution costs 9 taps per channel
    "depthwise": (
        ("expand.conv_(0, 12)_out_4_in_4", "project.conv_(0, 10)_out_2_in_2"),
        lambda a, b: 2 * (64 * (3 * a + 9 * a + a * b) + 5 * b),
        lambda a, b: 3 * a + 2 * a + 9 * a + 2 * a + a * b + 2 * b + 5 * b + 5,
    ),
    # g groups of a channels in and b out
    "grouped": (
        ("stem.conv_(0, 24)_out_4_in_4_groups", "stem.conv_(0, 24)_out_2_in_2", "grouped.conv_(0, 28)_out_2_in_2"),
        lambda g, a, b: 2 * (64 * (3 * g * a + 9 * g * a * b) + 5 * g * b),
        lambda g, a, b: 3 * g * a + 2 * g * a + 9 * g * a * b + 2 * g * b + 5 * g * b + 5,
    ),
    # 9 tokens of 7 features, e wide, h heads of d: embed, qkv, scores and values, projection, head over the mean token
    "attention": (
        ("embed_(0, 20)_out_2_in_2", "attn.qkv_(0, 72)_out_1_in_1_heads", "attn.qkv_(0, 72)_out_1_in_1_head_dim"),
        lambda e, h, d: 2 * (9 * 7 * e + 9 * e * 3 * h * d + 2 * 81 * h * d + 9 * h * d * e + 5 * e),
        lambda e, h, d: 8 * e + 3 * h * d * (e + 1) + h * d * e + e + 5 * e + 5,
    ),
    # the 9 parts of a channel's kernel; each pixel of the input is read by 4 taps
    "transposed": (
        ("down.conv_(0, 8)_out_2_in_2", "up_(0, 12)_out_2_in_2"),
        lambda a, b: 2 * (16 * 27 * a + 16 * 4 * a * b + 64 * 27 * b),
        lambda a, b: 27 * a + 2 * a + 4 * a * b + b + 2 * b + 27 * b + 3,
    ),
    # a channel is 4 columns of the hidden layer
    "flatten_linear": (
        ("stem.conv_(0, 8)_out_2_in_2", "hidden_(0, 10)_out_2_in_2"),
        lambda a, b: 2 * (64 * 27 * a + 4 * a * b + 5 * b),
        lambda a, b: 27 * a + 2 * a + 4 * a * b + b + 2 * b + 5 * b + 5,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_costs_are_the_formula(name: str) -> None:
    cost, (units, macs, params) = graph_of(name).cost, FORMULAS[name]
    order = [cost.names.index(unit) for unit in units]
    generator = np.random.default_rng(0)
    counts = np.stack([cost.full, *(generator.integers(1, cost.full + 1) for _ in range(20))])
    rows = counts[:, order].tolist()
    assert cost.measure_many("macs", counts).tolist() == [macs(*row) for row in rows]
    assert cost.measure_many("params", counts).tolist() == [params(*row) for row in rows]
    assert cost.measure_many("flops", counts).tolist() == [2 * macs(*row) for row in rows]
    assert cost.measure_many("channels", counts).tolist() == counts.sum(1).tolist()
    assert [cost.measure("macs", row) for row in counts[:3]] == [macs(*row) for row in rows[:3]]


def test_a_cost_by_op_and_by_example() -> None:
    graph, _ = analyze(nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 3, bias=False)), (torch.randn(5, 3, 6),), {})
    cost = graph.cost.cost([2])
    assert (cost.macs, cost.params) == (5 * (6 * 3 * 2 + 4 * 3 * 2 * 4), 3 * 2 + 2 + 3 * 2 * 4)
    assert cost.by_op == {"aten::conv1d": cost.macs}
    assert (cost.batch_size, cost.per_example) == (5, 6 * 3 * 2 + 4 * 3 * 2 * 4)


def test_memory_is_the_bytes_of_what_ops_return() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 5))
    graph, _ = analyze(model, (torch.randn(5, 3, 6),), {})
    assert graph.cost.measure("memory", [3]) == 4 * 5 * (3 * 6 + 5)  # in place and views: nothing new


def test_an_unknown_cost_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Got cost 'mac'\. Did you mean 'macs'\?"):
        graph_of("chain").cost.measure("mac", [1, 1])
