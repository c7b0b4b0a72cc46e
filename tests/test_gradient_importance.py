"""Criteria of gradients: worked out by hand on layers whose gradients are written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.errors import CheckpointError, ConfigError, PlanError
from lightning_prune.importance import Importance, hessian, resolve_importance, taylor, taylor2
from lightning_prune.importance.observer import LossScale, MeansObserver, carried_on
from lightning_prune.ops import convert_
from lightning_prune.units import MutableChannelUnit
from tests.by_hand import conv, joined, linear, norm, span, unit

MAKES = [[3.0, -4.0], [0.0, 1.0], [-2.0, 2.0]]
BIAS = [1.0, 2.0, 0.0]
GRADS = [[1.0, 1.0], [5.0, 2.0], [1.0, -1.0]]
BIAS_GRADS = [2.0, -1.0, 3.0]
# weight x gradient, bias last: (3, -4, 2), (0, 2, -2), (-2, -2, 0)
FIRST = torch.tensor([1.0, 0.0, -4.0])
SECOND = torch.tensor([29.0, 8.0, 8.0])


def maker(rows: list[list[float]] = MAKES, bias: list[float] = BIAS) -> nn.Linear:
    layer = linear(rows)
    layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer


def give(layer: nn.Module, rows: Any = GRADS, bias: Any = BIAS_GRADS) -> None:
    """Give the dense parameters of a layer gradients."""
    for name, values in (("weight", rows), ("bias", bias)):
        parameter = layer._parameters[name]
        assert parameter is not None
        parameter.grad = None if values is None else torch.tensor(values, dtype=parameter.dtype).view_as(parameter)


def ids(*layers: nn.Module) -> set[int]:
    return {id(p) for layer in layers for p in layer.parameters()}


def watching(importance: Any, one: MutableChannelUnit) -> MeansObserver:
    found = resolve_importance(importance)
    assert isinstance(found, Importance)
    observer = found.observer([one])
    assert observer is not None
    return observer


def seen(importance: Any, one: MutableChannelUnit, *layers: nn.Module, scale: LossScale | None = None) -> list[float]:
    """Return the scores after one step."""
    observer = watching(importance, one)
    observer.before_step(ids(*layers), scale or LossScale())
    return observer.scores([one], "local")[one.name].tolist()


# The formulas


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        pytest.param(taylor, {}, [1.0, 0.0, 16.0], id="taylor"),
        pytest.param(taylor, {"joint": False}, [29.0, 8.0, 8.0], id="taylor of single weights"),
        pytest.param(hessian, {}, [14.5, 4.0, 4.0], id="hessian"),
        pytest.param(taylor2, {}, [13.5**2, 16.0, 64.0], id="taylor2"),
    ],
)
def test_formulas(function: Callable[..., Tensor], arguments: dict[str, Any], expected: list[float]) -> None:
    assert function(FIRST, SECOND, **arguments).tolist() == expected
    layer = maker()
    one = joined(3, [layer])
    give(layer)
    assert seen({"name": function.__name__, **arguments}, one, layer) == expected


def test_taylor2_is_the_change_of_a_quadratic_loss() -> None:
    """Of ``1/2 g ** 2 (w - a) ** 2`` with slope g at w the second-order change is exact."""
    w, g = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    a = w - 1 / g  # there the slope at w is g ** 2 / g = g

    def loss(x: Tensor) -> Tensor:
        return 0.5 * g**2 * (x - a) ** 2

    change = loss(torch.zeros_like(w)) - loss(w)
    assert taylor2(w * g, (w * g) ** 2).item() == pytest.approx(change.item() ** 2)


# What counts as a layer


def test_a_norm_speaks_with_scale_and_shift() -> None:
    """gamma x gradient and beta x gradient add up before they are squared; the convolution is a layer of its own."""
    layer, scale = conv(MAKES), norm([2.0, 1.0, 0.0])
    layer.bias = None
    scale.bias.data = torch.tensor([1.0, 1.0, 1.0])
    one = joined(3, [layer, scale])
    layer.weight.grad = torch.zeros_like(layer.weight)
    give(scale, [1.0, 2.0, 9.0], [1.0, -1.0, 2.0])  # 3, 1, 2
    assert seen({"name": "taylor", "reduction": "sum"}, one, layer, scale) == [9.0, 1.0, 4.0]
    assert seen("taylor", one, layer, scale) == [4.5, 0.5, 2.0]


def test_a_convolution_before_a_batch_norm_has_nothing_to_say() -> None:
    layer, scale = nn.Conv2d(2, 3, 3, bias=False).double(), nn.BatchNorm2d(3).double()
    one = joined(3, [layer, scale])
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    scale(layer(images)).relu().square().mean((0, 2, 3)).sum().backward()
    only = seen({"name": "taylor", "reduction": "first"}, one, layer, scale)
    both = seen({"name": "taylor", "reduction": "sum"}, one, layer, scale)
    assert max(only) < 1e-8 < min(both)


def test_a_norm_without_parameters_has_nothing_to_say() -> None:
    layer, scale = maker(), nn.BatchNorm1d(3, affine=False)
    one = joined(3, [layer])
    one.output_related.append(span(convert_(scale), tensor="running_mean"))
    give(layer)
    assert seen({"name": "taylor", "reduction": "sum"}, one, layer) == [1.0, 0.0, 16.0]


def test_readers_count_on_request() -> None:
    layer, reader = maker(), linear([[1.0, 0.0, -3.0], [2.0, 1.0, 1.0]])
    one = joined(3, [layer], [reader])
    give(layer)
    reader.weight.grad = torch.tensor([[2.0, 7.0, 1.0], [1.0, 3.0, -1.0]], dtype=torch.float64)  # 4, 3, -4
    reader.bias.grad = torch.ones(2, dtype=torch.float64)
    given = {"name": "taylor", "input_related": True, "reduction": "sum"}
    assert seen(given, one, layer, reader) == [1.0 + 16, 0.0 + 9, 16.0 + 16]
    assert seen("taylor", one, layer, reader) == [1.0, 0.0, 16.0]


def test_positions_of_one_channel_add_up() -> None:
    layer, reader = maker(), linear([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])  # a flatten: two columns for each channel
    one = joined(3, [layer], [reader])
    give(layer)
    reader.weight.grad = torch.tensor([[1.0, 1.0, 1.0, -1.0, 0.0, 1.0]], dtype=torch.float64)  # 3, -1, 6
    given = {"name": "taylor", "input_related": True, "reduction": "max"}
    assert seen(given, one, layer, reader) == [9.0, 1.0, 36.0]


def test_layers_that_stay_as_they_are_count_too() -> None:
    layer = linear(MAKES)
    layer.weight.grad = torch.tensor(GRADS, dtype=torch.float64)
    assert seen("taylor", unit(3, [span(layer)]), layer) == [1.0, 4.0, 16.0]


def test_sparse_gradients() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table.weight.data = torch.arange(12.0).view(4, 3)
    one = unit(3, [span(table, dim=1)])
    table(torch.tensor([1, 3])).sum().backward()  # rows 3, 4, 5 and 9, 10, 11
    assert seen("taylor", one, table) == [144.0, 196.0, 256.0]


# Steps


def test_steps_are_averaged_after_the_square() -> None:
    layer = maker()
    one = joined(3, [layer])
    observer = watching("taylor", one)
    give(layer)
    observer.before_step(ids(layer), LossScale())
    layer.weight.grad.neg_()  # type: ignore[union-attr]
    layer.bias.grad.zero_()  # type: ignore[union-attr]
    observer.before_step(ids(layer), LossScale())  # first is 1, -2, 4
    assert observer.scores([one], "local")[one.name].tolist() == [1.0, 2.0, 16.0]
    observer.reset()
    give(layer)
    observer.before_step(ids(layer), LossScale())
    assert observer.scores([one], "local")[one.name].tolist() == [1.0, 0.0, 16.0]


@pytest.mark.parametrize("name", ["taylor", "taylor2", "hessian"])
def test_the_scale_of_the_loss_is_divided_out(name: str) -> None:
    layer = maker()
    one = joined(3, [layer])
    give(layer)
    plain = seen(name, one, layer)
    for parameter in layer.parameters():
        parameter.grad *= 1024  # type: ignore[operator]
    assert seen(name, one, layer, scale=LossScale(1024.0, may_overflow=True)) == plain


def test_a_step_that_the_scaler_skips_is_not_seen() -> None:
    layer = maker()
    one = joined(3, [layer])
    observer = watching("taylor", one)
    give(layer)
    observer.before_step(ids(layer), LossScale(1.0, may_overflow=True))
    layer.weight.grad[0, 0] = math.inf  # type: ignore[index]
    observer.before_step(ids(layer), LossScale(1.0, may_overflow=True))
    assert observer.scores([one], "local")[one.name].tolist() == [1.0, 0.0, 16.0]
    observer.before_step(ids(layer), LossScale())
    with pytest.raises(PlanError, match=r"Got score inf for channel 0 of unit 'unit_\(0, 3\)'"):
        observer.scores([one], "local")


def test_each_optimizer_shows_its_own_layers() -> None:
    """A layer counts when its optimizer steps, not whenever it happens to have a gradient."""
    layer, other = maker(), maker()
    one = joined(3, [layer, other])
    give(layer)
    give(other)
    observer = watching({"name": "taylor", "reduction": "sum"}, one)
    observer.before_step(ids(layer), LossScale())
    give(other, [[0.0, 0.0]] * 3, [1.0, 1.0, 1.0])  # first is 1, 2, 0
    observer.before_step(ids(other), LossScale())
    assert observer.scores([one], "local")[one.name].tolist() == [1.0 + 1, 0.0 + 4, 16.0 + 0]


# Missing gradients


@pytest.mark.parametrize(
    ("weight", "bias", "names"),
    [
        pytest.param(None, None, "'maker0.weight', 'maker0.bias'", id="both"),
        pytest.param(None, BIAS_GRADS, "'maker0.weight';", id="weight"),
        pytest.param(GRADS, None, "'maker0.bias';", id="bias"),
    ],
)
def test_missing_gradients_raise_with_the_names(weight: Any, bias: Any, names: str) -> None:
    layer = maker()
    one = joined(3, [layer])
    give(layer, weight, bias)
    with pytest.raises(PlanError, match=f"Got no gradient for {names}.*importance 'taylor' expects"):
        seen("taylor", one, layer)


def test_parameters_that_no_optimizer_has_raise_with_the_names() -> None:
    layer, other = maker(), maker()
    one = joined(3, [layer, other])
    give(layer)
    give(other)
    with pytest.raises(PlanError, match=r"Got no gradient for 'maker1.weight', 'maker1.bias'; importance"):
        seen("taylor", one, layer)


def test_nothing_to_score() -> None:
    with pytest.raises(PlanError, match=r"unit 'unit_\(0, 3\)' without a weight"):
        watching("taylor", unit(3, []))


def test_without_a_watch_there_is_no_score() -> None:
    with pytest.raises(PlanError, match="importance 'taylor' without batches to look at"):
        Importance("taylor").scores([unit(3, [span(linear(MAKES))])])


# Removed channels


def test_removed_channels_carry_on_from_their_last_score() -> None:
    layer = maker()
    one = joined(3, [layer])
    observer = watching({"name": "taylor", "joint": False}, one)
    give(layer)
    observer.before_step(ids(layer), LossScale())
    assert observer.scores([one], "local")[one.name].tolist() == [29.0, 8.0, 8.0]
    observer.reset()
    one.keep([0, 1])
    give(layer, [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]], [0.0, 0.0, 0.0])  # 9 and 0.25 of 29 and 8: a quarter
    observer.before_step(ids(layer), LossScale())
    assert observer.scores([one], "local")[one.name].tolist() == pytest.approx([9.0, 0.25, 8.0 * 9.25 / 37])


def test_a_channel_that_was_never_seen_has_no_score() -> None:
    layer = maker()
    one = joined(3, [layer])
    one.keep([0, 1])
    give(layer, [*GRADS[:2], [0.0, 0.0]], [*BIAS_GRADS[:2], 0.0])
    assert seen({"name": "taylor", "joint": False}, one, layer) == [29.0, 8.0, 0.0]


def test_carrying_on_from_nothing() -> None:
    now, is_seen = torch.tensor([2.0, 0.0]), torch.tensor([True, False])
    assert carried_on(now, is_seen, None).tolist() == [2.0, 0.0]
    assert carried_on(now, is_seen, torch.tensor([0.0, 5.0])).tolist() == [2.0, 5.0]


def test_statistics_are_of_the_living_on_request() -> None:
    layer = maker()
    one = joined(3, [layer])
    observer = watching({"name": "hessian", "normalizer": "mean"}, one)
    give(layer)
    observer.before_step(ids(layer), LossScale())
    one.keep([0, 1])
    assert observer.scores([one], living=True)[one.name].tolist()[:2] == pytest.approx([14.5 / 9.25, 4 / 9.25])
    assert observer.scores([one], "local")[one.name].tolist() == pytest.approx([14.5 / 7.5, 4 / 7.5, 4 / 7.5])


# State


def test_what_was_seen_can_be_saved_in_between() -> None:
    layer = maker()
    one = joined(3, [layer])
    whole = watching("taylor", one)
    give(layer)
    whole.before_step(ids(layer), LossScale())
    _ = whole.scores([one], "local")
    half = copy.deepcopy(whole.state_dict())
    resumed = watching("taylor", one)
    resumed.load_state_dict(half)
    layer.bias.grad.zero_()  # type: ignore[union-attr]
    for observer in (whole, resumed):
        observer.before_step(ids(layer), LossScale())
    assert torch.equal(whole.scores([one], "local")[one.name], resumed.scores([one], "local")[one.name])
    assert half["weight"].tolist() == [1.0, 1.0, 1.0]  # what was saved does not move with what goes on
    resumed.reset()
    one.keep([0, 1])
    resumed.before_step(ids(layer), LossScale())
    assert resumed.scores([one], "local")[one.name][2] > 0  # the last scores are part of the state


def test_the_state_of_other_units_is_refused() -> None:
    state = watching("taylor", joined(3, [maker()])).state_dict()
    other = watching("taylor", joined(2, [linear(MAKES[:2])]))
    with pytest.raises(CheckpointError, match="a saved importance of 3 channels; expected 2"):
        other.load_state_dict(state)


# Arguments


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        pytest.param("taylor", Importance("taylor"), id="name"),
        pytest.param({"name": "hessian", "batches": 3}, Importance("hessian", batches=3), id="batches"),
        pytest.param(
            {"name": "taylor", "joint": False, "batches": 2},
            Importance("taylor", batches=2, arguments={"joint": False}),
            id="joint",
        ),
        pytest.param("lightning_prune.importance.taylor", Importance("lightning_prune.importance.taylor"), id="path"),
        pytest.param(taylor, Importance(taylor), id="function"),
    ],
)
def test_ways_to_write_it(importance: Any, expected: Importance) -> None:
    assert resolve_importance(importance) == expected
    assert expected.window == (expected.batches or 8)
    layer = maker()
    give(layer)
    assert len(seen(importance, joined(3, [layer]), layer)) == 3


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        pytest.param(
            {"name": "taylor", "batches": 0}, "batches=0 for importance 'taylor'; expected at least 1", id="0"
        ),
        pytest.param({"name": "taylor", "batches": True}, "batches=True", id="bool"),
        pytest.param({"name": "taylor", "batches": 2.5}, r"batches=2\.5", id="half"),
        pytest.param({"name": "l1", "batches": 8}, "batches=8 for importance 'l1', which takes no 'batches'", id="l1"),
        pytest.param({"name": "hessian", "joint": True}, "key 'joint' in importance", id="joint"),
        pytest.param({"name": "fisher", "reduction": "max"}, "reduction='max' for importance 'fisher'", id="fisher"),
        pytest.param({"name": "apoz", "input_related": True}, "input_related=True for importance 'apoz'", id="apoz"),
        pytest.param({"name": "tailor"}, "Did you mean 'taylor", id="near"),
    ],
)
def test_bad_arguments(importance: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_importance(importance)


def test_half_precision_does_not_overflow() -> None:
    layer = linear([[200.0, 200.0]], dtype=torch.float16)
    layer.weight.grad = torch.full_like(layer.weight, 400.0)
    layer.bias.data.zero_()
    layer.bias.grad = torch.zeros_like(layer.bias)
    assert seen("taylor", joined(1, [layer]), layer) == [160000.0**2]


def test_the_gradient_is_that_of_a_gate() -> None:
    """Of a linear layer that nothing but a gate follows: ``dL/dgate = sum of w dL/dw and b dL/db``."""
    layer, gate = maker(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    one = joined(3, [layer])
    x = torch.randn(5, 2, dtype=torch.float64)
    F.silu(layer(x) * gate).square().mean().backward()
    assert gate.grad is not None
    assert seen("taylor", one, layer) == pytest.approx(gate.grad.square().tolist())
