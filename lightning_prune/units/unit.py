"""A unit: its members, its one mask, and the choice that the mask stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError, did_you_mean
from lightning_prune.mutables import MutableChannel
from lightning_prune.units.channel import Channel

__all__ = ["CHOICE_MODES", "MutableChannelUnit", "SequentialMutableChannelUnit"]

CHOICE_MODES = ("ratio", "number", "bucket")


class MutableChannelUnit:
    """The channel axes that keep the same channels, their one mask, and the choice that it stands for.

    A choice says what remains. An explicit choice of n channels is rounded down to a multiple of `divisor`, and never
    below `min_channels`; keeping everything is always possible, divisor or not. Which channels remain is decided by
    `scores`; here the first ones.

    Args:
        num_channels: C, at least 1.
        choice_mode: What `current_choice` is: ``ratio`` (kept / C), ``number`` (kept), or ``bucket`` (kept / divisor).
        divisor: Kept counts are multiples of it, at least 1.
        min_value: Fewest channels that may remain, at least 1.
        min_ratio: Smallest share of the channels that may remain, in [0, 1]. A floor; MMRazor's argument of this name
            is a tolerance of its rounding instead.

    Raises:
        ConfigError: An argument outside its range.

    Example:
        >>> unit = MutableChannelUnit(16)
        >>> unit.current_choice = 0.5625
        >>> unit.activated_channels, unit.current_choice
        (9, 0.5625)
    """

    def __init__(
        self,
        num_channels: int,
        choice_mode: str = "ratio",
        divisor: int = 1,
        min_value: int = 1,
        min_ratio: float = 0.0,
    ) -> None:
        if choice_mode not in CHOICE_MODES:
            raise ConfigError(f"Got choice_mode={choice_mode!r}. {did_you_mean(choice_mode, CHOICE_MODES)}")
        for name, value in (("divisor", divisor), ("min_value", min_value)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"Got {name}={value!r}; expected a whole number of at least 1.")
        if isinstance(min_ratio, bool) or not isinstance(min_ratio, int | float) or not 0.0 <= min_ratio <= 1.0:
            raise ConfigError(f"Got min_ratio={min_ratio!r}; expected a ratio in [0, 1].")
        self.mutable = MutableChannel(num_channels)
        self.choice_mode = choice_mode
        self.divisor = divisor
        self.min_value = min_value
        self.min_ratio = float(min_ratio)
        self.output_related: list[Channel] = []
        self.input_related: list[Channel] = []
        self.axis = "channels"
        self.kind = ""
        self.renormalizing = False
        self._name: str | None = None
        self._is_fixed = False

    @property
    def num_channels(self) -> int:
        """C, the channels of the dense unit."""
        return self.mutable.num_channels

    @property
    def name(self) -> str:
        """``{first output layer}_({start}, {end})_out_{n}_in_{m}``, with a suffix for axes that are not channels.

        Assign another to replace it.
        """
        if self._name is not None:
            return self._name
        members = [*self.output_related, *self.input_related]
        first = (
            f"{members[0].name}_({members[0].start}, {members[0].end})" if members else f"unit_(0, {self.num_channels})"
        )
        suffix = "" if self.axis == "channels" else f"_{self.axis}"
        return f"{first}_out_{len(self.output_related)}_in_{len(self.input_related)}{suffix}"

    @name.setter
    def name(self, name: str) -> None:
        self._name = self.mutable.name = name

    @property
    def is_mutable(self) -> bool:
        """Whether the choice may still change."""
        return not self._is_fixed

    @property
    def min_channels(self) -> int:
        """Fewest channels that may remain: the floors, rounded up to the divisor, at most C."""
        floor = max(self.min_value, self.divisor, math.ceil(self.min_ratio * self.num_channels - 1e-9))
        return min(-(-floor // self.divisor) * self.divisor, self.num_channels)

    @property
    def activated_channels(self) -> int:
        """How many channels remain."""
        return self.mutable.activated_channels

    @property
    def current_choice(self) -> float | int:
        """What remains, in terms of `choice_mode`. Assign a choice to keep the channels with the best scores.

        An int is a count (with ``bucket``: a number of buckets), a float in (0, 1] a ratio.

        Raises:
            ConfigError: The unit is fixed, or the choice is out of range.
        """
        return self._choice_of(self.activated_channels)

    @current_choice.setter
    def current_choice(self, choice: float | int) -> None:
        self._check_mutable(choice)
        self.keep_count(self.choice_to_count(choice))

    def choice_to_count(self, choice: float | int, *, by_value: bool = False) -> int:
        """Return how many channels a choice keeps, after rounding and floors.

        Args:
            choice: An int is a count (with ``bucket``: a number of buckets), a float in (0, 1] a ratio.
            by_value: For choices out of files, whose tools turn 8 into 8.0: up to 1 is a ratio (1 and 1.0 keep all),
                above 1 a count, which may be a whole float.

        Returns:
            In [`min_channels`, C].

        Raises:
            ConfigError: `choice` is neither.
        """
        if not isinstance(choice, int | float) or isinstance(choice, bool) or not math.isfinite(choice) or choice <= 0:
            raise self._bad_choice(choice)
        is_ratio = choice <= 1 if by_value else isinstance(choice, float)
        if is_ratio and choice <= 1:
            count = math.floor(choice * self.num_channels + 1e-6)  # 0.29 * 100 is 28.999999999999996
        elif is_ratio or choice != int(choice):
            raise self._bad_choice(choice)
        else:
            if choice > self._most:
                raise self._bad_choice(choice)
            count = int(choice) * (self.divisor if self.choice_mode == "bucket" else 1)
        if count >= self.num_channels:
            return self.num_channels
        return max(count // self.divisor * self.divisor, self.min_channels)

    @property
    def _most(self) -> int:
        """The largest whole number that is a choice."""
        return -(-self.num_channels // self.divisor) if self.choice_mode == "bucket" else self.num_channels

    def _bad_choice(self, choice: object) -> ConfigError:
        mend = ""
        if isinstance(choice, float) and 1 < choice <= 100:
            mend = f" Write {choice / 100:g} to keep {choice:g} %."
        what = "buckets" if self.choice_mode == "bucket" else "channels"
        return ConfigError(
            f"Got choice={choice!r} for unit {self.name!r}; expected a ratio in (0, 1] or a whole number of {what} in "
            f"[1, {self._most}].{mend}"
        )

    def _check_mutable(self, choice: object) -> None:
        if self._is_fixed:
            raise ConfigError(
                f"Got choice={choice!r} for unit {self.name!r}, which is fixed at {self.current_choice!r}; its choice "
                "can no longer change."
            )

    def scores(self) -> Tensor:
        """Return how much each channel is worth to a choice: `[C]`, higher = keep. Here: the first channels first."""
        return torch.arange(self.num_channels, 0, -1, dtype=torch.float32)

    def keep_count(self, count: int) -> None:
        """Keep the `count` channels with the highest scores; of equal ones those with the lower index.

        Args:
            count: In [1, C]; neither rounded nor raised to a floor.

        Raises:
            PlanError: A score is not finite.
        """
        if count == self.num_channels:
            self.keep(range(count))
            return
        scores = self.scores()
        if not bool(scores.isfinite().all()):
            bad = (~scores.isfinite()).nonzero().flatten().tolist()
            raise PlanError(f"Got scores that are not finite for channels {bad[:8]} of unit {self.name!r}.")
        self.keep(scores.argsort(descending=True, stable=True)[:count].tolist())

    def keep(self, indices: Sequence[int]) -> None:
        """Keep exactly these channels, whatever divisor and floors say.

        Args:
            indices: Channels in [0, C), any order, at least one.

        Raises:
            ConfigError: The unit is fixed, or an index is out of range or missing altogether.
        """
        self._check_mutable(f"{len(indices)} channels")
        size = self.num_channels
        bad = [i for i in indices if not 0 <= i < size]
        if bad:
            raise ConfigError(f"Got channels {bad[:8]} to keep for unit {self.name!r}; expected [0, {size}).")
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(indices)] = True
        self.mutable.current_choice = mask

    def sample_choice(self) -> float | int:
        """Return a random choice that the unit could make; the current one when it is fixed. Nothing changes."""
        if self._is_fixed:
            return self.current_choice
        counts = [*range(self.min_channels, self.num_channels, self.divisor), self.num_channels]
        return self._choice_of(counts[int(torch.randint(len(counts), ()))])

    def _choice_of(self, count: int) -> float | int:
        """Return a count in terms of `choice_mode`."""
        if self.choice_mode == "ratio":
            return count / self.num_channels
        return count if self.choice_mode == "number" else -(-count // self.divisor)

    def fix_chosen(self, choice: float | int | None = None) -> None:
        """Make the choice final: later writes raise, and `is_mutable` is False.

        Args:
            choice: Set first; None fixes what is in force.

        Raises:
            ConfigError: The unit is fixed already and `choice` is given, or `choice` is out of range.
        """
        if choice is not None:
            self.current_choice = choice
        self._is_fixed = True

    def config_template(self, with_init_args: bool = False, with_channels: bool = False) -> dict[str, Any]:
        """Return the unit as plain data that YAML can hold.

        Args:
            with_init_args: Add the arguments of the constructor.
            with_channels: Add the member spans.

        Returns:
            ``choice``, and on request ``init_args`` and ``channels``. Read back by value, the choice gives this count:
            a count of 1, which would mean everything, is written as a ratio.
        """
        choice = self.current_choice
        if choice == 1 and self.activated_channels < self.num_channels:
            choice = self.activated_channels / self.num_channels
        template: dict[str, Any] = {"choice": choice}
        if with_init_args:
            names = ("num_channels", "choice_mode", "divisor", "min_value", "min_ratio")
            template["init_args"] = {name: getattr(self, name) for name in names}
        if with_channels:
            template["channels"] = {
                "output_related": [channel.to_dict() for channel in self.output_related],
                "input_related": [channel.to_dict() for channel in self.input_related],
            }
        return template

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name}, num_channels={self.num_channels}, "
            f"activated_channels: {self.activated_channels})"
        )


class SequentialMutableChannelUnit(MutableChannelUnit):
    """Keeps the first channels, whatever their weights."""
