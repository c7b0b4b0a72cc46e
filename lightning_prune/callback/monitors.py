"""Other callbacks and a model that changes: what they remember of a bigger one must not win over a smaller one."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary

from lightning_prune.errors import ConfigError
from lightning_prune.schedule import ResolvedSchedule

__all__ = ["hold_until", "refresh_summary", "reset_monitors_", "spare_"]


def hold_until(trainer: Trainer, schedule: ResolvedSchedule, grace_epochs: int = 0) -> None:
    """Let nothing end the fit before the last firing has happened and its epoch or step is over.

    Args:
        trainer: Its lower limit is raised.
        schedule: The firings.
        grace_epochs: So many epochs more.

    Raises:
        ConfigError: There are some, and the schedule counts steps.
    """
    if schedule.unit == "epoch":
        trainer.fit_loop.min_epochs = max(trainer.fit_loop.min_epochs or 0, schedule.last + 1 + grace_epochs)
    elif grace_epochs:
        raise ConfigError(
            f"Got grace_epochs={grace_epochs} with a schedule that counts steps, as the run has no max_epochs; "
            "expected 0. Set Trainer(max_epochs=...), or a schedule that ends later."
        )
    else:
        trainer.fit_loop.epoch_loop.min_steps = max(trainer.fit_loop.epoch_loop.min_steps or 0, schedule.last + 1)
        trainer.fit_loop.min_epochs = max(trainer.fit_loop.min_epochs or 0, 1)  # else a stop does not ask min_steps


def reset_monitors_(trainer: Trainer) -> None:
    """Forget the best so far: it belongs to another structure. Files that were saved stay on disk.

    Args:
        trainer: Its `ModelCheckpoint`s with a monitor and its `EarlyStopping`s start again.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            _reset_checkpoint(callback)
        elif isinstance(callback, EarlyStopping):
            _reset_stopping(trainer, callback)


def _reset_checkpoint(callback: ModelCheckpoint) -> None:
    callback.best_k_models = {}
    callback.best_model_path = callback.kth_best_model_path = ""
    callback.best_model_score = callback.current_score = None
    callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)


def spare_(trainer: Trainer, schedule: ResolvedSchedule, grace_epochs: int) -> None:
    """Let `EarlyStopping` count no epoch of the grace: what it counted until now is forgotten at the start of each.

    Args:
        trainer: At the start of an epoch.
        schedule: The grace begins with the epoch of its last firing.
        grace_epochs: So many epochs; best scores stay.
    """
    if schedule.unit == "epoch" and schedule.last < trainer.current_epoch <= schedule.last + grace_epochs:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, EarlyStopping):
                _count_anew(trainer, callback)


def _reset_stopping(trainer: Trainer, callback: EarlyStopping) -> None:
    worst = torch.tensor(torch.inf)
    callback.best_score = worst if callback.monitor_op == torch.lt else -worst
    _count_anew(trainer, callback)


def _count_anew(trainer: Trainer, callback: EarlyStopping) -> None:
    if callback.wait_count >= callback.patience:
        trainer.should_stop = False  # asked for by this callback, which was not to be asked
        callback.stopped_epoch = 0
    callback.wait_count = 0


def refresh_summary(trainer: Trainer, pl_module: LightningModule) -> None:
    """Print the summary of the module anew, if the Trainer printed one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, ModelSummary):
            callback.on_fit_start(trainer, pl_module)
