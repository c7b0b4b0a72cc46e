"""Saved in one process, read in a fresh one: every topology as a checkpoint, eight models in every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.narrow import build_narrow
from benchmarks.round_trip import (
    EXPORTS,
    SAVED,
    Record,
    faults_of,
    halved,
    joined,
    make,
    other_weights_,
    read_files,
    write_files,
    write_others,
)
from lightning_prune import load_pruned, save_pruned
from tests.compare import assert_same, outputs
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = [f"zoo:{name}" for name, case in ZOO.items() if case.units]
EIGHT = (
    "zoo:depthwise",
    "zoo:grouped",
    "zoo:multi_output",
    "zoo:auxiliary_head",
    "zoo:grouped_queries",
    "zoo:lstm",
    "torchvision:resnet18",
    "torchvision:squeezenet1_1",
)


def load_all(folder: Path) -> None:
    """Load the checkpoints in a folder and write what they compute; the fresh process runs it."""
    found = {}
    for path in folder.glob("*.*"):
        model, inputs = make(f"zoo:{path.stem}")
        found[path.name] = outputs(load_pruned(path, other_weights_(model)), inputs)
    torch.save(found, folder / "outputs")


def read_all(folder: Path) -> None:
    """Read what `write_files` wrote into the folders in a folder, and write what came of it; in the fresh process."""
    found = {place.name: read_files(place.name, place) for place in folder.iterdir()}
    (folder / "read").write_text(json.dumps(found), encoding="utf-8")


def in_a_fresh_process(function: Any, folder: Path) -> None:
    call = f"torch.set_num_threads(1); {function.__name__}(Path(sys.argv[1]))"  # as in the tests: kernels round by it
    code = f"import sys, torch; from pathlib import Path; from {__name__} import {function.__name__}; {call}"
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    subprocess.run(command, check=True, cwd=ROOT)


Outputs = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outputs, Outputs]:
    expected: Outputs = {}
    folder = tmp_path_factory.mktemp("zoo")
    for name in TOPOLOGIES:
        small, inputs = halved(name)
        expected[name] = outputs(small, inputs)
        for suffix in SAVED:
            save_pruned(small, folder / f"{name.removeprefix('zoo:')}{suffix}")
    in_a_fresh_process(load_all, folder)
    return expected, torch.load(folder / "outputs")


@pytest.mark.filterwarnings("ignore")  # of kernels that there are not
@pytest.mark.parametrize("suffix", SAVED)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_fresh_process_computes_the_same_bits(name: str, suffix: str, both: tuple[Outputs, Outputs]) -> None:
    expected, found = both[0][name], both[1][f"{name.removeprefix('zoo:')}{suffix}"]
    assert len(expected) > 0
    assert_same(found, expected)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("eight")
    for name in EIGHT:
        (folder / name).mkdir()
    written = {name: write_files(name, folder / name) for name in EIGHT}
    in_a_fresh_process(read_all, folder)
    read = json.loads((folder / "read").read_text(encoding="utf-8"))
    return {name: joined(written[name], read[name], write_others(name, folder / name)) for name in EIGHT}


@pytest.mark.filterwarnings("ignore")  # of the exporters, to their own authors
@pytest.mark.parametrize("name", EIGHT)
def test_every_format_comes_back_and_is_no_larger_than_built_narrow(name: str, records: dict[str, Record]) -> None:
    record = records[name]
    assert not record["failures"]
    assert all(record[suffix]["batch"] == "any" for suffix in EXPORTS)
    assert all(record[suffix]["bytes"] <= 1.02 * record[suffix]["narrow"] for suffix in EXPORTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_network_built_narrow_by_hand_computes_the_same(name: str) -> None:
    small, inputs = halved(name)
    narrow = build_narrow(make(name)[0], small)
    assert not any("_pruned" in key for module in narrow.modules() for key in module.__dict__)
    for found, expected in zip(outputs(narrow, inputs), outputs(small, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("entry", "faults"),
    [
        pytest.param({"batch": "any", "difference": 1e-5, "bytes": 101, "narrow": 100}, [], id="right"),
        pytest.param({"batch": "any", "difference": 2e-4}, ["outputs differ by 2.0e-04"], id="other outputs"),
        pytest.param({"batch": "any", "difference": float("nan")}, ["outputs differ by nan"], id="NaN"),
        pytest.param({"batch": "any", "bytes": 103, "narrow": 100}, ["103 bytes, built narrow 100"], id="large"),
        pytest.param({"refused": "no", "dense": {"refused": "no"}}, [], id="refused dense too"),
        pytest.param({"batch": "fixed", "dense": {"batch": "fixed"}}, [], id="fixed dense too"),
        pytest.param(
            {"refused": "no", "dense": {"batch": "fixed"}}, ["dense it takes batch='fixed': no"], id="refused"
        ),
        pytest.param({"batch": "fixed", "dense": {"batch": "any"}}, ["dense it takes batch='any': fixed"], id="fixed"),
    ],
)
def test_faults_of_an_export_are_named(entry: dict[str, Any], faults: list[str]) -> None:
    assert faults_of(entry) == faults
