"""`Recovery`: an object that a run asks at its moments; `Run`: what it is told of the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_prune.mutator import ChannelMutator

__all__ = ["Recovery", "Run"]


@dataclass(frozen=True)
class Run:
    """What a recovery object is told of the run that asks it.

    Args:
        trainer: Lightning's.
        module: That the trainer fits.
        mutator: Of what is pruned; None where nothing is, or before it is known.
        share: Of the way to the last firing, in [0, 1]; without a schedule of the whole fit.
        is_done: Whether no firing follows.
        batches: At most so many training batches, on the device, of an iterator of their own: neither the random state
            nor the data order of the training changes.
        forward: Runs the module on such a batch, with what its `forward` takes, in the precision of the training.
        mean: The mean of a float tensor over all processes.
    """

    trainer: Trainer
    module: LightningModule
    mutator: ChannelMutator | None
    share: float
    is_done: bool
    batches: Callable[[int], Iterator[Any]]
    forward: Callable[[Any], Any]
    mean: Callable[[Tensor], Tensor]


class Recovery:
    """Something that helps accuracy come back. Override the moments it needs; by default nothing happens at them."""

    def arguments(self) -> dict[str, Any]:
        """Return what it was made with, by name: a run that resumes must have the same.

        By default the attributes that are named as parameters of the constructor.
        """
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())
        return f"{type(self).__name__}({given})"

    def forget(self) -> None:
        """Begin with another model: forget what was learned of the last one."""

    def setup(self, run: Run) -> None:
        """Look at the module as it was built: dense, before it is converted and before a checkpoint is loaded."""

    def begin(self, run: Run) -> None:
        """Prepare when devices, weights and optimizers are there, but the state of optimizers is not loaded yet."""

    def begin_epoch(self, run: Run) -> None:
        """Look at the start of an epoch of training, before anything fires in it."""

    def is_ready(self) -> bool:
        """Return whether channels may be removed now; a firing that is due waits until all objects say so."""
        return True

    def before_firing(self, run: Run) -> None:
        """Look before channels are removed."""

    def after_firing(self, run: Run) -> None:
        """Act when channels have just been removed, by masks."""

    def begin_batch(self, run: Run, batch: Any) -> None:
        """Prepare for the `training_step` of a batch."""

    def before_backward(self, run: Run, loss: Tensor) -> None:
        """Change the loss in place: it is divided by the batches of a step and multiplied by a scaler already."""

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Change gradients: they are accumulated and reduced over processes, and not clipped yet."""

    def end_batch(self, run: Run) -> None:
        """Let go of what belongs to one batch."""

    def after_validation(self, run: Run) -> None:
        """Look at the metrics of a validation during `fit`."""

    def after_epoch(self, run: Run) -> None:
        """Look at the metrics of an epoch of training."""

    def stop(self) -> None:
        """Let go of hooks and devices, also after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; after `setup`, before `begin`."""
