"""A table of sensitivities as an importance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.importance import Importance, SensitivityScores, resolve_importance
from tests.by_hand import linear, span, unit
from tests.lit import QUIET, loader, pruning, trainer
from tests.test_sensitivity import FIRST, SECOND, TABLE, Net

pytestmark = QUIET


def pair() -> list[Any]:
    """L1 norms 1, 4, 2, 3 and 8 .. 1."""
    small = unit(4, [span(linear([[1.0], [4.0], [2.0], [3.0]]))], name="a")
    return [small, unit(8, [span(linear([[float(8 - k)] for k in range(8)]))], name="b")]


def test_scores_are_what_the_metric_loses_when_a_channel_goes() -> None:
    """Of "a" 3 remain at a loss of 0.1, 2 at 0.3, so 1 at 0.5 and none at 0.7; of "b" 6 at none and 4 at 0.02."""
    found = SensitivityScores(TABLE).scores(pair())
    tie = [0.7 * 1e-3 * (1 - j / 4) for j in range(4)]
    losses = [0.7 + tie[0], 0.5 + tie[1], 0.3 + tie[2], 0.1 + tie[3]]
    assert found["a"].tolist() == pytest.approx([losses[3], losses[0], losses[2], losses[1]])
    ties = [0.7 * 1e-3 * (1 - j / 8) for j in range(8)]
    expected = [loss + more for loss, more in zip([0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0, 0], ties, strict=True)]
    assert found["b"].tolist() == pytest.approx(expected)
    assert found["b"][6] > found["b"][7]  # of a flat part the better one still stays


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_gets_better_counts_as_no_loss(mode: str) -> None:
    sign = 1 if mode == "min" else -1
    rows = [{"unit": "a", "num_channels": 4, "kept": [3, 2, 1], "values": [sign * 1.5, sign * 0.5, sign * 2.0]}]
    found = SensitivityScores({"mode": mode, "before": sign * 1.0, "rows": rows}, of={"name": "l1"}).scores(pair()[:1])[
        "a"
    ]
    tie = [2 * 1e-3 * (1 - j / 4) for j in range(4)]  # straight on, it loses 1.5 when the last one goes
    tie = [value * 1.5 / 2 for value in tie]
    losses = [1.5 + tie[0], 1.0 + tie[1], 0.5 + tie[2], 0.5 + tie[3]]
    assert found.tolist() == pytest.approx([losses[3], losses[0], losses[2], losses[1]])


def test_removed_channels_come_last_where_they_stay_away() -> None:
    units = pair()
    units[0].keep([0, 2])  # norms 1 and 2
    found = SensitivityScores(TABLE).scores(units, living=True)["a"]
    assert found[2] > found[0] > max(found[1], found[3])
    assert found[2] == pytest.approx(0.7007)


def test_a_global_ranking_prunes_what_loses_least() -> None:
    """With the scores of the table the threshold compares losses, whatever the norms are."""
    torch.manual_seed(0)
    model = Net()
    tough = {"unit": FIRST, "num_channels": 16, "kept": [12, 8], "values": [3.0, 5.0]}
    easy = {"unit": SECOND, "num_channels": 32, "kept": [16, 8], "values": [1.01, 1.02]}
    table = {"mode": "min", "before": 1.0, "rows": [tough, easy]}
    trainer(pruning({"params": 2600}, importance=SensitivityScores(table))).fit(model, loader())
    assert model.conv1.out_channels == 16
    assert model.conv2.out_channels == 14


@pytest.mark.parametrize(
    "importance",
    [
        pytest.param({"name": "sensitivity", "table": "T"}, id="name"),
        pytest.param({"name": "sensitivity", "table": "T", "of": {"name": "l2"}}, id="with what ranks"),
        pytest.param(
            {"class_path": "lightning_prune.importance.SensitivityScores", "init_args": {"table": "T", "of": "l2"}},
            id="class path",
        ),
    ],
)
def test_by_name_and_by_path(importance: dict[str, Any], tmp_path: Path) -> None:
    path = str(tmp_path / "table.json")
    TABLE.save(path)
    text = json.dumps(importance).replace('"T"', json.dumps(path))
    found = resolve_importance(json.loads(text))
    assert isinstance(found, SensitivityScores)
    assert found.of == Importance("l2" if "l2" in text else "l1")
    assert torch.equal(found.scores(pair())["a"], SensitivityScores(TABLE).scores(pair())["a"])


@pytest.mark.parametrize(
    ("table", "of", "match"),
    [
        pytest.param("no/such.json", "l1", "table 'no/such.json', which cannot be read", id="missing file"),
        pytest.param({"rows": []}, "l1", "expected what `lightning_prune.sensitivity` returns", id="not a table"),
        pytest.param(TABLE, "fisher", "of='fisher', which has to watch", id="watching"),
        pytest.param(
            {**TABLE.to_dict(), "before": math.nan}, "l1", "sensitivity of nan for unit 'a'", id="metric not finite"
        ),
    ],
)
def test_scores_that_cannot_be(table: Any, of: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SensitivityScores(table, of)


def test_a_unit_that_was_not_measured_is_named() -> None:
    with pytest.raises(PlanError, match=r"no sensitivity of unit 'c'.*Valid: 'a', 'b'"):
        SensitivityScores(TABLE).scores([unit(4, [span(linear([[1.0]] * 4))], name="c")])
    with pytest.raises(ConfigError, match=r"'sensitivity' without what was measured.*'table'"):
        resolve_importance("sensitivity")
    with pytest.raises(ConfigError, match=r"'sensitivity' without what was measured"):
        resolve_importance({"name": "sensitivity"})
