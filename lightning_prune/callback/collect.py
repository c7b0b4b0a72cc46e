"""Let an importance watch the training batches before a firing: which batches, and what their gradients are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callback.shapes import is_compiled
from lightning_prune.errors import ConfigError
from lightning_prune.importance import Scorer
from lightning_prune.importance.observer import LossScale, Observer
from lightning_prune.importance.scorer import observer_of, score_units, window_of
from lightning_prune.units import MutableChannelUnit

__all__ = ["Collector"]


class Collector:
    """Watches training for an importance that needs it; for any other one it is always ready and does nothing.

    It watches the last `window` batches of the epoch before a firing; the first ones where nobody knows how long an
    epoch is; and where the schedule counts steps, those of the steps before. A firing that is due before so many
    batches were seen with the structure of the moment waits for them: the first one of a fit that begins at epoch 0
    happens inside it. Of an epoch, or a fit, of no more batches than `window`, all but one are enough.

    Args:
        importance: Whose observer watches.
    """

    def __init__(self, importance: Scorer) -> None:
        self.importance = importance
        self.window = window_of(importance)
        self.seen = 0
        self._observer: Observer | None = None
        self._handles: list[RemovableHandle] = []
        self._is_watching = False

    def prepare(self, pl_module: LightningModule, units: Iterable[MutableChannelUnit]) -> None:
        """Get ready for the units of a model whose layers are dense.

        Raises:
            ConfigError: The importance hooks into layers, and the module is compiled.
            PlanError: A unit that the importance cannot score.
        """
        self._observer = observer_of(self.importance, units)
        if is_compiled(pl_module):
            self.begin_batch(True)
            has_hooks = bool(self._handles)
            self.stop()
            if has_hooks:
                raise ConfigError(
                    f"Got a compiled module with {self.importance}, which hooks into its layers: compiled code sees no "
                    "hook come or go. Use an importance of weights or of their gradients, or compile after pruning."
                )

    @property
    def can_watch(self) -> bool:
        """Whether there is anything to watch training for."""
        return self._observer is not None

    def reset(self) -> None:
        """Forget the batches: the structure is another one, or a new fit begins."""
        self.stop()
        self.seen = 0
        if self._observer is not None:
            self._observer.reset()

    def is_ready(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether enough was seen to score, and no gradients of a part of an optimizer step are pending.

        Args:
            trainer: Knows the length of an epoch and how many batches a step accumulates.
            batch_idx: The batch that is about to begin.
        """
        if self._observer is None:
            return True
        return self.seen >= self._needed(trainer) and batch_idx % trainer.accumulate_grad_batches == 0

    def _needed(self, trainer: Trainer) -> int:
        length = trainer.num_training_batches
        if trainer.max_steps > 0:  # a fit that is shorter than its first epoch
            length = min(length, trainer.max_steps * trainer.accumulate_grad_batches)
        step = min(trainer.accumulate_grad_batches, length)
        return int(max(min(self.window, max(length - 1, 1)), step))

    def ahead(self, trainer: Trainer, unit: str, batch_idx: int) -> int:
        """Return how far before a firing this batch would be watched: an epoch, so many steps, or 0 for not at all.

        Args:
            trainer: Knows the length of an epoch and how many batches a step accumulates.
            unit: What the schedule counts, "epoch" or "step".
            batch_idx: The batch that is about to begin.
        """
        if unit == "step":
            return math.ceil(self.window / trainer.accumulate_grad_batches)
        length = trainer.num_training_batches
        return int(batch_idx < self.window if math.isinf(length) else length - batch_idx <= self.window)

    # The hooks of the batches

    def begin_batch(self, is_wanted: bool) -> None:
        """Hook into the layers for one batch, if it is wanted."""
        self.stop()
        if is_wanted and self._observer is not None:
            self._handles = self._observer.attach()
            self._is_watching = True

    def after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take gradients of activations: scaled, and of the share that an accumulated batch has in its step."""
        if self._observer is None or not self._is_watching:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        factor = 1.0 if scaler is None else scaler.get_scale()
        self._observer.after_backward(LossScale(factor / share, scaler is not None))

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Take gradients of parameters: all that a step accumulates, over all ranks, and unscaled by now.

        A fused optimizer unscales them by itself, later.
        """
        if self._observer is None or not self._is_watching:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        is_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        factor = scaler.get_scale() if scaler is not None and is_scaled else 1.0
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._observer.before_step(parameters, LossScale(factor, scaler is not None))

    def end_batch(self, trainer: Trainer) -> None:
        """Take the hooks out again. Once enough was seen, every rank knows it all, so that rank 0 can save it."""
        if self._observer is None or not self._is_watching:
            return
        self.stop()
        self.seen += 1
        if self.seen >= self._needed(trainer):
            self._observer.share()

    def stop(self) -> None:
        """Take the hooks out, whatever happened in the batch."""
        self._is_watching = False
        while self._handles:
            self._handles.pop().remove()

    # Scores

    def scores(self, units: Iterable[MutableChannelUnit], scope: str, *, living: bool) -> dict[str, Tensor]:
        """Return unit name -> float `[C]`, higher = keep."""
        scorer = self.importance if self._observer is None else self._observer
        return score_units(scorer, units, scope, living)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data; nothing where nothing has to be seen."""
        if self._observer is None:
            return {}
        return {"importance": repr(self.importance), "seen": self.seen, "observer": self._observer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was seen; another importance than that of the saved run begins anew."""
        if self._observer is not None and state.get("importance") == repr(self.importance):
            self._observer.load_state_dict(state["observer"])
            self.seen = state["seen"]
