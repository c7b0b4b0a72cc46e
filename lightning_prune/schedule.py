"""When to prune and how far: pure functions from progress to progress, laid over epochs or steps.

A curve maps the share of the firings that have happened, in (0, 1], to the share of the way from the dense model to
the target, in [0, 1]. A `Schedule` says in which epochs a curve fires; `Schedule.resolve` turns fractions into epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from lightning_prune.errors import ConfigError, did_you_mean

__all__ = ["CURVES", "ResolvedSchedule", "Schedule", "cubic", "exponential", "linear", "one_shot", "resolve_schedule"]

Curve = Callable[[float], float]

_EPSILON = 1e-9  # 0.29 * 100 is 28.999999999999996 in floats: still epoch 29


def one_shot(progress: float) -> float:
    """Go all the way at the first firing.

    Args:
        progress: Share of the firings that have happened, in (0, 1].

    Returns:
        1.0.
    """
    return 1.0


def linear(progress: float) -> float:
    """Remove equally much at every firing: ``progress``.

    Args:
        progress: Share of the firings that have happened, in (0, 1].

    Returns:
        Share of the way to the target, in (0, 1].

    Source: MMRazor, `ItePruneConfigManager`: firing i of n, counted from 0, goes to (i + 1) / n of the way.
    """
    return progress


def cubic(progress: float) -> float:
    """Remove much at first and little at the end: ``1 - (1 - progress) ** 3``.

    Args:
        progress: Share of the firings that have happened, in (0, 1].

    Returns:
        Share of the way to the target, in (0, 1].

    Example:
        >>> [cubic(i / 4) for i in (1, 2, 3, 4)]
        [0.578125, 0.875, 0.984375, 1.0]

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878, eq. 1.
        We differ: the paper starts at its initial sparsity; our first firing already prunes.
    """
    return 1.0 - (1.0 - progress) ** 3


def exponential(progress: float) -> float:
    """Remove a constant share of what is left: ``(1 - exp(-3 progress)) / (1 - exp(-3))``.

    The rate 3 is that of a model of which exp(-3) = 5 % would remain at the end. It does not depend on the target, so
    that a curve stays a function of progress alone; it lies between `linear` and `cubic` in the second half.

    Args:
        progress: Share of the firings that have happened, in (0, 1].

    Returns:
        Share of the way to the target, in (0, 1].
    """
    return math.expm1(-3.0 * progress) / math.expm1(-3.0)


CURVES: dict[str, Curve] = {"one_shot": one_shot, "linear": linear, "cubic": cubic, "exponential": exponential}


@dataclass(frozen=True)
class ResolvedSchedule:
    """The firings begin, begin + every, ... < end, and how far each one goes.

    Args:
        unit: "epoch" or "step": what the other fields count, from zero.
        begin: First firing.
        end: No firing at or after it; greater than `begin`.
        every: Distance between firings, at least 1.
        curve: Share of the firings that have happened, in (0, 1] -> share of the way to the target, in [0, 1].
    """

    unit: str
    begin: int
    end: int
    every: int
    curve: Curve

    @property
    def num_firings(self) -> int:
        """How often the schedule fires, at least once."""
        return len(range(self.begin, self.end, self.every))

    @property
    def last(self) -> int:
        """Epoch or step of the last firing, where the target is met."""
        return range(self.begin, self.end, self.every)[-1]

    def fires_at(self, time: int) -> bool:
        """Return whether to prune at the start of this epoch or step."""
        return time in range(self.begin, self.end, self.every)

    def latest(self, time: int) -> int | None:
        """Return the last firing up to and with `time`; None before the first.

        Example:
            >>> plan = Schedule("linear", begin=2, end=8, every=3).resolve()
            >>> [plan.latest(t) for t in (1, 2, 4, 5, 20)]
            [None, 2, 2, 5, 5]
        """
        if time < self.begin:
            return None
        return min(time - (time - self.begin) % self.every, self.last)

    def progress(self, time: int) -> float:
        """Return how far the model is on its way to the target, once the firing at `time`, if any, has happened.

        Args:
            time: Epoch or step, counted from zero.

        Returns:
            Float in [0, 1]: 0.0 before the first firing, exactly 1.0 from the last one on.

        Raises:
            ConfigError: The curve returned something outside [0, 1], or ends short of 1.

        Example:
            >>> [Schedule("linear", end=8, every=2).resolve().progress(t) for t in (0, 1, 2, 6, 9)]
            [0.25, 0.25, 0.5, 1.0, 1.0]
        """
        if time < self.begin:
            return 0.0
        fired = min((time - self.begin) // self.every + 1, self.num_firings)
        return _follow(self.curve, fired / self.num_firings)


@dataclass(frozen=True)
class Schedule:
    """When pruning happens: from `begin` up to, not including, `end`, `every` so many epochs.

    A float in [0, 1] is a fraction of `max_epochs`, rounded down; at least one firing always remains, so that even one
    epoch meets the target. Without a finite `max_epochs` fractions are of `max_steps`, and `every` counts steps. An int
    is an epoch, counted from zero, however long the run is: one that stops before and is resumed goes on from there.

    Args:
        kind: "one_shot" (fires once, at `begin`, whatever `end` is), "linear", "cubic", "exponential", or a function
            from the share of the firings that have happened, in (0, 1], to the share of the way to the target, in
            [0, 1]; of 1 it is 1.
        begin: First firing.
        end: End of the firings, exclusive; fine-tuning follows.
        every: Distance between firings in epochs (MMRazor's `step_freq`), at least 1.

    Raises:
        ConfigError: An unknown kind, a negative or fractional epoch, `begin` after `end`, `every` below 1.

    Example:
        >>> plan = Schedule("linear", begin=0.0, end=0.5, every=1).resolve(max_epochs=10)
        >>> [t for t in range(10) if plan.fires_at(t)], plan.last
        ([0, 1, 2, 3, 4], 4)
    """

    kind: Curve | str = "cubic"
    begin: int | float = 0.0
    end: int | float = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        if not callable(self.kind) and self.kind not in CURVES:
            raise ConfigError(
                f"Got kind={self.kind!r} for Schedule; expected the name of a curve or a function. "
                f"{did_you_mean(self.kind, CURVES)}"
            )
        # a frozen dataclass is written once, here: YAML tools turn 8 into 8.0
        object.__setattr__(self, "begin", _checked_time("begin", self.begin))
        object.__setattr__(self, "end", _checked_time("end", self.end))
        object.__setattr__(self, "every", _checked_every(self.every))
        is_alike = isinstance(self.begin, float) == isinstance(self.end, float)
        if not self._is_one_shot and is_alike and self.begin > self.end:
            raise ConfigError(f"Got begin={self.begin!r} after end={self.end!r} for Schedule; swap them.")

    @property
    def curve(self) -> Curve:
        """The function from progress to progress."""
        return self.kind if callable(self.kind) else CURVES[self.kind]

    @property
    def _is_one_shot(self) -> bool:
        return self.kind in ("one_shot", one_shot)

    def resolve(self, max_epochs: int | None = None, max_steps: int | None = None) -> ResolvedSchedule:
        """Turn fractions into epochs, or into steps where the number of epochs is not known.

        Args:
            max_epochs: Epochs of the run; None or -1 when not limited.
            max_steps: Optimizer steps of the run; None or -1 when not limited.

        Returns:
            A schedule of at least one firing.

        Raises:
            ConfigError: A fraction of a run without an end, an epoch in a run that only counts steps, or `begin`
                after `end` once both are epochs.
        """
        epochs, steps = _limit(max_epochs), _limit(max_steps)
        times = (self.begin,) if self._is_one_shot else (self.begin, self.end)
        in_steps = epochs is None and any(isinstance(t, float) and t > 0 for t in times)
        if in_steps and steps is None:
            raise ConfigError(
                f"Got begin={self.begin!r}, end={self.end!r} for Schedule in a run without a finite max_epochs or "
                "max_steps; a fraction needs one of them. Set Trainer(max_epochs=...) or write epochs as integers."
            )
        if in_steps and any(isinstance(t, int) and t > 0 for t in times):
            raise ConfigError(
                f"Got begin={self.begin!r}, end={self.end!r} for Schedule with max_steps={steps} and no max_epochs; "
                "expected both as fractions or both as epochs."
            )
        length = steps if in_steps else epochs
        begin, end = (_absolute(t, length) for t in (self.begin, times[-1]))
        if length is not None and isinstance(self.begin, float):
            begin = min(begin, length - 1)
        if begin > end:
            raise ConfigError(
                f"Got begin={self.begin!r} after end={self.end!r} for Schedule: {begin} after {end} with "
                f"max_epochs={max_epochs}; swap them or write both the same way."
            )
        end = begin + 1 if self._is_one_shot else max(end, begin + 1)
        return ResolvedSchedule("step" if in_steps else "epoch", begin, end, self.every, self.curve)


def resolve_schedule(schedule: Schedule | Curve | str | Mapping[str, Any]) -> Schedule:
    """Return the schedule that a name, a function or a mapping of Schedule's arguments stands for.

    Args:
        schedule: A `Schedule`, the name of a curve, a function progress -> progress, or a mapping (DictConfig too).

    Returns:
        A checked schedule.

    Raises:
        ConfigError: An unknown name or key, or a value that `Schedule` refuses.

    Example:
        >>> resolve_schedule({"kind": "linear", "end": 4}).resolve().last
        3
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str) or callable(schedule):
        return Schedule(kind=schedule)
    if not isinstance(schedule, Mapping):
        raise ConfigError(
            f"Got schedule={schedule!r}; expected a Schedule, the name of a curve ({', '.join(CURVES)}), a function "
            "progress -> progress, or a mapping of Schedule's arguments."
        )
    names = [field.name for field in fields(Schedule)]
    for key in schedule:
        if key not in names:
            raise ConfigError(f"Got key {key!r} in schedule; {did_you_mean(key, names)}")
    return Schedule(**{str(key): value for key, value in schedule.items()})


