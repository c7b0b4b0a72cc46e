"""A guard of the metric: when it does not come back after channels were removed, they are brought back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.recovery.base import Recovery, Run

__all__ = ["Guard"]

SAVED = ("reference", "waited", "is_waiting", "has_failed", "is_over", "counted", "good", "good_epoch", "report")


class Guard(Recovery):
    """Take the last removal back, and end the schedule, when a metric does not come back after it.

    A value is good when it is not worse than the best one before it by more than `tolerance`: with mode "max",
    ``value >= best - tolerance``. After each good validation, as long as firings follow, a copy of the structure, the
    weights and the state of the optimizers is kept in the memory of the host. When none of `patience` epochs after a
    firing is good, that copy is restored bit for bit at the start of the next epoch, or at the end of training; no
    firing follows. Learning rates go on as they are. Checkpoints carry the copy while it is needed: they are about
    twice as large then.

    Args:
        monitor: Name of a logged metric, such as "val_acc". Of several validations in an epoch one good one is enough.
        mode: "max" where greater is better, else "min".
        tolerance: How much worse is still good, in the unit of the metric, at least 0.
        patience: Epochs with a value of the metric after a firing, at least 1.
        baseline: The value of the dense model. None takes the best one of the epochs before the first firing, which
            waits for it where the schedule begins at epoch 0.

    Attributes:
        report: What was restored and why; empty as long as nothing was.

    Raises:
        ConfigError: An argument outside its range.
    """

    def __init__(
        self,
        monitor: str,
        mode: str = "max",
        tolerance: float = 0.01,
        patience: int = 3,
        baseline: float | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"Got mode={mode!r} for Guard; expected 'min' or 'max'.")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
            raise ConfigError(f"Got tolerance={tolerance!r} for Guard; expected a number of at least 0.")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"Got patience={patience!r} for Guard; expected a whole number of at least 1.")
        self.monitor, self.mode, self.tolerance, self.patience = monitor, mode, float(tolerance), patience
        self.baseline = None if baseline is None else float(baseline)
        self.forget()

    def forget(self) -> None:
        """Begin with another model."""
        self.reference = self.baseline
        self.waited = 0
        self.is_waiting = self.has_failed = self.is_over = self.wants_copy = False
        self.counted = self.good_epoch = -1
        self.good: dict[str, Any] | None = None
        self.report = ""
        self._of_validation = self._has_validated = False

    # The moments of a run

    def begin(self, run: Run) -> None:
        """Check that something prunes.

        Raises:
            ConfigError: Nothing does.
        """
        if run.mutator is None:
            raise ConfigError("Got Guard without pruning; give it to PruningCallback(recovery=[Guard(...)]).")

    def is_ready(self) -> bool:
        """Return whether there is a value of the dense model to come back to."""
        return self.reference is not None

    def before_firing(self, run: Run) -> None:
        """Want a copy of the dense model if there is none."""
        self.wants_copy = self.good is None

    def after_firing(self, run: Run) -> None:
        """Wait for the metric to come back; a firing while it waits gives it no more time."""
        self.is_waiting = True

    def after_validation(self, run: Run) -> None:
        """Look at the metric, if it is one of validation."""
        self._has_validated = True
        if self.monitor in run.trainer.callback_metrics:
            self._of_validation = True
            self._look(run)

    def after_epoch(self, run: Run) -> None:
        """Look at the metric, if it is one of training.

        Raises:
            ConfigError: Nobody logs it.
        """
        if self._of_validation:
            return
        logged = run.trainer.callback_metrics
        if self.monitor in logged:
            self._look(run)
        elif self._has_validated or not sum(run.trainer.num_val_batches):
            raise _nobody_logs(self.monitor, logged)

    def _look(self, run: Run) -> None:
        if self.is_over:
            return
        value = float(run.mean(run.trainer.callback_metrics[self.monitor].detach().float()))
        epoch = run.trainer.current_epoch
        if self.is_good(value):
            self.reference = value if self.reference is None else self._better(self.reference, value)
            self.waited, self.counted, self.is_waiting, self.has_failed = 0, -1, False, False
            if run.is_done:
                self.good = None  # nothing will be taken back
            else:
                self.wants_copy = True
        elif self.is_waiting and epoch != self.counted:
            self.waited, self.counted = self.waited + 1, epoch
            self.has_failed = self.waited >= self.patience
            epochs = "1 epoch" if self.waited == 1 else f"{self.waited} epochs"
            self.report = (
                f"Guard: {self.monitor} is {value:.4g}, {epochs} after channels were removed; the best "
                f"before is {self.reference:.4g}, and {self.tolerance:.4g} are tolerated."
            )

    def is_good(self, value: float) -> bool:
        """Return whether a value is not worse than the best so far by more than the tolerance; NaN is never good."""
        if math.isnan(value) or self.reference is None:
            return not math.isnan(value)
        worse = self.reference - value if self.mode == "max" else value - self.reference
        return worse <= self.tolerance + 1e-7 * abs(self.reference)  # a metric is a float32

    def _better(self, one: float, other: float) -> float:
        return max(one, other) if self.mode == "max" else min(one, other)

    # The copy

    def keep(self, copy: dict[str, Any], epoch: int) -> None:
        """Keep a copy of what is good.

        Args:
            copy: Plain data.
            epoch: When it was taken.
        """
        self.good, self.good_epoch, self.wants_copy = copy, epoch, False

    def end(self) -> None:
        """Take note that the copy was restored: there is nothing more to watch."""
        self.report += f" The structure and weights of epoch {self.good_epoch} are restored; the schedule ends there."
        self.good, self.is_over, self.has_failed, self.is_waiting = None, True, False, False

    def state_dict(self) -> dict[str, Any]:
        """Return plain data, the copy included."""
        return {name: getattr(self, name) for name in SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on watching."""
        for name in SAVED:
            setattr(self, name, state[name])


def _nobody_logs(monitor: str, logged: Iterable[str]) -> ConfigError:
    names = sorted(logged)
    return ConfigError(f"Got monitor={monitor!r} for Guard, which nobody logs. {did_you_mean(monitor, names)}")
