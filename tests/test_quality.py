"""The arithmetic of the quality benchmark: paired intervals, its tables, ratios of equal cost, and its data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.common import ROOT
from benchmarks.quality import SEEDS, comparisons, read_rows, schedules
from benchmarks.quality_data import HardDigits, spoiled
from benchmarks.quality_models import MODELS
from benchmarks.quality_sides import EXAMPLE, find_zero
from benchmarks.quality_table import compared, interval, render


def row(seed: int, ours: float, theirs: float, share: float = 0.15, macs: float = 0.15) -> dict[str, Any]:
    sides = {"ours": (ours, 0.15), "theirs": (theirs, macs)}
    found = {side: {"macs": m, "pruned": tuned / 2, "tuned": tuned} for side, (tuned, m) in sides.items()}
    return {"key": ["comparison", seed, "ViT", "global", "magnitude", share], "dense": 90.0, **found}


def test_the_interval_is_that_of_student() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert interval([2.0]).half == math.inf
    assert interval([2.0, 2.0]) == (2.0, 0.0)


def test_differences_are_paired_by_seed() -> None:
    rows = [row(0, 80.0, 70.0), row(1, 60.0, 50.0), row(2, 40.0, 30.0, macs=0.153)]
    (found,) = compared(rows).values()
    assert found["tuned"] == (10.0, 0.0)  # the seeds differ by far more than the sides
    assert found["pruned"] == (5.0, 0.0)
    assert (found["ours tuned"], found["theirs tuned"], found["dense"]) == (60.0, 50.0, 90.0)
    assert found["macs"] == pytest.approx(0.02)


def test_the_table_says_who_wins_and_what_is_lost() -> None:
    rows = [row(seed, 80.0, 70.0 + seed) for seed in range(3)] + [row(s, 50.0 + s, 60.0, share=0.5) for s in range(3)]
    rows.append(row(0, 80.0, 0.0, share=0.3))  # not done for all seeds
    lines = render(rows).splitlines()
    assert "| ViT | global | magnitude | 15% | 90.0 | 80.0 | 71.0 | +9.0 ± 2.5 | 40.0 | 35.5 | +4.5 ± 1.2 |" in lines
    assert "1 of 2 rows have an interval above 0, 1 below; mean difference +0.0" in render(rows)
    assert "Mean loss at 15% of MACs 10.0 points, Torch-Pruning's 19.0" in render(rows)


def test_schedules_are_paired_where_all_three_ran() -> None:
    rows = [
        {"key": ["schedule", seed, "ViT", kind, 0.15], "dense": 90.0, "macs": 0.15, "tuned": tuned + seed}
        for seed in range(2)
        for kind, tuned in (("one_shot", 70.0), ("linear", 75.0), ("cubic", 80.0))
    ]
    lines = render([*rows, {**rows[0], "key": ["schedule", 2, "ViT", "one_shot", 0.15]}]).splitlines()
    assert lines[-1] == "| ViT | 15% | 90.0 | 70.5 | 75.5 | 80.5 | +10.0 ± 0.0 | +5.0 ± 0.0 |"


@pytest.mark.parametrize("target", [0.5, 0.15, 0.02], ids=str)
def test_a_ratio_of_equal_cost_is_found_where_costs_jump_back(target: float) -> None:
    tried = []

    def distance(ratio: float) -> float:
        cost = (1 - ratio) ** 3 if ratio < 0.85 else 0.4
        tried.append(cost / target - 1)
        return tried[-1]

    find_zero(distance, 0.005)
    assert abs(tried[-1]) < 0.005
    assert len(tried) < 20


def test_every_row_is_asked_for_once() -> None:
    keys = comparisons(SEEDS) + schedules(SEEDS)
    assert len(keys) == len(set(keys)) == 5 * (2 * 5 * 3 + 9)


def test_digits_are_shifted_and_noisy_and_those_of_the_test_stay() -> None:
    image = torch.full((64, 1, 16, 16), -1.0)
    image[:, :, 8, 8] = 50.0
    places = spoiled(image, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    shifts = {(int(p) // 16 - 8, int(p) % 16 - 8) for p in places}
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(-3, 4))
    one, again = HardDigits(3), HardDigits(3)
    assert torch.equal(one.test[0][0], again.test[0][0])
    assert not torch.equal(one.test[0][0], one.test[1][0])
    assert len(one.train) == 500


@pytest.mark.parametrize("name", MODELS)
def test_every_network_names_ten_digits(name: str) -> None:
    assert MODELS[name]()(torch.zeros(EXAMPLE)).shape == (2, 10)


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    assert render(read_rows()) in (ROOT / "README.md").read_text(encoding="utf-8")
