"""Strategies that shard parameters: shapes are fixed afterwards, so that all pruning comes before, in `setup`."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_prune.callback.collect import Collector
from lightning_prune.callback.timed import Timing
from lightning_prune.errors import ConfigError
from lightning_prune.schedule import ResolvedSchedule

__all__ = ["check_one_shot"]


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
