"""Criteria of weights alone, beside the norms of test_importance.py: worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.importance import (
    IMPORTANCES,
    REDUCTIONS,
    Importance,
    fpgm,
    lamp,
    lp,
    normalize,
    resolve_importance,
)
from lightning_prune.ops import DynamicLinear
from lightning_prune.units import MutableChannelUnit
from tests.by_hand import conv, linear, norm, span, unit

MAKES = [[3.0, -4.0], [0.0, 1.0], [-2.0, 2.0]]  # energies 25, 1, 8
ON_A_LINE = [[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]  # distances 5, 10, 5


def masked(rows: list[list[float]], kept: list[int]) -> MutableChannelUnit:
    """A unit of one linear layer that keeps some of its outputs."""
    layer = DynamicLinear.convert_from(linear(rows))
    made = unit(len(rows), [span(layer, end=len(rows))], name="a")
    layer.get_mutable_attr("out_channels").register_mutable(made.mutable, 0, len(rows))
    made.keep(kept)
    return made


@pytest.mark.parametrize(
    ("score", "arguments", "expected"),
    [
        pytest.param(lp, {"p": 1}, [7.0, 1.0, 4.0], id="lp 1"),
        pytest.param(lp, {"p": 3}, [91 ** (1 / 3), 1.0, 16 ** (1 / 3)], id="lp 3"),
        pytest.param(lp, {"p": 0.5}, [(3**0.5 + 2) ** 2, 1.0, 8.0], id="lp half"),
        pytest.param(lp, {"p": math.inf}, [4.0, 1.0, 2.0], id="lp inf"),
        pytest.param(lamp, {}, [1.0, 1 / 34, 8 / 33], id="lamp"),
        pytest.param(
            fpgm,
            {},
            [math.sqrt(34) + math.sqrt(61), math.sqrt(34) + math.sqrt(5), math.sqrt(61) + math.sqrt(5)],
            id="fpgm",
        ),
    ],
)
@pytest.mark.parametrize("layer", [linear, conv])
def test_scores_of_one_layer(score: Any, arguments: dict[str, Any], expected: list[float], layer: Any) -> None:
    assert score(unit(3, [span(layer(MAKES))]), **arguments).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_middle_of_the_others_goes_first() -> None:
    assert fpgm(unit(3, [span(linear(ON_A_LINE))])).tolist() == [15.0, 10.0, 15.0]


def test_equal_channels_have_no_distance() -> None:
    assert fpgm(unit(3, [span(linear([[1.0, 2.0]] * 3))])).tolist() == [0.0, 0.0, 0.0]
    many = fpgm(unit(40, [span(linear([[1.0, 2.0]] * 40))]))  # `cdist` goes another way from 26 rows on
    assert many.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([[2.0], [2.0], [1.0]], [1.0, 4 / 8, 1 / 9], id="of equal ones the first is stronger"),
        pytest.param([[0.0], [0.0], [0.0]], [0.0, 0.0, 0.0], id="nothing left"),
        pytest.param([[0.0], [3.0], [0.0]], [0.0, 1.0, 0.0], id="zeros below"),
    ],
)
def test_lamp_of_ties_and_zeros(rows: list[list[float]], expected: list[float]) -> None:
    assert lamp(unit(3, [span(linear(rows))])).tolist() == expected


def test_lamp_compares_what_the_layers_have_together() -> None:
    """Energies 25, 1, 8 and 1, 49, 0: their means 13, 25, 4 are compared, not the layers' own scores."""
    coupled = unit(3, [span(linear(MAKES)), span(linear([[1.0], [7.0], [0.0]]))])
    assert lamp(coupled).tolist() == pytest.approx([13 / 38, 1.0, 4 / 42])
    assert lamp(coupled, reduction="max").tolist() == pytest.approx([25 / 74, 1.0, 8 / 82])


def test_lamp_needs_no_normalizer_to_compare_units() -> None:
    one = unit(3, [span(linear(MAKES))], name="a")
    assert Importance("lamp").scores([one])["a"].tolist() == pytest.approx([1.0, 1 / 34, 8 / 33])
    assert Importance("lamp", normalizer="max").scores([one])["a"].max() == 1.0
    mean = (1 + 1 / 34 + 8 / 33) / 3
    assert Importance("lamp", normalizer="mean").scores([one])["a"][0] == pytest.approx(1 / mean)


@pytest.mark.parametrize("score", [lamp, fpgm, lp])
def test_scales_of_norms_do_not_count_beside_weights(score: Callable[..., Tensor]) -> None:
    alone, beside = unit(3, [span(conv(MAKES))]), unit(3, [span(conv(MAKES)), span(norm([9.0, 9.0, 1.0]))])
    assert torch.equal(score(alone), score(beside))


@pytest.mark.parametrize("score", [lamp, fpgm, lp])
def test_readers_count_on_request(score: Callable[..., Tensor]) -> None:
    reader = span(linear([[1.0, 0.0, -3.0]]), dim=1)
    both = unit(3, [span(linear(MAKES))], [reader])
    assert not torch.equal(score(both), score(both, input_related=True))
    assert torch.equal(score(unit(3, [reader])), score(unit(3, [], [reader]), input_related=True))


