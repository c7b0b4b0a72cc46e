"""What the benchmarks rely on: a process with a limit, and what a pruned tensor has kept."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.latency import Setting, cut, measure, tables
from benchmarks.narrow import build_narrow
from benchmarks.overhead import AGAIN, CALLBACK, LAYERS, PLAIN, epoch_ratio, ratios
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


def small_net() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AvgPool2d(6)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5))


@pytest.mark.filterwarnings("ignore")  # of the exporter, to its own authors
def test_latency_of_pruned_networks_stands_beside_dense_and_by_hand() -> None:
    setting = Setting("small", small_net, (1, 3, 8, 8), (8, 16), 2)
    record = measure(setting, ["eager", "onnxruntime"], "cpu")
    assert list(record["pruned"]) == ["8", "16"]
    assert all(cost["macs"] <= record["dense"]["macs"] / 2 for cost in record["pruned"].values())
    assert list(record["times"]) == ["eager", "onnxruntime"]
    for times in record["times"].values():
        assert all(len(times[divisor]["of by hand"]) == 3 for divisor in ("8", "16"))
        assert times["dense_ms"][0] > 0
    pruned, by_divisor = tables({"small": record}).split("\n\n")
    assert pruned.splitlines()[2].startswith("| small | eager | ")
    assert by_divisor.splitlines()[3].startswith("| small | onnxruntime |  | ")


def test_what_is_built_by_hand_is_of_torch_alone_and_of_the_same_sizes() -> None:
    setting = Setting("small", small_net, (1, 3, 8, 8), (8,), 1)
    pruned, by_hand = cut(setting, torch.randn(1, 3, 8, 8))[2][8][:2]
    assert [p.shape for p in by_hand.parameters()] == [p.shape for p in pruned.parameters()]
    assert by_hand[0].out_channels < 32
    assert {key for layer in by_hand.modules() for key in layer.__dict__} <= {
        key for layer in small_net().modules() for key in layer.__dict__
    }
    pruned[0].weight.data += 1
    assert not torch.equal(by_hand[0].weight, pruned[0].weight)


def test_a_network_built_by_hand_that_computes_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(dense: nn.Module, small: nn.Module) -> nn.Module:
        narrow = build_narrow(dense, small)
        narrow[0].weight.data += 1
        return narrow

    monkeypatch.setattr("benchmarks.latency.build_narrow", wrong)
    with pytest.raises(ValueError, match="computes something else"):
        cut(Setting("small", small_net, (1, 3, 8, 8), (8,), 1), torch.randn(1, 3, 8, 8))


def test_the_interval_of_a_ratio_holds_what_it_says() -> None:
    noise = 1 + 0.05 * np.random.default_rng(0).standard_exponential((200, 2, 20, 4))
    found = [epoch_ratio(1.01 * ours, base) for ours, base in noise]
    held = sum(one["low"] <= 1.01 <= one["high"] for one in found) / len(found)
    assert 0.9 <= held < 0.99
    assert max(one["high"] - one["low"] for one in found) < 0.05


@pytest.mark.parametrize("slower", [1.002, 1.02])
def test_a_callback_is_compared_with_its_neighbours(slower: float) -> None:
    drift = np.linspace(1, 2, 20)[:, None] * [1.5, 1, 1, 1]
    layers = 1.1 * drift
    ours = slower * layers
    ours[::6, 1] *= 5  # what disturbs a turn of some epochs
    times = {PLAIN: drift, AGAIN: drift, LAYERS: layers, CALLBACK: ours}
    found = ratios(times)
    medians = {name: interval["median"] for name, interval in found.items()}
    assert medians == {
        "with the callback / plain": pytest.approx(1.1 * slower, abs=1e-4),
        "dynamic layers alone / plain": pytest.approx(1.1, abs=1e-4),
        "with the callback / dynamic layers alone": pytest.approx(slower, abs=1e-4),
        "plain again / plain": 1.0,
    }
    del times[LAYERS]
    assert list(ratios(times)) == ["with the callback / plain", "plain again / plain"]
