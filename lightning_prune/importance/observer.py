"""What watches training for a criterion: hooks for the batches, accumulated means, and scores out of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import CheckpointError, PlanError
from lightning_prune.importance.accumulate import ChannelMeans
from lightning_prune.importance.aggregate import reduce_layers

if TYPE_CHECKING:
    from lightning_prune.importance.scorer import Importance
    from lightning_prune.units import MutableChannelUnit

__all__ = ["LossScale", "MeansObserver", "Observer", "carried_on", "listed"]

Row = tuple[str, int]  # unit, number of the layer in it


@dataclass(frozen=True)
class LossScale:
    """What the gradients at hand are in terms of those of the loss.

    Args:
        factor: They are so many times as large: the scale of an AMP scaler, the share of an accumulated batch.
        may_overflow: Whether a scaler is at work, which skips a step whose gradients are not finite; so do we.
    """

    factor: float = 1.0
    may_overflow: bool = False


class Observer(Protocol):
    """Watches batches and scores units; a `Scorer` for the units that it was made for.

    For every batch: `attach`; the forward; `after_backward` after each backward; `before_step` before each step of an
    optimizer; remove the handles. Nothing of the training changes: no weight, gradient, mode or random number.
    """

    def attach(self) -> list[RemovableHandle]:
        """Hook into the layers for one batch; removing the handles ends it."""
        ...

    def after_backward(self, scale: LossScale) -> None:
        """Take the gradients of activations, as they came out of one backward."""
        ...

    def before_step(self, parameters: Collection[int], scale: LossScale) -> None:
        """Take the gradients of the parameters that an optimizer is about to use, by their `id`."""
        ...

    def share(self) -> None:
        """Let every rank know what all of them saw; a collective call, after the last batch."""
        ...

    def reset(self) -> None:
        """Forget the batches, not the scores that removed channels had."""
        ...

    def scores(
        self, units: Iterable[MutableChannelUnit], scope: str = "global", *, living: bool = False
    ) -> dict[str, Tensor]:
        """Return unit name -> float32 `[C]` on the CPU, finite, higher = keep; a collective call."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, as plain data."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen."""
        ...


class MeansObserver(ABC):
    """What the criteria share: means per layer and channel, and a score for removed channels, which are not seen.

    A removed channel keeps the score that it had when it was last seen, times what the mean of the channels seen now
    has changed since. It returns if it would rank among them. One that was never seen has 0.

    Args:
        importance: The criterion and how its layers combine.
        units: Whose channels.
        function: The criterion's own function.
    """

    options: ClassVar[tuple[str, ...]] = ("reduction", "input_related")
    """The arguments of `Importance` that count."""

    def __init__(
        self, importance: Importance, units: Iterable[MutableChannelUnit], function: Callable[..., Tensor]
    ) -> None:
        self.importance, self.function = importance, function
        self.units = {unit.name: unit for unit in units}
        self._last: dict[str, Tensor] = {}
        self._overflows = 0
        self._means = ChannelMeans({row: self.units[row[0]].num_channels for row in self._rows()})

    @abstractmethod
    def _rows(self) -> list[Row]:
        """Return the rows that are accumulated, with their unit's name first."""

    @abstractmethod
    def _missing(self, rows: Iterable[Row]) -> PlanError:
        """Return the error for rows of which nothing was seen."""

    def attach(self) -> list[RemovableHandle]:
        """Hook into nothing."""
        return []

    def after_backward(self, scale: LossScale) -> None:  # noqa: B027 - for those that look at activations' gradients
        """Take nothing."""

    def before_step(self, parameters: Collection[int], scale: LossScale) -> None:  # noqa: B027 - or at parameters'
        """Take nothing."""

    def share(self) -> None:
        """Let every rank know what all of them saw."""
        self._means.share()

    def reset(self) -> None:
        """Forget the batches, not the scores that removed channels had."""
        self._means.reset()
        self._overflows = 0

    def _add(self, rows: Mapping[Row, tuple[Tensor, Tensor]], scale: LossScale) -> None:
        """Accumulate sums and weights `[C]`; nothing where the scaler overflowed."""
        if scale.may_overflow and not all(bool(sums.isfinite().all()) for sums, _ in rows.values()):
            self._overflows += 1
            return
        if not rows:
            return
        device = next(iter(rows.values()))[0].device
        self._means.to("cpu" if device.type == "mps" else device)  # float64
        self._means.update(rows)

    @abstractmethod
    def _covered(self, row: Row) -> Tensor:
        """Return which channels of the unit a row can have, bool `[C]` on the CPU."""

    def scores(
        self, units: Iterable[MutableChannelUnit], scope: str = "global", *, living: bool = False
    ) -> dict[str, Tensor]:
        """Score the channels of the units by what was seen.

        Args:
            units: Those that it was made for.
            scope: See `Importance.scores`.
            living: See `Importance.scores`.

        Returns:
            Unit name -> float32 `[C]` on the CPU, finite, higher = keep.

        Raises:
            PlanError: Nothing was seen of a layer, with its name; every step overflowed; scores that are not finite,
                with the unit's name.
        """
        rows = self._means.rows()
        blind = [row for row, (_, weight) in rows.items() if not bool(weight.any()) and self._has_living(row)]
        if blind and self._overflows:
            raise PlanError(
                f"Got gradients that are not finite in all {self._overflows} steps that importance "
                f"{self.importance.name!r} watched: the scaler of mixed precision still looks for its scale. Watch "
                "more batches, or let the schedule begin later."
            )
        if blind:
            raise self._missing(blind)
        found = {}
        for unit in units:
            layers = [rows[row] for row in rows if row[0] == unit.name]
            seen = [weight > 0 for _, weight in layers]
            raw = self._combined(unit, [mean for mean, _ in layers], seen)
            last = self._last.get(unit.name)
            self._last[unit.name] = full = carried_on(raw, torch.stack(seen).any(0), last)
            found[unit.name] = self.importance.finished(full, unit, scope, living)
        return found

    def _has_living(self, row: Row) -> bool:
        return bool((self._covered(row) & self.units[row[0]].mutable.current_mask).any())

    def _combined(self, unit: MutableChannelUnit, means: list[Tensor], seen: list[Tensor]) -> Tensor:
        """Return one raw score per channel from those of the layers; what removed channels get means nothing."""
        return reduce_layers(means, seen, self.importance.reduction)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, as plain data: of this rank, or of all of them after `share`."""
        sums = {name: value.to("cpu", copy=True) for name, value in self._means.state_dict().items()}
        return {**sums, "last": {name: scores.clone() for name, scores in self._last.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen.

        Raises:
            CheckpointError: It was of other units.
        """
        sums = {name: state[name].clone() for name in ("total", "weight")}
        if sums["total"].shape != self._means.total.shape:
            raise CheckpointError(
                f"Got a saved importance of {len(sums['total'])} channels; expected {len(self._means.total)}. Use the "
                "importance of the run that wrote the checkpoint."
            )
        self._means.load_state_dict(sums)
        self._last = {name: scores.clone() for name, scores in state["last"].items()}


def listed(names: Sequence[str]) -> str:
    """Return names for a message: the first four, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more


def carried_on(now: Tensor, seen: Tensor, last: Tensor | None) -> Tensor:
    """Return scores in which channels that were not seen carry on from what they last had.

    Args:
        now: `[C]`, right where seen.
        seen: Bool `[C]`.
        last: `[C]`, the scores at the last firing; None where there was none.

    Returns:
        `[C]`: an unseen channel has its last score times the mean of the seen now over that of the same ones then.

    Example:
        >>> was, now = torch.tensor([2.0, 6.0, 3.0]), torch.tensor([1.0, 3.0, 0.0])
        >>> carried_on(now, torch.tensor([True, True, False]), was)
        tensor([1.0000, 3.0000, 1.5000])
    """
    if last is None:
        return torch.where(seen, now, 0.0)
    before = last[seen].mean()
    change = now[seen].mean() / before if before != 0 else 1.0
    return torch.where(seen, now, last * change)
