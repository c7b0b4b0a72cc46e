"""A run with any recovery object that stops in the middle of an epoch ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

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
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.resumable import EPOCHS, ResumableLoader, differences, outcome

pytestmark = QUIET


class Cosine(LitNet):
    """With learning rates that fall, for what rewinds them."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


PARTS: dict[str, Callable[[], Recovery]] = {
    "recalibration": lambda: Recalibration(2),
    "distillation": Distillation,
    "bn scale l1": lambda: BNScaleL1(1e-2, "linear"),
    "group lasso": lambda: GroupLasso(1e-2, "linear"),
    "group norm": lambda: GroupNormSparsity(1e-2, schedule="linear"),
    "growing": lambda: GrowingRegularization(1e-2, every=2),
    "guard": lambda: Guard("val_loss", "min", patience=1, baseline=0.0),  # brings the dense model back
    "rewind lr": lambda: Rewind("lr"),
    "rewind weights": lambda: Rewind("weights"),
}


def fit(path: Path, *recovery: Recovery, ckpt: Path | None = None, seed: int = 0) -> Trainer:
    """Fire at epochs 1 and 2, become small at 3; a file after each of the four steps of an epoch."""
    torch.manual_seed(seed)
    files = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    found = trainer(pruning(recovery=list(recovery)), files, max_epochs=EPOCHS, path=path)
    found.fit(Cosine(), ResumableLoader(), loader(), ckpt_path=ckpt)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run without recovery ends with."""
    return outcome(fit(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS.keys())
def test_it_resumes_in_the_middle(make: Callable[[], Recovery], plain: dict[str, Any], tmp_path: Path) -> None:
    whole = outcome(fit(tmp_path, make()))
    assert differences(whole["weights"], plain["weights"])  # else this tests nothing
    for step in (3, 6, 10, 14):  # before, between and after the firings, and small
        resumed = fit(tmp_path / "resumed", make(), ckpt=tmp_path / f"step={step}.ckpt", seed=1)
        assert not differences(whole, outcome(resumed)), step
