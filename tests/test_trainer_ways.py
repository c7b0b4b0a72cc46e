"""Ways to run a Trainer and callbacks of Lightning that change what trains, while a model is pruned."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callback.figure import NAME
from lightning_prune.callback.waiting import waiting
from lightning_prune.importance import l1
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer
from tests.test_resume import assert_same

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*overfit_batches.*")]


class Stream(IterableDataset[Any]):
    """As the data of the tests, without a length."""

    def __iter__(self) -> Any:
        return iter([data()[k] for k in range(24)])


# Freezing


class Backbone(LitNet):
    """Its convolutions are frozen at first, and have an optimizer group of their own later."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.conv1, self.norm, nn.ReLU(), self.conv2)
        del self.conv1, self.norm, self.conv2

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x).mean((2, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


class Finetuning(BackboneFinetuning):
    """Lightning's own freezes the backbone again when a run resumes after it was unfrozen, with or without pruning."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch > self.unfreeze_backbone_at_epoch:
            self.make_trainable(pl_module.backbone)


def finetune(path: Path, unfreeze: int, ckpt: Path | None = None) -> Any:
    torch.manual_seed(0)
    freezing = Finetuning(unfreeze, lambda epoch: 2.0, backbone_initial_lr=1e-3, train_bn=False)
    files = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    run = trainer(pruning(), freezing, files, max_epochs=6, path=path)
    run.fit(Backbone(), loader(), ckpt_path=ckpt)
    return run


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("unfreeze", [2, 4], ids=["unfrozen while it shrinks", "unfrozen when it is small"])
def test_a_frozen_backbone_is_pruned_unfrozen_and_resumed(unfreeze: int, epoch: int, tmp_path: Path) -> None:
    whole = finetune(tmp_path / "whole", unfreeze)
    model = whole.lightning_module
    assert not dynamic_ops(model)
    assert whole.callback_metrics["pruning/macs"] <= 0.5
    optimizer = whole.optimizers[0]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    assert_same(whole, finetune(tmp_path / "again", unfreeze, tmp_path / "whole" / f"epoch={epoch}.ckpt"))


# Finders


class Sized(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(data(), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(data(), self.batch_size)


def test_the_batch_size_finder_leaves_schedule_and_masks_alone(tmp_path: Path) -> None:
    fired: list[int] = []
    run = trainer(path=tmp_path)

    def score(unit: Any) -> Tensor:
        fired.append(run.current_epoch)
        return l1(unit)

    run.callbacks += [pruning(importance=score), BatchSizeFinder(max_trials=2, steps_per_trial=5)]
    model, batches = LitNet(), Sized()
    run.fit(model, datamodule=batches)
    assert batches.batch_size > 2
    assert sorted(fired) == [1, 1, 2, 2]
    assert not dynamic_ops(model)
    assert run.callback_metrics["pruning/macs"] <= 0.5


# Lengths


@pytest.mark.parametrize("importance", ["l1", "taylor"])
@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        pytest.param({"max_epochs": 3}, DataLoader(Stream(), 8), id="iterable, epochs"),
        pytest.param({"max_epochs": -1, "max_steps": 9}, DataLoader(Stream(), 8), id="iterable, steps"),
        pytest.param({"max_epochs": -1, "max_steps": 9}, loader(), id="steps"),
        pytest.param({"max_epochs": -1, "max_steps": 2}, loader(), id="fewer steps than an epoch"),
        pytest.param({"max_epochs": 3, "limit_train_batches": 2}, DataLoader(Stream(), 8), id="iterable, limited"),
        pytest.param({"max_epochs": 3, "limit_train_batches": 0.5}, loader(), id="limited by a fraction"),
        pytest.param({"max_epochs": 3, "limit_val_batches": 0}, loader(), id="no validation"),
        pytest.param({"max_epochs": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}, loader(), id="val"),
        pytest.param({"max_epochs": 3, "check_val_every_n_epoch": 2}, loader(), id="val every other epoch"),
        pytest.param({"max_epochs": 3, "overfit_batches": 1}, loader(), id="overfit"),
        pytest.param({"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, loader(), id="reload"),
        pytest.param({"fast_dev_run": 2}, loader(), id="fast_dev_run"),
    ],
)
def test_the_target_is_met(arguments: dict[str, Any], batches: Any, importance: str) -> None:
    model = LitNet()
    callback = pruning(
        schedule="cubic", importance={"name": importance, **({"batches": 2} if importance == "taylor" else {})}
    )
    trainer(callback, **{"num_sanity_val_steps": 1, **arguments}).fit(model, batches, loader())
    assert callback.is_done
    assert not dynamic_ops(model)
    assert model.conv1.out_channels < 16


# What a person sees


class Board(Logger):
    """Takes figures, as TensorBoard does."""

    name, version = "board", 0

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, Any, int]] = []
        self.experiment = self

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.figures.append((tag, figure, global_step))

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Only figures count here."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to remember."""


def test_a_figure_shows_the_kept_channels_after_each_firing() -> None:
    board, model = Board(), LitNet()
    trainer(pruning(), logger=board, log_every_n_steps=1).fit(model, loader())
    assert [(tag, step) for tag, _, step in board.figures] == [(NAME, 3), (NAME, 6)]
    (axes,) = board.figures[-1][1].axes
    dense, kept = ([int(bar.get_width()) for bar in bars] for bars in axes.containers)
    assert dense == [32, 16]
    assert kept == [model.conv2.out_channels, model.conv1.out_channels]


def test_tensorboard_has_the_figure(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    trainer(pruning(), logger=board, log_every_n_steps=1).fit(LitNet(), loader())
    events = EventAccumulator(board.log_dir, {"images": 0})
    events.Reload()
    assert [(image.step, image.width) for image in events.Images(NAME)] == [(3, 800), (6, 800)]
    assert "pruning/macs" in events.Tags()["scalars"]


def test_a_silent_callback_prints_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    said = {}
    for verbose in (True, False):
        caplog.clear()
        trainer(pruning(verbose=verbose, importance="taylor")).fit(LitNet(), loader())
        printed = capsys.readouterr()
        lines = [record.message for record in caplog.records if record.name.startswith("lightning_prune")]
        ours = [record.message for record in caplog.records if "Pruned" in record.message]
        said[verbose] = (bool(printed.out), bool(ours or lines))
    assert said == {True: (True, True), False: (False, False)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "shown", "said"),
    [(0.4, True, True), (0.0, True, False), (0.4, False, False)],
    ids=["long", "quick", "silent"],
)
def test_a_bar_is_shown_while_something_takes_long(seconds: float, shown: bool, said: bool) -> None:
    written = Terminal()
    console = Console(file=written, force_terminal=True)
    with waiting("Analyzing", shown=shown, after_s=0.1, console=console):
        time.sleep(seconds)
    assert ("Analyzing" in written.getvalue()) is said


@pytest.mark.parametrize("verbose", [True, False])
def test_the_analysis_is_waited_for(verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextmanager
    def recorded(words: str, *, shown: bool) -> Iterator[None]:
        asked.append((words, shown))
        yield

    monkeypatch.setattr("lightning_prune.callback.convert.waiting", recorded)
    trainer(pruning(verbose=verbose)).fit(LitNet(), loader())
    assert asked == [("Analyzing the model", verbose)]
