"""Prune once by a criterion that watches training batches: with a DataModule, and without training anything."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_prune.callback import PruningCallback
from lightning_prune.cli.models import make
from lightning_prune.errors import ConfigError
from lightning_prune.importance.scorer import window_of
from lightning_prune.mutator import ChannelMutator

__all__ = ["prune_watched_"]

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def prune_watched_(
    model: nn.Module, data: str, data_arguments: Mapping[str, Any] | None, target: Any, **options: Any
) -> ChannelMutator:
    """Let a callback watch some training batches, and prune. Weights and statistics stay what they were.

    Args:
        model: A LightningModule; it becomes dynamic.
        data: Import path of a LightningDataModule, or of a function that makes one.
        data_arguments: Of that.
        target: As of `PruningCallback`.
        **options: Further arguments of `PruningCallback`.

    Returns:
        The mutator that holds its units.

    Raises:
        ConfigError: The model or the data are no modules of Lightning, or there are too few batches.
    """
    if not isinstance(model, LightningModule):
        raise ConfigError(f"Got {type(model).__name__} to train with data; expected a LightningModule.")
    module = make(data, data_arguments)
    if not isinstance(module, LightningDataModule):
        raise ConfigError(f"Got data {data!r}, which gives {type(module).__name__}; expected a LightningDataModule.")
    once = {"kind": "one_shot", "begin": 0, "end": 1}
    callback = PruningCallback(target, schedule=once, compact="never", verbose=False, report=False, **options)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    model.configure_optimizers = lambda: still  # type: ignore[method-assign]  # watching is no training
    model.train()  # as the callback sees it in a training; Lightning leaves modes alone
    batches = window_of(callback.importance) + 1  # it prunes before the one that follows
    with _silence():
        trainer = Trainer(max_epochs=1, limit_train_batches=batches, limit_val_batches=0, callbacks=[callback], **QUIET)
        trainer.fit(model, datamodule=module)
    del model.configure_optimizers
    for name, buffer in model.named_buffers():
        if name in before:
            buffer.copy_(before[name])
    if not callback.is_done or callback.mutator is None:
        raise ConfigError(f"Got data {data!r} of fewer than 2 batches: one to watch, and one to prune before.")
    model.cpu().eval()
    return callback.mutator


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Lightning's advice on workers, and the like, to itself."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
