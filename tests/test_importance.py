from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.importance import (
    IMPORTANCES,
    REDUCTIONS,
    Importance,
    bn_scale,
    l1,
    l1_scores,
    l2,
    normalize,
    random,
    reduce_layers,
    resolve_importance,
)
from lightning_prune.ops import DynamicConv2d
from tests.by_hand import conv, linear, norm, span, unit


def double(unit: Any) -> Tensor:
    return 2 * l1(unit)


class Falling:
    """Scores fall with the channel; made by class path."""

    def __init__(self, top: int = 10) -> None:
        self.top = top

    def __call__(self, unit: Any) -> Tensor:
        return torch.arange(self.top, self.top - unit.num_channels, -1)


class Whole:
    """An object that scores all units by itself."""

    def scores(self, units: Any, scope: str = "global") -> dict[str, Tensor]:
        return {u.name: torch.zeros(u.num_channels) for u in units}


MAKES = [[3.0, -4.0], [0.0, 1.0], [-2.0, 2.0]]  # L1 7, 1, 4; L2 5, 1, sqrt 8
READS = [[1.0, 0.0, -3.0]]  # per input channel: 1, 0, 3


# ---------------------------------------------------------------- functions


@pytest.mark.parametrize(
    ("score", "expected"),
    [pytest.param(l1, [7.0, 1.0, 4.0], id="l1"), pytest.param(l2, [5.0, 1.0, math.sqrt(8)], id="l2")],
)
@pytest.mark.parametrize("layer", [linear, conv])
def test_norm_of_each_output_channel(score: Callable[..., Tensor], expected: list[float], layer: Any) -> None:
    assert score(unit(3, [span(layer(MAKES))])).tolist() == pytest.approx(expected, rel=1e-6)


def test_two_axis_weights_speak_before_scales() -> None:
    """A norm after the convolution is listed too; its one-axis weight does not count, unless it is alone."""
    batch_norm = norm([100.0, -50.0, 7.0])
    assert l1(unit(3, [span(conv(MAKES)), span(batch_norm)])).tolist() == [7.0, 1.0, 4.0]
    assert l1(unit(3, [span(batch_norm)])).tolist() == [100.0, 50.0, 7.0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        pytest.param("mean", [6.0, 1.5, 4.5], id="mean"),
        pytest.param("sum", [12.0, 3.0, 9.0], id="sum"),
        pytest.param("max", [7.0, 2.0, 5.0], id="max"),
        pytest.param("prod", [35.0, 2.0, 20.0], id="prod"),
        pytest.param("first", [7.0, 1.0, 4.0], id="first"),
    ],
)
def test_reduction_over_coupled_layers(reduction: str, expected: list[float]) -> None:
    coupled = unit(3, [span(linear(MAKES)), span(linear([[5.0], [-2.0], [5.0]]))])
    assert l1(coupled, reduction=reduction).tolist() == expected


def test_input_related_weights_on_request() -> None:
    both = unit(3, [span(linear(MAKES))], [span(linear(READS), dim=1)])
    assert l1(both).tolist() == [7.0, 1.0, 4.0]
    assert l1(both, input_related=True, reduction="sum").tolist() == [8.0, 1.0, 7.0]


def test_a_layer_on_both_sides_counts_once() -> None:
    depthwise = nn.Conv2d(3, 3, 1, groups=3)
    depthwise.weight.data = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    both = unit(3, [span(depthwise)], [span(depthwise)])
    assert l1(both, input_related=True, reduction="sum").tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        pytest.param("mean", [1.0, 2.0, 6.0, 20.0, 0.0], id="mean"),
        pytest.param("sum", [1.0, 2.0, 12.0, 20.0, 0.0], id="sum"),
        pytest.param("max", [1.0, 2.0, 9.0, 20.0, 0.0], id="max"),
        pytest.param("prod", [1.0, 2.0, 27.0, 20.0, 0.0], id="prod"),
        pytest.param("first", [1.0, 2.0, 3.0, 20.0, 0.0], id="first"),
    ],
)
def test_a_layer_counts_only_for_the_channels_that_it_has(reduction: str, expected: list[float]) -> None:
    """Layer a has channels 0, 1, 2; two rows of layer b have channels 2, 3; channel 4 has no layer."""
    a = span(linear([[1.0], [2.0], [3.0]]), index=[0, 1, 2])
    b = span(linear([[50.0], [9.0], [20.0]]), start=1, end=3, index=[2, 3])
    assert l1(unit(5, [a, b]), reduction=reduction).tolist() == expected


def test_positions_of_one_channel_add_up_before_the_root() -> None:
    """A flatten gives channel 0 the columns 0 and 1, channel 1 the columns 2 and 3."""
    flat = span(linear([[3.0, -4.0, 0.0, 1.0]]), dim=1, index=[0, 0, 1, 1])
    assert l1(unit(2, [], [flat]), input_related=True).tolist() == [7.0, 1.0]
    assert l2(unit(2, [], [flat]), input_related=True).tolist() == [5.0, 1.0]


