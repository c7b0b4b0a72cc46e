"""What the benchmarks rely on: a process with a limit, and what a pruned tensor has kept."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.process import run_apart
from benchmarks.zoo_sides import kept_along, zero_removed_
from benchmarks.zoo_table import faults_of


def fail(words: str) -> None:
    raise ValueError(words)


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert run_apart(torch.get_num_threads, limit_s=60) == 1
    with pytest.raises(RuntimeError, match=r"ValueError: of no use \(test_benchmarks.py:\d+ fail"):
        run_apart(fail, "of no use", limit_s=60)
    with pytest.raises(RuntimeError, match=r"not done in 0.2 s"):
        run_apart(time.sleep, 30, limit_s=0.2)


def test_kept_positions_are_found_by_their_values() -> None:
    full = torch.randn(6, 5, 3)
    kept = full[[1, 4, 5]][:, [0, 3]]
    assert [kept_along(full, kept, dim).tolist() for dim in range(3)] == [[1, 4, 5], [0, 3], [0, 1, 2]]
    with pytest.raises(ValueError, match="no part of the dense one"):
        kept_along(full, kept + 1, 0)


def test_what_a_pruned_model_has_not_becomes_zero_in_the_dense_one() -> None:
    dense, small = nn.Linear(4, 3), nn.Linear(2, 2)
    weight = dense.weight.detach().clone()
    small.weight = nn.Parameter(weight[[0, 2]][:, [1, 3]])
    small.bias = nn.Parameter(dense.bias.detach()[[0, 2]])
    zero_removed_(dense, small)
    expected = torch.zeros(3, 4)
    expected[[0, 0, 2, 2], [1, 3, 1, 3]] = weight[[0, 0, 2, 2], [1, 3, 1, 3]]
    assert torch.equal(dense.weight, expected)
    assert dense.bias[1] == 0
    assert (dense.bias[[0, 2]] != 0).all()


@pytest.mark.parametrize(
    ("record", "faults"),
    [
        pytest.param({"zeroed_error": 1e-12, "shapes_kept": True}, [], id="right"),
        pytest.param({"zeroed_error": 0.1, "shapes_kept": True}, ["wrong"], id="wrong"),
        pytest.param({"error": "not done in 120 s"}, ["error"], id="late"),
        pytest.param({"no_op": True, "ties_kept": False}, ["no_op", "ties"], id="nothing done but a tie lost"),
        pytest.param({"scale_kept": False}, ["scale"], id="scale changed"),
        pytest.param({"scale_kept": False, "rescaling": True}, [], id="scale changed as reported"),
    ],
)
def test_faults_are_named(record: dict[str, Any], faults: list[str]) -> None:
    assert faults_of(record, renormalizing=False) == faults
