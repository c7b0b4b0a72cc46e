"""Two processes recover as one does on all the data, and hold the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.recovery import (
    BNScaleL1,
    Distillation,
    GroupLasso,
    GroupNormSparsity,
    GrowingRegularization,
    Guard,
    Recalibration,
    Rewind,
)
from tests.lit import QUIET, LitNet, data, pruning, trainer
from tests.processes import two_processes
from tests.watching import Smooth

pytestmark = QUIET


class Watched(Smooth):
    """Logs a metric that each process sees otherwise; their mean is lost after the second firing."""

    def validation_step(self, batch: Any, index: int) -> None:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        value = (0.8, 0.8, 0.3, 0.3, 0.9)[self.trainer.current_epoch]
        spread = 0.3 if torch.distributed.is_initialized() else 0.0  # rank 1 alone would call 0.6 good
        self.log("val_acc", value + (spread if rank else -spread))


class Statistics(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: LitNet, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and isinstance(pl_module.norm, torch.nn.BatchNorm2d):
            self.seen.append(pl_module.norm.running_mean.clone())


def fitted(model: LitNet, devices: int, **given: Any) -> dict[str, Any]:
    """Return weights and what else the processes must agree on; together they see 8 images at each step."""
    statistics = Statistics()
    callback = pruning(**given)
    options: Any = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    fit = trainer(callback, statistics, max_epochs=5, precision="64-true", use_distributed_sampler=False, **options)
    turns: Any = DistributedSampler(data(), devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    loaders = [DataLoader(data(), 8 // devices, sampler=turns) for _ in range(2)]
    fit.fit(model, *loaders)
    kept = {unit: indices.tolist() for unit, indices in callback.state_dict()["kept"].items()}
    return {
        "weights": dict(model.named_parameters()),
        "kept": kept,
        "statistics": statistics.seen,
        "said": callback._recovery.reports(),
    }


def guarded(devices: int) -> dict[str, Any]:
    """Every object but recalibration, on a model whose examples do not see one another."""
    torch.manual_seed(0)
    parts: list[Any] = [
        Distillation(alpha=0.3),
        BNScaleL1(1e-3),
        GroupLasso(1e-3),
        GroupNormSparsity(1e-3),
        GrowingRegularization(1e-2, every=1),
        Guard("val_acc", tolerance=0.1, patience=1),
        Rewind("lr"),
    ]
    return fitted(Watched("sgd"), devices, recovery=parts, schedule={"kind": "linear", "begin": 1, "end": 4})


def recalibrated(devices: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return fitted(LitNet("sgd"), devices, recovery=[Recalibration(2)])


SCRIPT = """
import os
import torch
from tests.test_recovery_ddp import guarded, recalibrated

torch.set_num_threads(1)
torch.save([guarded(2), recalibrated(2)], f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
"""


def test_two_processes_recover_alike(tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert one["kept"] == other["kept"]
        assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    alone = guarded(1)
    assert alone["kept"] == first[0]["kept"]
    assert "weights of epoch 1 are restored" in alone["said"][0]
    assert alone["said"] == first[0]["said"] == second[0]["said"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first[0]["weights"][name], value, rtol=1e-6, atol=1e-9)
    seen = list(zip(first[1]["statistics"], second[1]["statistics"], strict=True))
    assert [torch.equal(one, other) for one, other in seen[1:3]] == [True, True]  # just recalibrated
    assert F.mse_loss(seen[1][0], torch.zeros_like(seen[1][0])) > 0
