"""Runs that are killed and resumed, and the kinds of runs there are: the share of `make torture` for every day."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.matrix import CASES, QUICK
from tests.processes import ROOT
from tests.resumable import ResumableLoader, differences

PAIRS = list(itertools.combinations(range(4), 2))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own found: it forks, which pytest had better not."""
    file = tmp_path_factory.mktemp("torture") / "results.json"
    command = [sys.executable, "-m", "tests.torture", "--quick", "--to", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert file.exists(), done.stderr[-4000:]
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_a_killed_run_resumes_to_the_same_bits(results: dict[str, Any]) -> None:
    """Weights, optimizer state, masks, scores and logged values, in the middle of epochs too."""
    (found,) = results["kills"].values()
    assert found["differences"] == []
    assert found["SIGKILL"] + found["SIGTERM"] == 5
    assert found["SIGKILL"] > 0
    assert found["runs"] > 0
    assert len(set(found["moments"])) > 2


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_it_trains_resumes_and_exports(case: Any, results: dict[str, Any]) -> None:
    assert results["matrix"][str(case)] == ""


def test_every_pair_of_the_matrix_is_in_a_case() -> None:
    for one, other in PAIRS:
        assert {(c[one], c[other]) for c in QUICK} == {(c[one], c[other]) for c in CASES}


def test_differences_are_seen() -> None:
    one = {"a": [torch.zeros(2), {"b": 1.0}], "c": 1}
    assert differences(one, {"a": [torch.zeros(2), {"b": 1.0}], "c": 1}) == []
    other = {"a": [torch.tensor([0.0, 1e-45]), {"b": 1.0 + 2e-16}], "c": 1.0, "d": 0}
    assert sorted(differences(one, other)) == ["/a/0", "/a/1/b", "/c", "/d is on one side only"]


def test_the_data_go_on_where_they_stopped() -> None:
    whole, first, second = ResumableLoader(), ResumableLoader(), ResumableLoader()
    batches, begun = list(whole), iter(first)
    for expected in batches[:2]:
        assert torch.equal(next(begun)[0], expected[0])
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == len(batches) - 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, batches[2:], strict=True))
