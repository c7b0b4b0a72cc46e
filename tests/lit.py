"""A tiny LightningModule, its data, and a quiet Trainer for the tests of the callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import PruningCallback
from lightning_prune.ops import dynamic_ops

QUIET = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*does not have many workers.*",  # the data are in memory
        ".*LeafSpec.*",  # Lightning 2.6 with torch 2.13
        ".*exists and is not empty.*",  # a resumed run writes where the first one did
        "(?s).*The dirpath has changed from.*",  # or it does not
        ".*you defined a `validation_step` but have no `val_dataloader`.*",
        ".*Detected call of `lr_scheduler.step.*",
    )
]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=1e-1),
}


class LitNet(LightningModule):
    """Two convolutions with a norm between, and a head; 16 and 32 channels to prune."""

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = optimizer
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.conv1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def data(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(24, 3, 6, 6, generator=generator)
    return TensorDataset(images, torch.randint(5, (24,), generator=generator))


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(data(), 8, shuffle=shuffle)


def trainer(*callbacks: Callback, max_epochs: int = 4, path: Path | None = None, **arguments: Any) -> Trainer:
    """A Trainer that prints nothing; with a path it saves what its checkpoint callbacks say."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": path is not None,
        "default_root_dir": path,
    }
    return Trainer(callbacks=list(callbacks), max_epochs=max_epochs, **{**quiet, **arguments})


def pruning(target: Any = None, **arguments: Any) -> PruningCallback:
    """A callback that fires at epochs 1 and 2, in steps of two channels, and writes no report."""
    given: dict[str, Any] = {"schedule": {"kind": "linear", "begin": 1, "end": 3}, "divisor": 2, "verbose": False,
                             "report": False}  # fmt: skip
    return PruningCallback({"macs": 0.5} if target is None else target, **{**given, **arguments})


def widths(model: LitNet) -> tuple[int, int]:
    return model.conv1.out_channels, model.conv2.out_channels


class Record(Callback):
    """Notes what the model is at the end of every epoch."""

    def __init__(self) -> None:
        self.dynamic: list[bool] = []
        self.widths: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.dynamic.append(bool(dynamic_ops(pl_module)))
        self.widths.append(widths(pl_module))
