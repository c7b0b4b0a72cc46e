"""A weighted sum of criteria: worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.importance import Importance, Mixture, resolve_importance
from lightning_prune.importance.observer import LossScale
from tests.by_hand import joined, linear, span, unit

A = [[1.0, 0.0], [2.0, 1.0]]  # L1 1, 3; largest 1, 2
B = [[6.0, 0.0], [5.0, 1.0]]  # L1 6, 6; largest 6, 5


def units() -> list[Any]:
    return [unit(2, [span(linear(A))], name="a"), unit(2, [span(linear(B))], name="b")]


def rising(unit: Any) -> Tensor:
    return torch.arange(1.0, unit.num_channels + 1)


def raw(name: str, **more: Any) -> Importance:
    return Importance(name, normalizer="none", **more)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # L1 over its mean 4; the largest over its mean 3.5; the second counts twice
        pytest.param(
            "global", {"a": [1 / 4 + 2 / 3.5, 3 / 4 + 4 / 3.5], "b": [1.5 + 12 / 3.5, 1.5 + 10 / 3.5]}, id="global"
        ),
        # per unit: means 2 and 6 of the one, 1.5 and 5.5 of the other
        pytest.param("local", {"a": [1 / 2 + 2 / 1.5, 3 / 2 + 4 / 1.5], "b": [1 + 12 / 5.5, 1 + 10 / 5.5]}, id="local"),
    ],
)
def test_weighted_sum(scope: str, expected: dict[str, list[float]]) -> None:
    mixture = Mixture([(raw("l1"), 1.0), (raw("lp", arguments={"p": math.inf}), 2.0)])
    found = mixture.scores(units(), scope)
    assert {name: row.tolist() for name, row in found.items()} == {n: pytest.approx(e) for n, e in expected.items()}


def test_a_weight_of_zero_changes_nothing() -> None:
    alone, beside = (Mixture(parts).scores(units()) for parts in ([(raw("l1"), 1)], [(raw("l1"), 1), (raw("l2"), 0)]))
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_a_part_of_zeros_counts_for_nothing() -> None:
    zeros = Importance(lambda unit: torch.zeros(unit.num_channels))
    found = Mixture([(raw("l1"), 1.0), (zeros, 5.0)]).scores(units())
    assert found["a"].tolist() == [1 / 4, 3 / 4]


def test_the_level_is_that_of_the_living_on_request() -> None:
    pair = units()
    pair[1].keep([0])
    found = Mixture([(raw("l1"), 1.0)]).scores(pair, living=True)
    assert found["a"].tolist() == pytest.approx([1 / (10 / 3), 3 / (10 / 3)])


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        pytest.param({"l1": 1, "taylor": 0.5}, [(Importance("l1"), 1), (Importance("taylor"), 0.5)], id="names"),
        pytest.param({f"{__name__}.rising": 2}, [(Importance(f"{__name__}.rising"), 2)], id="path"),
        pytest.param(
            [{"name": "lp", "p": 3, "weight": 2.0}, {"name": "l1"}],
            [(Importance("lp", arguments={"p": 3}), 2.0), (Importance("l1"), 1.0)],
            id="mappings",
        ),
    ],
)
@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_ways_to_write_it(of: Any, expected: Any, wrap: Any) -> None:
    found = resolve_importance(wrap({"name": "mixture", "of": of}))
    assert isinstance(found, Mixture)
    assert list(found.parts) == expected


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        pytest.param("mixture", "'mixture' without its parts; expected a mapping such as", id="alone"),
        pytest.param({"name": "mixture", "of": {}}, r"weights \[\] for a mixture", id="empty"),
        pytest.param({"name": "mixture", "of": {"l1": 0}}, r"weights \[0\]", id="zero"),
        pytest.param({"name": "mixture", "of": {"l1": math.nan}}, r"weights \[nan\]", id="nan"),
        pytest.param({"name": "mixture", "of": {"l1": True}}, r"weights \[True\]", id="bool"),
        pytest.param({"name": "mixture", "of": {"l1": "much"}}, r"weights \['much'\]", id="text"),
        pytest.param({"name": "mixture", "of": "l1"}, "of='l1' in a mixture; expected names and weights", id="of"),
        pytest.param({"name": "mixture", "of": ["l1"]}, r"of=\['l1'\] in a mixture", id="list of names"),
        pytest.param({"name": "mixture", "of": {"l1": 1}, "p": 3}, "key 'p' in a mixture", id="key"),
        pytest.param({"name": "mixture", "of": {"l11": 1}}, "Did you mean 'l1'", id="part"),
    ],
)
def test_bad_arguments(importance: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_importance(importance)


def test_it_watches_where_a_part_does() -> None:
    assert Mixture([(Importance("l1"), 1.0)]).window == 0
    assert Mixture([(Importance("l1"), 1.0)]).observer(units()) is None
    layer = linear(A)
    one = joined(2, [layer], name="a")
    mixture = Mixture([(raw("l1"), 1), (raw("taylor", batches=3), 1), (raw("hessian"), 1)])
    assert mixture.window == 8
    observer = mixture.observer([one])
    assert observer is not None
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    layer.bias.data.zero_()
    observer.before_step({id(p) for p in layer.parameters()}, LossScale())
    # L1 1, 3 over 2; taylor 1, 9 over 5; hessian 1 / 2, 5 / 2 over 3 / 2
    expected = pytest.approx([1 / 2 + 1 / 5 + 1 / 3, 3 / 2 + 9 / 5 + 5 / 3])
    assert observer.scores([one])["a"].tolist() == expected
    again = mixture.observer([one])
    assert again is not None
    again.load_state_dict(observer.state_dict())
    assert again.scores([one])["a"].tolist() == expected
    with pytest.raises(CheckpointError, match="without part 1"):
        again.load_state_dict({})
