"""`Mixture`: a weighted sum of criteria."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.importance.observer import LossScale, Observer
from lightning_prune.importance.scorer import Scorer, is_priced, observer_of, score_units, window_of

if TYPE_CHECKING:
    from lightning_prune.units import MutableChannelUnit

__all__ = ["Mixture"]

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mixture:
    """Score by a weighted sum of criteria: ``score = sum of weight * part / mean of |part|``.

    The mean is over all channels of all units, so that a part keeps its own comparison of the units; in scope "local",
    where nothing is compared between units, over those of each unit.

    Args:
        parts: What scores, and its weight: finite, not all 0.

    Raises:
        ConfigError: No parts, or a weight that does not fit.
    """

    parts: Sequence[tuple[Scorer, float]]

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.parts]
        numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) for w in weights)
        if not weights or not numbers or not any(weights):
            raise ConfigError(f"Got weights {weights} for a mixture; expected at least one number, not all of them 0.")

    @property
    def window(self) -> int:
        """How many training batches are watched: the most that a part asks for."""
        return max(window_of(part) for part, _ in self.parts)

    @property
    def is_priced(self) -> bool:
        """Whether the scores of all parts are meant per what a channel costs."""
        return all(is_priced(part) for part, _ in self.parts)

    def observer(self, units: Iterable[MutableChannelUnit]) -> Observer | None:
        """Return what watches training for the parts; None where the weights are enough for all of them."""
        units = list(units)
        observers = [observer_of(part, units) for part, _ in self.parts]
        return None if all(own is None for own in observers) else _MixtureObserver(self, observers)

    def scores(
        self, units: Iterable[MutableChannelUnit], scope: str = "global", *, living: bool = False
    ) -> dict[str, Tensor]:
        """Score by parts that need not watch training; see `Importance.scores`."""
        units = list(units)
        return self.mixed([score_units(part, units, scope, living) for part, _ in self.parts], units, scope, living)

    def mixed(
        self, parts: Sequence[Scores], units: Sequence[MutableChannelUnit], scope: str, living: bool
    ) -> dict[str, Tensor]:
        """Return the weighted sum of the scores of the parts."""
        total: dict[str, Tensor] = {}
        for (_, weight), scores in zip(self.parts, parts, strict=True):
            for name, row in _leveled(scores, units, scope, living).items():
                total[name] = total[name] + weight * row if name in total else weight * row
        return total


def _leveled(scores: Scores, units: Sequence[MutableChannelUnit], scope: str, living: bool) -> dict[str, Tensor]:
    """Return scores whose mean absolute value is 1: of all of them, or of each unit in scope "local"."""
    masks = {unit.name: unit.mutable.current_mask for unit in units}
    sizes = {name: (row[masks[name]] if living else row).abs() for name, row in scores.items()}
    count = sum(map(len, sizes.values()))
    mean = sum(float(size.sum()) for size in sizes.values()) / max(count, 1)
    by_unit = {name: float(size.mean()) if scope == "local" else mean for name, size in sizes.items()}
    return {name: row / (by_unit[name] or 1.0) for name, row in scores.items()}


class _MixtureObserver:
    """Lets the observers of the parts watch side by side.

    Args:
        mixture: What they watch for.
        observers: One for each part; None for a part of weights alone.
    """

    def __init__(self, mixture: Mixture, observers: Sequence[Observer | None]) -> None:
        self.mixture, self._parts = mixture, observers
        self._observers = {str(k): observer for k, observer in enumerate(observers) if observer is not None}

    def attach(self) -> list[RemovableHandle]:
        return [handle for observer in self._observers.values() for handle in observer.attach()]

    def after_backward(self, scale: LossScale) -> None:
        for observer in self._observers.values():
            observer.after_backward(scale)

    def before_step(self, parameters: Collection[int], scale: LossScale) -> None:
        for observer in self._observers.values():
            observer.before_step(parameters, scale)

    def share(self) -> None:
        for observer in self._observers.values():
            observer.share()

    def reset(self) -> None:
        for observer in self._observers.values():
            observer.reset()

    def scores(
        self, units: Iterable[MutableChannelUnit], scope: str = "global", *, living: bool = False
    ) -> dict[str, Tensor]:
        units = list(units)
        pairs = zip(self._parts, self.mixture.parts, strict=True)
        scorers = [part if own is None else own for own, (part, _) in pairs]
        return self.mixture.mixed([score_units(one, units, scope, living) for one in scorers], units, scope, living)

    def state_dict(self) -> dict[str, Any]:
        return {key: observer.state_dict() for key, observer in self._observers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, observer in self._observers.items():
            if key not in state:
                raise CheckpointError(f"Got a saved importance without part {key}; expected the mixture of its run.")
            observer.load_state_dict(state[key])