def test_bn_scale_reads_the_norms_alone() -> None:
    coupled = unit(3, [span(linear(MAKES)), span(norm([1.0, -2.0, 3.0])), span(norm([3.0, 0.0, 1.0]))])
    assert bn_scale(coupled).tolist() == [2.0, 1.0, 2.0]
    assert bn_scale(coupled, reduction="first").tolist() == [1.0, 2.0, 3.0]


def test_bn_scale_ignores_a_prelu() -> None:
    prelu = nn.PReLU(3)
    with pytest.raises(PlanError, match=r"unit 'unit_\(0, 3\)' without a norm that has a weight"):
        bn_scale(unit(3, [span(linear(MAKES)), span(prelu)]))


def test_nothing_to_score() -> None:
    with pytest.raises(PlanError, match=r"unit 'unit_\(0, 3\)' without a weight"):
        l1(unit(3, []))


def test_random_depends_on_the_name_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random(unit(64, [], name="a"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, random(unit(64, [], name="a")))
    assert not torch.equal(first, random(unit(64, [], name="b")))
    assert not torch.equal(first, random(unit(64, [], name="a"), seed=1))


def test_half_precision_is_summed_in_float32() -> None:
    layer = linear([[60000.0, 60000.0]], dtype=torch.float16)
    assert l1(unit(1, [span(layer)])).tolist() == [119872.0 if layer.weight[0, 0] == 59936 else 120000.0]


def test_l1_is_what_an_l1_unit_chooses_by() -> None:
    coupled = unit(3, [span(conv(MAKES)), span(norm([9.0, 9.0, 9.0])), span(conv([[5.0], [-2.0], [5.0]]))])
    assert torch.equal(l1(coupled), l1_scores(coupled))


def test_removed_channels_have_scores_too() -> None:
    layer = DynamicConv2d.convert_from(conv(MAKES))
    masked = unit(3, [span(layer)])
    layer.get_mutable_attr("out_channels").register_mutable(masked.mutable, 0, 3)
    masked.keep([0])
    assert layer.weight.shape[0] == 1
    assert l1(masked).tolist() == [7.0, 1.0, 4.0]


def test_no_gradient_flows() -> None:
    assert not l1(unit(3, [span(linear(MAKES))])).requires_grad


# ---------------------------------------------------------------- reduction and normalisation


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        pytest.param("mean", [0.5, 1.0, 1.5], id="mean"),
        pytest.param("max", [1 / 3, 2 / 3, 1.0], id="max"),
        pytest.param("sum", [1 / 6, 2 / 6, 3 / 6], id="sum"),
        pytest.param("std", [1 / math.sqrt(2 / 3), 2 / math.sqrt(2 / 3), 3 / math.sqrt(2 / 3)], id="std"),
        pytest.param("none", [1.0, 2.0, 3.0], id="none"),
    ],
)
def test_normalize(normalizer: str, expected: list[float]) -> None:
    assert normalize(torch.tensor([1.0, 2.0, 3.0]), normalizer).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normalizer", ["mean", "max", "sum", "std"])
def test_normalize_keeps_the_order_and_survives_zeros(normalizer: str) -> None:
    assert normalize(torch.zeros(3), normalizer).tolist() == [0.0, 0.0, 0.0]
    assert normalize(torch.tensor([-3.0, -2.0, -5.0]), normalizer).argsort().tolist() == [2, 0, 1]


def test_unknown_normalizer() -> None:
    with pytest.raises(ConfigError, match=r"normalizer='mena'.*Did you mean 'mean'"):
        normalize(torch.ones(2), "mena")


def test_unknown_reduction() -> None:
    with pytest.raises(ConfigError, match=r"reduction='maximum'.*Valid: 'mean', 'sum', 'max'"):
        reduce_layers([torch.ones(2)], [torch.ones(2, dtype=torch.bool)], "maximum")


# ---------------------------------------------------------------- Importance


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        pytest.param("global", [7 / 4, 1 / 4, 1.0], id="global"),
        pytest.param("isomorphic", [7 / 4, 1 / 4, 1.0], id="isomorphic"),
        pytest.param("local", [7.0, 1.0, 4.0], id="local"),
    ],
)
def test_the_scope_decides_the_default_normalizer(scope: str, expected: list[float]) -> None:
    scores = Importance("l1").scores([unit(3, [span(linear(MAKES))], name="a")], scope)
    assert scores["a"].tolist() == expected


