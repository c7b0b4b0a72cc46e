"""The default importance: energies by hand, shares of what is left, and scores per cost of the target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import PruningCallback
from lightning_prune.errors import PlanError
from lightning_prune.importance import Importance, magnitude, normalize, resolve_importance
from lightning_prune.importance.energy import count_readers
from lightning_prune.mutator import ChannelMutator
from lightning_prune.targets import make_plan
from tests.by_hand import conv, joined, linear, norm, span, unit

MAKES = [[3.0, -4.0], [0.0, 1.0], [-2.0, 2.0]]  # squares 25, 1, 8
READS = [[1.0, 0.0, -3.0], [1.0, 2.0, 0.0]]  # by channel: 2, 4, 9


@pytest.mark.parametrize(
    ("makes", "reads", "expected"),
    [
        pytest.param([linear(MAKES)], [linear(READS)], [25 * 2, 1 * 4, 8 * 9], id="made and read"),
        pytest.param([linear(MAKES)], [], [25, 1, 8], id="nothing reads"),
        pytest.param([conv(MAKES), norm([1.0, -2.0, 3.0])], [], [1, 4, 9], id="the norm speaks for what makes"),
        pytest.param([conv(MAKES), norm([1.0, -2.0, 3.0])], [conv(READS)], [2, 16, 81], id="norm and reader"),
    ],
)
def test_energies(makes: list[nn.Module], reads: list[nn.Module], expected: list[float]) -> None:
    one = unit(3, [span(layer) for layer in makes], [span(layer, 1) for layer in reads])
    score = magnitude(one)
    assert (score / score.sum()).tolist() == pytest.approx([value / sum(expected) for value in expected])


def test_each_layer_counts_alike_whatever_its_scale() -> None:
    one = unit(3, [span(linear(MAKES))], [span(linear(READS), 1), span(linear([[100.0, 300.0, 0.0]]), 1)])
    readers = [(2 / 5 + 1 / (10 / 3)) / 2, (4 / 5 + 9 / (10 / 3)) / 2, 9 / 5 / 2]
    expected = [25 / (34 / 3) * readers[0], 1 / (34 / 3) * readers[1], 8 / (34 / 3) * readers[2]]
    assert magnitude(one).tolist() == pytest.approx(expected)
    assert count_readers(one) == 2


def test_depthwise_layers_do_not_speak_where_others_do() -> None:
    depthwise = nn.Conv2d(3, 3, 3, groups=3)
    both = span(depthwise)
    one = unit(3, [span(conv(MAKES)), both], [both, span(conv(READS), 1)])
    before = magnitude(one)
    with torch.no_grad():
        depthwise.weight[0] *= 100
    assert torch.equal(magnitude(one), before)
    assert count_readers(one) == 1
    alone = unit(3, [both], [both])
    assert magnitude(alone).argmax() == 0
    assert count_readers(alone) == 1
    with pytest.raises(PlanError, match="without a weight"):
        magnitude(unit(3, []))


def test_means_are_of_what_remains() -> None:
    layer = linear(MAKES)
    one = joined(3, [layer])
    one.keep([0, 1])
    assert magnitude(one, living=True).tolist()[:2] == pytest.approx([25 / 13, 1 / 13])


def test_a_share_is_of_what_is_not_weaker() -> None:
    scores = torch.tensor([1.0, 4.0, 3.0, 3.0])
    assert normalize(scores, "share").tolist() == pytest.approx([1 / 11, 1.0, 3 / 7, 3 / 10])
    over = torch.tensor([True, False, True, False])
    assert normalize(scores, "share", over).tolist() == pytest.approx([1 / 4, 0.0, 1.0, 0.0])
    assert normalize(torch.zeros(2), "share").tolist() == [0.0, 0.0]


def test_shares_count_once_for_each_reader() -> None:
    one = unit(2, [span(linear([[1.0], [2.0]]))], [span(linear([[1.0, 1.0]]), 1), span(linear([[1.0, 1.0]]), 1)])
    assert Importance().scores([one])[one.name].tolist() == pytest.approx([2 * 1 / 5, 2 * 1.0])
    local = Importance().scores([one], "local")[one.name]
    assert local.tolist() == pytest.approx([2 / 5, 8 / 5])


@pytest.mark.parametrize(
    ("target", "importance", "per_cost", "expected"),
    [
        pytest.param({"macs": 0.5}, "magnitude", "auto", "macs", id="cost of the target"),
        pytest.param({"params": 0.5, "macs": 0.9}, "taylor", "auto", "params", id="first cost of the target"),
        pytest.param({"latency": 0.5}, "magnitude", "auto", "macs", id="latency"),
        pytest.param({"macs": 0.5}, "l1", "auto", None, id="a criterion that is not meant so"),
        pytest.param({"macs": 0.5}, {"name": "l1", "normalizer": "share"}, "auto", "macs", id="a share of any"),
        pytest.param({"macs": 0.5}, {"name": "mixture", "of": {"l1": 1, "taylor": 1}}, "auto", None, id="mixture"),
        pytest.param(0.5, "magnitude", "auto", None, id="a ratio for all"),
        pytest.param({"macs": 0.5}, "magnitude", None, None, id="never"),
        pytest.param({"macs": 0.5}, "magnitude", "memory", "memory", id="as asked"),
    ],
)
def test_scores_are_divided_by_the_cost_that_the_target_bounds(
    target: Any, importance: Any, per_cost: str | None, expected: str | None
) -> None:
    assert PruningCallback(target, importance, per_cost=per_cost).per_cost == expected


def test_a_unit_whose_energy_is_spread_keeps_more_than_one_where_few_channels_hold_it() -> None:
    """In terms of their mean it is the other way round: spread channels all fall at one threshold."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.fill_(0.1)
        model[2].weight[:16] *= 3
    mutator = ChannelMutator(example_input=torch.randn(2, 8))
    mutator.prepare_from_supernet(model)
    kept = {}
    for normalizer in ("mean", None):
        scores = resolve_importance({"name": "magnitude", "normalizer": normalizer}).scores(mutator.mutable_units)
        plan = make_plan({"macs": 0.3}, scores, mutator.limits(1, 0.1), mutator.graph.cost, per_cost="macs")
        kept[normalizer] = tuple(plan.counts().values())
    spread, held = kept[None]
    assert spread > held >= 8
    assert kept["mean"][0] < kept["mean"][1]
