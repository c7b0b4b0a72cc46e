"""`RecoveryCallback`: Lightning's hooks -> the moments of recovery objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callback.feed import forward_on, own_batches
from lightning_prune.callback.kept import kept_copy, restore_
from lightning_prune.callback.ranks import is_sharding
from lightning_prune.errors import ConfigError
from lightning_prune.recovery import Guard, Recovery, Run

if TYPE_CHECKING:
    from lightning_prune.callback.callback import PruningCallback

__all__ = ["RecoveryCallback"]


class RecoveryCallback(Callback):
    """Asks recovery objects at the moments of a run. `PruningCallback(recovery=[...])` puts one beside itself.

    Alone it is for runs that do not prune: a model that was pruned before, or one that shall become easier to prune.

    Args:
        recovery: The objects, asked in this order; one of a kind.

    Raises:
        ConfigError: No list, something in it that is no `Recovery`, or two of a kind.

    Example:
        >>> from lightning_prune.recovery import Recalibration
        >>> RecoveryCallback([Recalibration(batches=8)]).recovery[0].batches
        8
    """

    def __init__(self, recovery: Sequence[Recovery]) -> None:
        super().__init__()
        if isinstance(recovery, Recovery):
            raise ConfigError(f"Got recovery={recovery!r}; expected a list: recovery=[{type(recovery).__name__}(...)].")
        self.recovery = tuple(recovery)
        for part in self.recovery:
            if not isinstance(part, Recovery):
                raise ConfigError(
                    f"Got {part!r} in recovery=; expected objects of lightning_prune.recovery, such as Recalibration()."
                )
        names = [type(part).__name__ for part in self.recovery]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"Got two {name} objects in recovery=; one is enough.")
        self._pruning: PruningCallback | None = None
        self._module: LightningModule | None = None

    # Beside a PruningCallback

    def join(self, trainer: Trainer, pl_module: LightningModule, pruning: PruningCallback) -> None:
        """Stand behind a PruningCallback in the list of the Trainer, and look at the module before it is converted.

        Raises:
            ConfigError: The strategy shards parameters; or there is another `RecoveryCallback`.
        """
        if not self.recovery:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if any(isinstance(other, RecoveryCallback) and other is not self for other in callbacks):
            raise ConfigError("Got a RecoveryCallback beside PruningCallback(recovery=...); give all objects to one.")
        if self not in callbacks:
            callbacks.insert(callbacks.index(pruning) + 1, self)
        self._pruning = pruning
        if trainer.state.fn == "fit":
            self._setup(trainer, pl_module)

    def begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that an epoch begins, before anything fires in it."""
        for part in self.recovery:
            part.begin_epoch(self._run(trainer, pl_module))

    def is_ready(self) -> bool:
        """Return whether channels may be removed now."""
        return all(part.is_ready() for part in self.recovery)

    def before_firing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that channels will be removed."""
        for part in self.recovery:
            part.before_firing(self._run(trainer, pl_module))
        self._keep_if_good(trainer, pl_module)

    def after_firing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that channels have been removed."""
        for part in self.recovery:
            part.after_firing(self._run(trainer, pl_module))

    def restore_if_failed(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Bring back what a guard has kept, if it asks for that; return whether it did."""
        pruning = self._pruning
        for guard in self._guards:
            if guard.has_failed and guard.good is not None and pruning is not None and pruning.mutator is not None:
                restore_(trainer, pl_module, pruning.mutator, guard.good, pruning._conversion.home)
                guard.end()
                rank_zero_info(guard.report)
                return True
        return False

    def reports(self) -> list[str]:
        """Return what there is to say at the end of a run."""
        return [guard.report for guard in self._guards if guard.is_over]

    @property
    def _guards(self) -> list[Guard]:
        return [part for part in self.recovery if isinstance(part, Guard)]

    def _keep_if_good(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for guard in self._guards:
            if guard.wants_copy and self._pruning is not None and self._pruning.mutator is not None:
                guard.keep(kept_copy(trainer, pl_module, self._pruning.mutator), trainer.current_epoch)

    def _setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharding(trainer):
            raise ConfigError(
                f"Got recovery= with strategy {type(trainer.strategy).__name__}, which shards parameters; expected a "
                "single device or strategy='ddp'."
            )
        is_another = self._module is not None and self._module is not pl_module
        self._module = pl_module
        for part in self.recovery:
            if is_another:
                part.forget()
            part.setup(self._run(trainer, pl_module))

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Run:
        pruning = self._pruning
        share = trainer.current_epoch / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
        return Run(
            trainer,
            pl_module,
            None if pruning is None else pruning.mutator,
            share if pruning is None else _share_of_schedule(trainer, pruning),
            pruning is not None and pruning.is_done,
            partial(own_batches, trainer, pl_module, seed=trainer.global_step),
            partial(forward_on, trainer, pl_module),
            partial(_mean, trainer),
        )

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the module; beside a PruningCallback that has happened already."""
        if stage != "fit" or self._pruning is not None:
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        self._setup(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        for part in self.recovery:
            part.begin(self._run(trainer, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch; a PruningCallback has said so already, before it fired."""
        if self._pruning is None:
            self.begin_epoch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prepare for a batch."""
        for part in self.recovery:
            part.begin_batch(self._run(trainer, pl_module), batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Change the loss."""
        for part in self.recovery:
            part.before_backward(self._run(trainer, pl_module), loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Change gradients; an importance has seen those of the loss alone."""
        for part in self.recovery:
            part.before_step(self._run(trainer, pl_module), optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a batch."""
        for part in self.recovery:
            part.end_batch(self._run(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at metrics, before the checkpoint that has them is written."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            for part in self.recovery:
                part.after_validation(self._run(trainer, pl_module))
            self._keep_if_good(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at metrics."""
        for part in self.recovery:
            part.after_epoch(self._run(trainer, pl_module))
        self._keep_if_good(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go."""
        for part in self.recovery:
            part.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go: `teardown` does not come after an exception."""
        for part in self.recovery:
            part.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: name of a class -> its state."""
        states = {type(part).__name__: part.state_dict() for part in self.recovery}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; objects that it does not know begin anew."""
        for part in self.recovery:
            if type(part).__name__ in state_dict:
                part.load_state_dict(state_dict[type(part).__name__])


def _share_of_schedule(trainer: Trainer, pruning: PruningCallback) -> float:
    """Return how far the run is on its way to the last firing, in [0, 1]."""
    return min(1.0, pruning._now(trainer) / max(pruning._schedule.last, 1))


def _mean(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean over all processes; the tensor itself stays."""
    if trainer.world_size == 1:
        return tensor
    mean = trainer.strategy.reduce(tensor.clone(), reduce_op="mean")
    assert isinstance(mean, Tensor), "a tensor reduces to a tensor"
    return mean