def test_scores_are_float32_on_the_cpu_for_every_unit() -> None:
    units = [unit(3, [span(linear(MAKES))], name="a"), unit(1, [span(linear([[2.0]]))], name="b")]
    scores = Importance("l1", normalizer="none").scores(units)
    assert list(scores) == ["a", "b"]
    assert torch.equal(scores["a"], torch.tensor([7.0, 1.0, 4.0]))
    assert scores["b"].dtype == torch.float32


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
@pytest.mark.parametrize("name", ["l1", "l2", "bn_scale"])
def test_every_importance_takes_every_reduction(name: str, reduction: str) -> None:
    one = unit(3, [span(linear(MAKES)), span(norm([1.0, 2.0, 3.0]))], name="a")
    assert torch.equal(
        Importance(name, reduction, "none").scores([one])["a"], IMPORTANCES[name](one, reduction=reduction).float()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
def test_scores_that_are_not_finite_name_the_unit(value: float, reduction: str) -> None:
    rows = [MAKES[0], [value, 0.0], MAKES[2]]
    with pytest.raises(PlanError, match=rf"score {value} for channel 1 of unit 'unit_\(0, 3\)' \(1 of 3"):
        Importance("l1", reduction).scores([unit(3, [span(linear(rows))])])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda unit: torch.ones(2), r"shape \(2,\).*shape \(3,\)", id="shape"),
        pytest.param(lambda unit: [1, 2, 3], "Got scores of list", id="list"),
        pytest.param(lambda unit: torch.ones(3, dtype=torch.complex64), "complex64", id="complex"),
    ],
)
def test_what_a_function_must_return(function: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Importance(function).scores([unit(3, [])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"name": "l11"}, "importance 'l11'.*Did you mean 'l1'", id="unknown"),
        pytest.param({"name": "no_such_package.score"}, "cannot be imported.*no_such_package", id="package"),
        pytest.param({"name": "math.no_such_function"}, "cannot be imported.*no_such_function", id="function"),
        pytest.param({"name": "math.pi"}, "'math.pi', which is not a function", id="not a function"),
        pytest.param({"name": 3}, "importance 3, which is not a function", id="number"),
        pytest.param({"reduction": "average"}, "reduction='average'", id="reduction"),
        pytest.param({"normalizer": "L2"}, "normalizer='L2'", id="normalizer"),
        pytest.param({"name": "random", "reduction": "max"}, "reduction='max' for importance 'random'", id="not taken"),
        pytest.param({"name": double, "input_related": True}, "input_related=True for", id="not taken by a function"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Importance(**arguments)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_equal(copier: Callable[[Importance], Importance]) -> None:
    assert copier(Importance("l2", "max")) == Importance("l2", "max")


# ---------------------------------------------------------------- resolve_importance


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        pytest.param("l2", Importance("l2"), id="name"),
        pytest.param({"name": "l2", "reduction": "max"}, Importance("l2", "max"), id="mapping"),
        pytest.param(OmegaConf.create({"name": "l2"}), Importance("l2"), id="DictConfig"),
        pytest.param({}, Importance("magnitude"), id="defaults"),
        pytest.param(double, Importance(double), id="function"),
        pytest.param("lightning_prune.importance.l2", Importance("lightning_prune.importance.l2"), id="path"),
    ],
)
def test_resolve_importance(importance: Any, expected: Importance) -> None:
    resolved = resolve_importance(importance)
    assert resolved == expected
    assert resolve_importance(resolved) is resolved


def test_a_function_by_path_scores() -> None:
    one = unit(3, [span(linear(MAKES))], name="a")
    scores = resolve_importance({"name": "lightning_prune.importance.l2", "normalizer": "none"}).scores([one])
    assert scores["a"].tolist() == pytest.approx([5.0, 1.0, math.sqrt(8)])


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        pytest.param(Falling, [10, 9, 8], id="class"),
        pytest.param(Falling(5), [5, 4, 3], id="instance"),
        pytest.param(f"{__name__}.Falling", [10, 9, 8], id="class path"),
        pytest.param({"class_path": f"{__name__}.Falling", "init_args": {"top": 4}}, [4, 3, 2], id="init_args"),
        pytest.param({"class_path": f"{__name__}.Whole"}, [0, 0, 0], id="scorer"),
    ],
)
def test_classes_and_instances(importance: Any, expected: list[float]) -> None:
    scores = resolve_importance(importance).scores([unit(3, [], name="a")], "local")
    assert scores["a"].tolist() == expected


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        pytest.param("l11", "importance 'l11'.*Did you mean 'l1'", id="unknown name"),
        pytest.param({"names": "l1"}, "key 'names' in importance.*Did you mean 'name'", id="unknown key"),
        pytest.param({"class_path": "math.sqrt"}, "class_path='math.sqrt', which is not a class", id="not a class"),
        pytest.param({"class_path": f"{__name__}.Falling", "init_args": {"bottom": 1}}, "bottom", id="init_args"),
        pytest.param({"class_path": "a.B", "name": "l1"}, "key 'name'", id="class_path and name"),
        pytest.param(3, "importance 3; expected one of 'magnitude'", id="number"),
        pytest.param(None, "importance None; expected", id="none"),
    ],
)
def test_resolve_importance_rejects(importance: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_importance(importance)
