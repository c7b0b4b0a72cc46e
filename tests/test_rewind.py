"""Rewinding sets learning rates, or weights, back after each firing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.recovery import Rewind
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET


class Cosine(LitNet):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


class Notes(Callback):
    def __init__(self, path: Path | None = None) -> None:
        self.rates: list[float] = []
        self.path = path

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path / f"{trainer.current_epoch}.ckpt")


def rates(*recovery: Rewind, ckpt: Path | None = None, path: Path | None = None) -> list[float]:
    torch.manual_seed(0)
    notes = Notes(path)
    schedule = {"kind": "linear", "begin": 2, "end": 5, "every": 2}  # fires at 2 and 4
    trainer(pruning(recovery=list(recovery), schedule=schedule), notes, max_epochs=6).fit(
        Cosine(), loader(), ckpt_path=ckpt
    )
    return notes.rates


def test_learning_rates_begin_again_after_each_firing(tmp_path: Path) -> None:
    plain = rates()
    assert plain == sorted(plain, reverse=True)
    again = rates(Rewind("lr"), path=tmp_path)
    torch.testing.assert_close(again, [plain[0], plain[1], plain[0], plain[1], plain[0], plain[1]])
    later = rates(Rewind("lr", epoch=1))
    torch.testing.assert_close(later, [plain[0], plain[1], plain[1], plain[2], plain[1], plain[2]])
    torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert rates(Rewind("lr"), ckpt=tmp_path / "2.ckpt") == again[3:]


@pytest.mark.parametrize("compact", ["end", "each"])
def test_weights_begin_again_after_each_firing(compact: str) -> None:
    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch in (1, 2) and batch_idx == 0:
                found.append(pl_module.head.bias.detach().clone())
                states.append(len(trainer.optimizers[0].state))

    found: list[Tensor] = []
    states: list[int] = []
    model = LitNet()
    start = model.head.bias.detach().clone()
    trainer(pruning(recovery=[Rewind("weights")], compact=compact), Look()).fit(model, loader())
    assert torch.equal(found[0], start)
    assert torch.equal(found[1], start)
    assert states == [0, 0]
    assert not torch.equal(model.head.bias, start)


@pytest.mark.parametrize("given", [{"kind": "optimizer"}, {"epoch": -1}, {"epoch": 0.5}])
def test_arguments_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Got {next(iter(given))}="):
        Rewind(**given)


@pytest.mark.parametrize("model", [LitNet, Cosine])
def test_rates_of_averaging_stay(model: type[LitNet]) -> None:
    torch.manual_seed(0)
    notes, schedule = Notes(), {"kind": "linear", "begin": 1, "end": 5}
    averaging = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=3, annealing_epochs=1)
    trainer(pruning(recovery=[Rewind("lr")], schedule=schedule), averaging, notes, max_epochs=7).fit(model(), loader())
    assert notes.rates[:3] == [notes.rates[0]] * 3  # rewound at epochs 1 and 2
    assert notes.rates[-1] == pytest.approx(0.02)