def test_positions_of_one_channel_are_one_vector() -> None:
    """Channel 0 has the columns 0 and 2, channel 1 the columns 1 and 3, channel 2 the column 4 alone."""
    flat = span(linear([[0.0, 3.0, 0.0, 4.0, 0.0]]), dim=1, index=[0, 1, 0, 1, 2])
    assert fpgm(unit(3, [flat])).tolist() == [5.0, 10.0, 5.0]
    assert lamp(unit(3, [flat])).tolist() == [0.0, 1.0, 0.0]


def test_distances_are_to_the_channels_that_the_layer_has() -> None:
    """Channel 3 is in the second layer alone, whose channel 2 lies at 1 and channel 3 at 4; channel 4 in none."""
    a = span(linear(ON_A_LINE), index=[0, 1, 2])
    b = span(linear([[1.0], [4.0]]), index=[2, 3])
    assert fpgm(unit(5, [a, b]), reduction="sum").tolist() == [15.0, 10.0, 18.0, 3.0, 0.0]


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
@pytest.mark.parametrize("name", ["lp", "lamp", "fpgm"])
def test_every_criterion_takes_every_reduction(name: str, reduction: str) -> None:
    one = unit(3, [span(linear(MAKES)), span(linear(ON_A_LINE))], name="a")
    scores = Importance(name, reduction, "none").scores([one])["a"]
    assert torch.equal(scores, IMPORTANCES[name](one, reduction=reduction).float())


@pytest.mark.parametrize("name", sorted({"lp", "lamp", "fpgm"}))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_the_unit(name: str, value: float) -> None:
    broken = unit(3, [span(linear([MAKES[0], [value, 0.0], MAKES[2]]))])
    with pytest.raises(PlanError, match=r"Got score (nan|inf) for channel \d of unit 'unit_\(0, 3\)'"):
        Importance(name).scores([broken])


@pytest.mark.parametrize("score", [lamp, fpgm, lp])
def test_nothing_to_score(score: Callable[..., Tensor]) -> None:
    with pytest.raises(PlanError, match=r"unit 'unit_\(0, 3\)' without a weight"):
        score(unit(3, []))


# Over the living only


def test_removed_channels_are_left_out_of_comparisons_on_request() -> None:
    pruned = masked(ON_A_LINE, [0, 1])
    assert fpgm(pruned).tolist() == [15.0, 10.0, 15.0]
    assert fpgm(pruned, living=True).tolist() == [5.0, 5.0, 0.0]
    assert lamp(pruned).tolist() == [0.0, 25 / 125, 1.0]
    assert lamp(pruned, living=True).tolist() == [0.0, 1.0, 0.0]


def test_statistics_are_of_the_living_on_request() -> None:
    weaker = masked(MAKES, [1, 2])  # L1 1, 4 and, removed, 7
    assert Importance("l1", normalizer="max").scores([weaker], living=True)["a"].tolist() == [7 / 4, 0.25, 1.0]
    assert Importance("l1", normalizer="max").scores([weaker])["a"].tolist() == pytest.approx([1.0, 1 / 7, 4 / 7])
    assert Importance("fpgm", normalizer="none").scores([weaker], living=True)["a"][0] == 0


def test_normalize_over_some() -> None:
    some = torch.tensor([True, True, False])
    assert normalize(torch.tensor([1.0, 3.0, 100.0]), "mean", some).tolist() == [0.5, 1.5, 50.0]


# Arguments of a criterion's own


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        pytest.param({"name": "lp", "p": 3}, Importance("lp", arguments={"p": 3}), id="beside the name"),
        pytest.param({"name": "lp", "arguments": {"p": 3}}, Importance("lp", arguments={"p": 3}), id="of their own"),
        pytest.param(
            {"name": "random", "seed": 7, "normalizer": "none"},
            Importance("random", normalizer="none", arguments={"seed": 7}),
            id="with others",
        ),
        pytest.param({"p": 1, "name": lp}, Importance(lp, arguments={"p": 1}), id="of a function"),
    ],
)
def test_arguments_reach_the_function(importance: Any, expected: Importance) -> None:
    assert resolve_importance(importance) == expected


def test_an_argument_changes_the_score() -> None:
    one = unit(3, [span(linear(MAKES))], name="a")
    scores = resolve_importance({"name": "lp", "p": math.inf, "normalizer": "none"}).scores([one])
    assert scores["a"].tolist() == [4.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        pytest.param(
            {"name": "lp", "q": 3}, "key 'q' in importance. Did you mean|key 'q' in importance. Valid", id="key"
        ),
        pytest.param({"name": "l1", "arguments": {"p": 3}}, "p=3 for importance 'l1', which takes no 'p'", id="l1"),
        pytest.param({"name": "lp", "p": 0}, "p=0 for importance 'lp'; expected a number greater than 0", id="zero"),
        pytest.param({"name": "lp", "p": "two"}, "p='two'", id="text"),
        pytest.param({"name": "lp", "p": math.nan}, "p=nan", id="nan"),
        pytest.param({"name": "lp", "p": True}, "p=True", id="bool"),
    ],
)
def test_bad_arguments(importance: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_importance(importance)
