"""Checkpoints that a Trainer writes at any moment of a schedule: read by everybody, small, and the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune import PrunableMixin, describe, load_pruned
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET
IMAGES = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Mixed(PrunableMixin, LitNet):
    """Loads itself."""


class SaveOften(Callback):
    """Saves within and after every epoch, with what the model computes at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, Tensor] = {}

    def _save(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        path = self.folder / f"{trainer.current_epoch}-{when}.ckpt"
        trainer.save_checkpoint(path)
        modes = {part: part.training for part in module.modules()}
        with torch.no_grad():
            self.outputs[path.name] = module.eval()(IMAGES)
        for part, mode in modes.items():
            part.training = mode

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._save(trainer, pl_module, "within")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module, "after")


@pytest.mark.parametrize("compact", ["end", "each", "never"])
def test_a_file_of_any_moment_loads_small(compact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    often = SaveOften(tmp_path)
    schedule = {"kind": "linear", "begin": 1, "end": 3}
    callback = pruning({"macs": 0.4}, schedule=schedule, compact=compact, divisor=1)
    trainer(callback, often, max_epochs=5).fit(Mixed(), loader())
    kept = []
    for name, expected in often.outputs.items():
        torch.load(tmp_path / name, weights_only=True)
        for small in (load_pruned(tmp_path / name, LitNet), Mixed.load_from_checkpoint(tmp_path / name)):
            assert not dynamic_ops(small)
            torch.testing.assert_close(small.eval()(IMAGES), expected, atol=1e-6, rtol=1e-6)
        told = describe(tmp_path / name)
        assert told.entries["kept"] == sum(tensor.numel() for tensor in small.state_dict().values())
        kept.append(told.entries["kept"])
    assert len(kept) == 10
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[2] > kept[-1]  # dense, on the way, done
