"""Every topology of the zoo: saved in one process, loaded in a fresh one, same outputs bit for bit."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lightning_prune import ChannelMutator, export_pruned, load_pruned, save_pruned
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name, case in ZOO.items() if case.units]
SUFFIXES = (".ckpt", ".safetensors")


def outputs(model: torch.nn.Module, name: str) -> list[torch.Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that there are not
        return [one for one in tree_leaves(model.eval()(*ZOO[name].inputs())) if isinstance(one, torch.Tensor)]


def load_all(folder: Path) -> None:
    """Load what lies in a folder and write the outputs; the fresh process runs it."""
    torch.set_num_threads(1)  # as in the tests: kernels round by how many there are
    found = {path.name: outputs(load_pruned(path, ZOO[path.stem].make()), path.stem) for path in folder.glob("*.*")}
    torch.save(found, folder / "outputs")


Outputs = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outputs, Outputs]:
    expected: Outputs = {}
    folder = tmp_path_factory.mktemp("zoo")
    for name in NAMES:
        model, inputs = ZOO[name].make(), ZOO[name].inputs()
        mutator = ChannelMutator(example_input=inputs)
        mutator.prepare_from_supernet(model)
        mutator.set_choices({unit.name: 0.5 for unit in mutator.mutable_units})
        small = export_pruned(model)
        expected[name] = outputs(small, name)
        for suffix in SUFFIXES:
            save_pruned(small, folder / f"{name}{suffix}")
    code = (
        "import sys; from pathlib import Path; from tests.test_round_trip import load_all; load_all(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    return expected, torch.load(folder / "outputs")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_computes_the_same_bits(name: str, suffix: str, both: tuple[Outputs, Outputs]) -> None:
    expected, found = both[0][name], both[1][f"{name}{suffix}"]
    assert len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
