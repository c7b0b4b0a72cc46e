"""A run that leaves a report, and what the tests read of it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.report import JSON_NAME
from tests.lit import LitNet, loader, pruning, trainer

EPOCHS = 5  # fires at 1 and 2


class Seen(Callback):
    """The validation loss of each epoch, as other callbacks see it, and the widths that it belongs to."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.widths: list[tuple[int, int]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
            self.widths.append((pl_module.conv1.weight.shape[0], pl_module.conv2.weight.shape[0]))


def run(path: Path | None, *extra: Callback, model: LitNet | None = None, ckpt: Any = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    options = {name: given.pop(name) for name in ("logger", "num_sanity_val_steps") if name in given}
    fit = trainer(
        pruning(**{"report": True, **given}), *extra, max_epochs=EPOCHS, path=path, log_every_n_steps=1, **options
    )
    fit.fit(model or LitNet(), loader(), loader(), ckpt_path=ckpt)
    return fit


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    return found


def macs(first: int, second: int) -> int:
    """Of `LitNet` on one image of 6 x 6 pixels."""
    return 36 * 9 * (3 * first + first * second) + 5 * second


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.values: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                self.links.append(value or "")
            else:
                self.values.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def whole_run(path: Path) -> tuple[Path, Seen]:
    """A run that nobody stopped, with a file for each epoch."""
    seen = Seen()
    run(path, seen, ModelCheckpoint(path, filename="{epoch}", save_top_k=-1), num_sanity_val_steps=1)
    return path, seen
