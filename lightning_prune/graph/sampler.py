"""Structures to certify: kept channels that tell sizes apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_prune.graph.channel_graph import UnitSpec
from lightning_prune.graph.closure import BoolArray, Closure
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.trace import DenseTrace

__all__ = ["Sampler"]


class Sampler:
    """Choose kept channels that tell sizes apart: counts that equal no old size and differ between units.

    Args:
        trace: The dense trace.
        closure: The classes.
        units: All units.
        opposite: Keep what else would be removed: between the two every channel goes once.
        whole: Of the units of one size that keep equally many, leave those whole whose number has this bit.
        seed: Of the choice.

    Attributes:
        bits: How many values of `whole` tell all such units apart.
        modes: In which of the traced modes to certify; None for all.
    """

    def __init__(
        self,
        trace: DenseTrace,
        closure: Closure,
        units: Sequence[UnitSpec],
        *,
        opposite: bool = False,
        whole: int | None = None,
        seed: int = 0,
    ) -> None:
        self.closure = closure
        self._parts = _parts(trace)
        # how an integer is used, and how kept channels lie, is no matter of the mode
        self.modes = ("eval",) if seed or whole is not None else None
        rng = np.random.default_rng(seed)
        most = max((unit.num_channels for unit in units), default=0)
        sizes = np.zeros(most + 1, np.bool_)
        sizes[[len(a) for axes in trace.axes.values() for a in axes if is_labelled(a) and len(a) <= most]] = True
        last = np.full(most + 1, -1)  # per count, the last unit that kept so many
        alike: dict[tuple[int, int], int] = {}  # size, count -> how many units
        self._dead: dict[str, IntArray] = {}
        for number, unit in enumerate(units):
            total = unit.num_channels
            counts = range(max(2, total // 3), max(total - 1, min(total, 5))) if total > 2 else range(1, 2)
            if 1 < unit.divisor < total:
                counts = range(unit.divisor, total, unit.divisor)
            shuffled = rng.permutation(np.array(counts))
            count = int(shuffled[np.argmin(2 * last[shuffled] + sizes[shuffled])])
            last[count] = number
            twin = alike[total, count] = alike.get((total, count), -1) + 1
            order = rng.permutation(total)
            dead = np.sort(order[: total - count] if not opposite else order[total - count :])
            if whole is not None and twin >> whole & 1:
                dead = dead[:0]
            self._dead[unit.name] = unit.classes[dead]
        self.bits = max(alike.values(), default=0).bit_length()

    def alive(self, units: Sequence[UnitSpec], together: Sequence[UnitSpec] = ()) -> BoolArray:
        """Return per label whether it lives when these units are cut, and others lose what the last one does."""
        dead = np.zeros(self.closure.count, np.bool_)
        for unit in units:
            dead[self._dead[unit.name]] = True
        for unit in together:
            dead[unit.classes] = dead[units[-1].classes]
        alive = self.closure.alive(dead)
        for labels in self._parts:
            if not alive[labels].any():
                dead[self.closure.living_by(labels[:1])[1]] = False
                alive = self.closure.alive(dead)
        return alive


def _parts(trace: DenseTrace) -> list[IntArray]:
    """Return the parts of several channels that ops take: with nothing left of one, a sample shows little."""
    events = (event for events in trace.events.values() for event in events if event.entry.index)
    axes = (axis for event in events for out in event.out_axes for axis in out if is_labelled(axis))
    return list({id(axis): axis for axis in axes if len(axis) > 1}.values())
