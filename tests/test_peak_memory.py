"""Peak memory: measured in a fresh process, of the model and not of what asked for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError
from lightning_prune.latency import PeakMemory, peak_memory
from tests.torchvision_shim import ZOO

MIB = 2**20


@pytest.fixture(autouse=True)
def _without_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process has no shim for a torchvision that cannot load; other tests may have put it on the path."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(ZOO)])


class Wide(nn.Module):
    """Holds so many MiB in its weights, and takes so many more in a forward."""

    def __init__(self, weights: int, activations: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weights, MIB // 4))
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(self.activations, MIB // 4).sum() + self.weight[0, 0] + x


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no forward today")


def test_weights_and_activations_count_and_nothing_of_this_process() -> None:
    held = torch.ones(200, MIB // 4)
    model = Wide(60, 100).train()
    found = peak_memory(model, torch.zeros(1), threads=1)
    assert 160 <= found.added / MIB < 180
    assert found.added < found.peak < found.added + 600 * MIB
    assert len(held) == 200
    assert model.training


def test_an_exported_file_is_run_without_what_the_export_took() -> None:
    small = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    found = peak_memory(small, torch.zeros(1, 1, 8, 8), "onnxruntime", threads=1)
    assert 0 < found.added < 40 * MIB


@pytest.mark.gpu
def test_on_a_device_it_is_what_torch_allocates_there() -> None:
    found = peak_memory(Wide(60, 0).cuda(), torch.zeros(1))
    assert found.peak == found.added
    assert 60 <= found.peak / MIB < 64


def test_what_cannot_run_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="in a process of its own: RuntimeError: no forward today"):
        peak_memory(Broken(2, 2), torch.zeros(1, 2))
    unnamed = Broken(2, 2)
    unnamed.activation = lambda x: x
    with pytest.raises(ConfigError, match="Broken, which cannot be pickled"):
        peak_memory(unnamed, torch.zeros(1, 2))
    monkeypatch.setattr("lightning_prune.latency.memory.PROGRAM", Path("nowhere.py"))
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        peak_memory(nn.Linear(2, 2), torch.zeros(1, 2))


def test_it_prints_what_came_on_top() -> None:
    assert str(PeakMemory(3 * MIB, MIB)) == "1.0 MiB on top of 2.0 MiB"
