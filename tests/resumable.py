"""Runs that stop at any step: data that resumes, a logger that forgets nothing, and what a run ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from lightning_prune import PruningCallback
from tests.lit import LitNet, data, loader, pruning, trainer

EPOCHS = 5
BATCHES = 4


class ResumableLoader:
    """Batches in an order that belongs to the epoch, and the place in it as state: in mid-epoch Lightning has none."""

    def __init__(self, batch_size: int = 6) -> None:
        self.dataset, self.batch_size = data(), batch_size
        self.epoch = self.position = 0
        self.sampler = self  # where Lightning looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch))
        while self.position < len(self):
            chosen = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            self.position += 1
            yield list(self.dataset[chosen])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class LineLogger(Logger):
    """One line of JSON per call, on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    name = "lines"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to remember."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class Scores(Callback):
    """Writes the scores of every firing beside the metrics."""

    def __init__(self, logger: LineLogger, callback: PruningCallback) -> None:
        scores = callback._collector.scores

        def written(*args: Any, **more: Any) -> dict[str, Tensor]:
            found = scores(*args, **more)
            line = {f"score {name}": float(row.double().sum()) for name, row in found.items()}
            logger.log_metrics(line, step=-1 - callback._state.last)
            return found

        callback._collector.scores = written  # type: ignore[method-assign]


def fit(path: Path, *, is_pruned: bool = True, ckpt: str | Path | None = "last", **arguments: Any) -> Trainer:
    """Fit with a file after every step, from the last one if there is one.

    Args:
        path: Folder of the run; files of an earlier one in it are gone on from.
        is_pruned: Whether there is a PruningCallback.
        ckpt: As `Trainer.fit` takes it.
        **arguments: Of the callback.
    """
    torch.manual_seed(0)
    path.mkdir(exist_ok=True)
    logger = LineLogger(path / "lines.jsonl")
    callbacks: list[Callback] = []
    if is_pruned:
        callback = pruning(**{"importance": {"name": "taylor", "batches": 2}, **arguments})
        callbacks = [callback, Scores(logger, callback)]
    files = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max",
                            save_last=True, save_on_train_epoch_end=False)  # fmt: skip
    found = trainer(*callbacks, files, max_epochs=EPOCHS, path=path, logger=logger, log_every_n_steps=1)
    found.fit(LitNet(), ResumableLoader(), loader(), ckpt_path=ckpt)
    return found


def outcome(run: Trainer) -> dict[str, Any]:
    """Return all that a run ends with."""
    module: LightningModule = run.lightning_module
    pruned = [c.state_dict() for c in run.callbacks if isinstance(c, PruningCallback)]  # type: ignore[attr-defined]
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "pruning": pruned,
        "metrics": dict(run.callback_metrics),
        "steps": run.global_step,
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two outcomes are not equal bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        lost = [f"{where}/{key} is on one side only" for key in one.keys() ^ other.keys()]
        return lost + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for k, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{where}/{k}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if type(one) is type(other) and one == other else [where]


def lines_of(path: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return what was logged, by step and kind, and what was logged twice and not alike."""
    found: dict[str, dict[str, float]] = {}
    problems = []
    text = (path / "lines.jsonl").read_text(encoding="utf-8")
    for line in filter(None, text[: text.rfind("\n") + 1].splitlines()):
        entry = json.loads(line)
        key = f"{' '.join(sorted(set(entry) - {'epoch', 'step'}))} at {entry.pop('step')}"
        if found.setdefault(key, entry) != entry:
            problems.append(f"logged {found[key]} and then {entry}: {key}")
    return found, problems
