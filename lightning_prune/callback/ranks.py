"""All processes decide alike: scores are averaged, rank 0 plans, and every rank proves that it did the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan

__all__ = ["agree", "check_strategy", "from_rank_zero", "is_sharding", "mean_over_ranks", "rewrap_"]

ResultT = TypeVar("ResultT")


def is_sharding(trainer: Trainer) -> bool:
    """Whether the Trainer's strategy is one that shards parameters."""
    return isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy)


def check_strategy(trainer: Trainer, has_hooks: bool) -> None:
    """Check that parameters may change their shape under the Trainer's strategy.

    Args:
        trainer: Its strategy is looked at.
        has_hooks: Whether the module had the structure hooks before `fit`.

    Raises:
        ConfigError: They may not; or the processes start by spawn or fork, and the main one could not load the result.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if "XLA" in name or not (isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or is_sharding(trainer)):
        raise ConfigError(
            f"Got strategy {name}, which holds parameters in a way that lets none change its shape; expected a single "
            "device or strategy='ddp'. Prune on one device or with ddp first, then load_pruned(path, Model) and train "
            "that with this strategy and without PruningCallback."
        )
    if getattr(strategy, "_layer_sync", None) is not None:
        raise ConfigError(
            "Got sync_batchnorm=True, which replaces the BatchNorm layers after they were converted; expected False. "
            "BatchNorm of each process works with ddp."
        )
    launcher = strategy.launcher
    if launcher is not None and "MultiProcessing" in type(launcher).__name__ and not has_hooks:
        raise ConfigError(
            f"Got strategy {name} that starts its processes by {launcher._start_method!r}: the main process would load "  # type: ignore[attr-defined]
            "the pruned weights into its dense model and fail after training. Use strategy='ddp', or call "
            "lightning_prune.checkpoint.register_structure_hooks(model) before fit."
        )


def mean_over_ranks(trainer: Trainer, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of every rank's scores; the same on all ranks.

    Args:
        trainer: Its strategy reduces.
        scores: Unit name -> float `[C]` on the CPU, the same names and sizes on every rank.
    """
    if trainer.world_size == 1 or not scores:
        return dict(scores)
    flat = torch.cat([row.flatten() for row in scores.values()]).to(trainer.strategy.root_device)
    mean = trainer.strategy.reduce(flat, reduce_op="mean")
    assert isinstance(mean, Tensor), "a tensor reduces to a tensor"
    parts = mean.cpu().split([row.numel() for row in scores.values()])
    return dict(zip(scores, parts, strict=True))


def from_rank_zero(trainer: Trainer, make: Callable[[], ResultT]) -> ResultT:
    """Return what rank 0 makes.

    Args:
        trainer: Its strategy broadcasts.
        make: Makes something that can be pickled; called on rank 0 only.

    Raises:
        PlanError: Rank 0 failed; raised on every rank, so that none waits for ever.
    """
    if trainer.world_size == 1:
        return make()
    message: tuple[ResultT | None, str] = (None, "")
    if trainer.is_global_zero:
        try:
            message = (make(), "")
        except Exception as error:  # told to all ranks, or they would wait
            message = (None, f"{type(error).__name__}: {error}")
    result, failure = trainer.strategy.broadcast(message)
    if failure:
        raise PlanError(f"Rank 0 found no plan. {failure}")
    return cast(ResultT, result)


def agree(trainer: Trainer, mutator: ChannelMutator, plan: KeepPlan) -> None:
    """Apply a plan on every rank, and check that all of them end with the same structure.

    Args:
        trainer: Its strategy gathers.
        mutator: Applies the plan.
        plan: The same on every rank, as far as this one knows.

    Raises:
        PlanError: A rank failed, or has another structure; raised on every rank.
    """
    if trainer.world_size == 1:
        mutator.apply(plan)
        return
    failure: Exception | None = None
    digest = ""
    try:
        mutator.apply(plan)
        kept = sorted(mutator.current_plan().kept.items())
        digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    except Exception as error:  # raised below, when all ranks know
        failure = error
    first = trainer.strategy.broadcast(digest)
    is_same = trainer.strategy.reduce_boolean_decision(failure is None and digest == first, all=True)
    if failure is not None:
        raise failure
    if not is_same:
        where = f"rank 0 and rank {trainer.global_rank}" if digest != first else "rank 0 and another rank"
        raise PlanError(
            f"Got different structures on {where}, or a failure on one; expected the same on all. Do the ranks start "
            "from the same checkpoint, with the same arguments?"
        )


def rewrap_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Wrap the module again after parameters have changed their shape: reducers hold on to the old ones."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.model is not pl_module:
        strategy.model = pl_module
        strategy.configure_ddp()
