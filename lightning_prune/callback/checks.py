"""What hooks refuse before training: other instances, layers that came too late, optimizers that cannot shrink."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS

from lightning_prune.errors import ConfigError
from lightning_prune.schedule import ResolvedSchedule

__all__ = ["check_alone", "check_no_new_parameters", "check_optimizers", "warn_unmet"]


def check_alone(trainer: Trainer, kind: type[Callback]) -> None:
    """Check that the Trainer has one callback of a kind.

    Raises:
        ConfigError: It has two.
    """
    if sum(isinstance(other, kind) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]  # a connector's
        raise ConfigError("Got two PruningCallbacks; one holds the structure of a model. Merge their targets.")


def check_no_new_parameters(pl_module: LightningModule, known: frozenset[str]) -> None:
    """Check that no layer was made after the trace.

    Args:
        pl_module: Its parameters of now.
        known: Names of its parameters at the trace.

    Raises:
        ConfigError: One was.
    """
    new = sorted({name for name, _ in pl_module.named_parameters()} - known)
    if new:
        raise ConfigError(
            f"Got parameters that appeared in LightningModule.setup: {', '.join(new[:4])}; they were not traced. "
            "Make layers in __init__ or in configure_model."
        )


def check_optimizers(trainer: Trainer, compact: str) -> None:
    """Check that the state of every optimizer can shrink, if it has to.

    Raises:
        ConfigError: One is LBFGS.
    """
    if compact != "never" and any(isinstance(o, LBFGS) for o in trainer.optimizers):
        raise ConfigError("Got LBFGS, whose state cannot shrink. Set compact='never', or use another optimizer.")


def warn_unmet(schedule: ResolvedSchedule, now: int) -> None:
    """Warn that training ended before the target was met.

    Args:
        schedule: With firings that did not happen.
        now: Epoch or step, as it counts.
    """
    rank_zero_warn(
        f"Training ended at {schedule.unit} {now}, before the last firing of the pruning schedule at {schedule.last}: "
        "the target is not met. Go on with fit(ckpt_path=...), or export_pruned(model) as it is."
    )