def _checked_time(name: str, value: object) -> int | float:
    """Return an epoch as int >= 0 or a fraction as float in [0, 1]."""
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if isinstance(value, int) or (number > 1 and number.is_integer()):
            if number >= 0:
                return int(number)
        elif 0 <= number <= 1:
            return number
    raise ConfigError(
        f"Got {name}={value!r} for Schedule; expected an epoch as an integer >= 0, or a fraction of max_epochs as a "
        "float in [0, 1]."
    )


def _checked_every(value: object) -> int:
    if isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer() and float(value) >= 1:
        return int(float(value))
    raise ConfigError(f"Got every={value!r} for Schedule; expected a whole number of epochs, at least 1.")


def _limit(value: int | None) -> int | None:
    """Return a finite length of at least 1; Lightning writes -1 for no limit."""
    return None if value is None or value < 0 else max(1, value)


def _absolute(value: int | float, length: int | None) -> int:
    return value if isinstance(value, int) else int(value * (length or 0) + _EPSILON)


def _follow(curve: Curve, share: float) -> float:
    """Return the checked value of a curve; exactly 1.0 at the end, whatever its rounding."""
    value = float(curve(share))
    if share == 1.0 and math.isclose(value, 1.0, abs_tol=1e-6):
        return 1.0
    if share == 1.0 or not 0.0 <= value <= 1.0:
        expected = "1.0 at the last firing" if share == 1.0 else "a share of the way to the target in [0, 1]"
        name = getattr(curve, "__name__", repr(curve))
        raise ConfigError(f"Got {value!r} from schedule {name!r} at progress {share:g}; expected {expected}.")
    return value
