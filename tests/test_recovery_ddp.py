"""Two processes recover as one does on all the data, and hold the same model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
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
    Recovery,
    Rewind,
)
from tests.lit import QUIET, LitNet, data, pruning, trainer
from tests.processes import two_processes
from tests.watching import Smooth

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")]


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


class Still(LitNet):
    """Its batch norm has a scale that learns, and statistics that do not; learning rates fall."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.eval()  # Lightning trains in the modes that it finds

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)]


def alone(devices: int, *recovery: Recovery) -> dict[str, Any]:
    torch.manual_seed(0)
    return fitted(Still(), devices, recovery=list(recovery))


APART: dict[str, Callable[[], Recovery]] = {
    "scales": lambda: BNScaleL1(1e-2),
    "lr": lambda: Rewind("lr"),
    "weights": lambda: Rewind("weights"),
}


def recalibrated(devices: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return fitted(LitNet("sgd"), devices, recovery=[Recalibration(2)])


SCRIPT = """
import os
import torch
from tests.test_recovery_ddp import APART, alone, guarded, recalibrated

torch.set_num_threads(1)
found = [guarded(2), recalibrated(2), *(alone(2, make()) for make in APART.values())]
torch.save(found, f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What both processes end with: guarded, recalibrated, and with each of `APART`."""
    path = tmp_path_factory.mktemp("ranks")
    result = two_processes(SCRIPT, path)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


def test_two_processes_hold_the_same_model(ranks: list[list[dict[str, Any]]]) -> None:
    for one, other in zip(*ranks, strict=True):
        assert one["kept"] == other["kept"]
        assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def test_two_processes_recover_as_one(ranks: list[list[dict[str, Any]]]) -> None:
    first, second = (rank[0] for rank in ranks)
    one = guarded(1)
    assert one["kept"] == first["kept"]
    assert "weights of epoch 1 are restored" in one["said"][0]
    assert one["said"] == first["said"] == second["said"]
    assert_close(one["weights"], first["weights"])


@pytest.mark.parametrize("name", APART)
def test_one_object_recovers_alike(name: str, ranks: list[list[dict[str, Any]]]) -> None:
    one = alone(1, APART[name]())
    assert_close(one["weights"], ranks[0][2 + list(APART).index(name)]["weights"])
    without = alone(1)["weights"]
    assert any(value.shape != without[n].shape or not value.allclose(without[n]) for n, value in one["weights"].items())


def test_statistics_are_those_of_both_processes(ranks: list[list[dict[str, Any]]]) -> None:
    seen = list(zip(*(rank[1]["statistics"] for rank in ranks), strict=True))
    assert [torch.equal(one, other) for one, other in seen[1:3]] == [True, True]  # just recalibrated
    assert F.mse_loss(seen[1][0], torch.zeros_like(seen[1][0])) > 0
