"""Strategies that shard parameters: shapes are fixed afterwards, so that all pruning comes before, in `setup`.

At that time nobody knows which checkpoint will be loaded. A run that resumes finds its structure again from the same
initial weights; where it finds another one, the checkpoint is refused.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_prune.callback.collect import Collector
from lightning_prune.callback.timed import Timing
from lightning_prune.checkpoint import KEY, structure_of
from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.schedule import ResolvedSchedule

__all__ = ["check_one_shot", "refuse_other_structures"]


def check_one_shot(
    trainer: Trainer, schedule: ResolvedSchedule, compact: str, collector: Collector, timing: Timing
) -> None:
    """Check that all pruning can happen before the parameters are sharded.

    Args:
        trainer: Its strategy shards.
        schedule: The firings.
        compact: When the model becomes small.
        collector: Says whether scores need training batches.
        timing: Says whether plans need a latency, which is measured when the model is on its device.

    Raises:
        ConfigError: It cannot, with what can.
    """
    why = None
    if schedule.begin > 0 or schedule.num_firings > 1:
        why = f"a schedule that fires {schedule.num_firings} times from {schedule.unit} {schedule.begin} on"
    elif collector.window:
        why = f"importance={collector.importance}, which watches training batches"
    elif timing.is_needed:
        why = "a latency, which is measured on the device of training"
    elif compact == "never":
        why = "compact='never'"
    if why is not None:
        raise ConfigError(
            f"Got strategy {type(trainer.strategy).__name__} with {why}; parameters that are sharded cannot change "
            "their shape. Expected schedule='one_shot' and an importance of weights alone, such as 'l1': the model is "
            "then pruned in setup. Or prune on one device or with strategy='ddp' first, then load_pruned(path, Model) "
            "and train that without PruningCallback."
        )


def refuse_other_structures(trainer: Trainer) -> None:
    """Let the Trainer raise `CheckpointError` for a checkpoint of another structure; again, it changes nothing.

    Args:
        trainer: Its strategy shards, and reads checkpoints itself.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy.load_checkpoint, partial):
        strategy.load_checkpoint = partial(_load, trainer, strategy.load_checkpoint)


def _load(trainer: Trainer, load: Any, path: Any, *args: Any, weights_only: bool | None = None, **kwargs: Any) -> Any:
    """Look at the structure first: torch may copy a part of a larger tensor, and say nothing."""
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    if file.is_file():
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=bool(weights_only))
        if _kept(checkpoint.get(KEY, {"tensors": {}})) != _kept(structure_of(trainer.lightning_module)):
            raise CheckpointError(
                f"Got the checkpoint {path}, of another structure than the one that was found before the parameters "
                "were sharded. Build the model from the initial weights of the saved run, with seed_everything(seed), "
                "and give PruningCallback the same arguments; or begin a new run with fit(load_pruned(path, Model)) "
                "without it."
            )
    return load(path, *args, weights_only=weights_only, **kwargs)


def _kept(structure: dict[str, Any]) -> dict[tuple[str, str], list[int]]:
    """Return tensor and axis -> kept indices, of what is cut."""
    tensors = structure["tensors"].items()
    return {(name, dim): kept.tolist() for name, entry in tensors for dim, kept in entry["kept"].items()}
