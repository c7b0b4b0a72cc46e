"""Structures to certify: kept channels that tell sizes apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

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
        after: Another one; units of one size that keep equally many in it, and in those before it, keep unequally many
            here, as far as they can.
        whole: Units may keep all.

    Attributes:
        modes: In which of the traced modes to certify; None for all.
    """

    def __init__(
        self,
        trace: DenseTrace,
        closure: Closure,
        units: Sequence[UnitSpec],
        *,
        opposite: bool = False,
        after: Sampler | None = None,
        whole: bool = False,
    ) -> None:
        self.closure = closure
        self._parts: list[IntArray] = _parts(trace) if after is None else after._parts
        # how an integer is used, and how kept channels lie, is no matter of a mode that takes the same parts
        same = after is not None or (opposite and trace.is_alike)
        self.modes = ("eval",) if same else None
        self._number: int = 0 if after is None else after._number + 1
        rng = np.random.default_rng(self._number)
        most = max((unit.num_channels for unit in units), default=0)
        sizes = np.zeros(most + 1, np.bool_)
        sizes[[len(a) for axes in trace.axes.values() for a in axes if is_labelled(a) and len(a) <= most]] = True
        last = np.full(most + 1, -1)  # per count, the last unit that kept so many
        self._kept: dict[str, tuple[int, ...]] = {}  # unit -> its size, and how many it keeps in one after the other
        taken: dict[tuple[int, ...], IntArray] = {}  # the same of those before -> per count, how many units
        self._dead: dict[str, IntArray] = {}
        for number, unit in enumerate(units):
            total = unit.num_channels
            counts = rng.permutation(np.array([*_counts(unit), total] if whole else _counts(unit)))
            before = (total,) if after is None else after._kept[unit.name]
            # first to be told apart from those that kept as many so far, then from others of the size, then from all
            twins, alike = (taken.setdefault(key, np.zeros(total + 1, np.int64)) for key in (before, (-1, total)))
            count = int(counts[np.lexsort((sizes[counts], last[counts], alike[counts], twins[counts]))[0]])
            last[count] = number
            self._kept[unit.name] = (*before, count)
            twins[count] += 1
            alike[count] += 1
            order = rng.permutation(total)
            self._dead[unit.name] = unit.classes[_removed(order, count, opposite)]
        self._tell_quotients_apart(units, rng, opposite)

    def _tell_quotients_apart(self, units: Sequence[UnitSpec], rng: np.random.Generator, opposite: bool) -> None:
        """Let no width, divided by how many heads are kept, come out as an old or a kept size of the grid.

        The channels of a head are often worked out so: by luck they would be right, or look like a literal number.
        """

        def left(unit: UnitSpec) -> int:
            return unit.num_channels - len(self._dead[unit.name])

        def misleads(count: int, total: int) -> int:
            return sum(count // kept in sizes for sizes in spans[total] for kept in sizes[2:])

        spans: dict[int, list[tuple[int, int, int, int]]] = {}
        for one, other in _grids(self.closure, units):
            sizes = one.num_channels, other.num_channels, left(one), left(other)
            spans.setdefault(sizes[0] * sizes[1], []).append(sizes)
        for unit in units:
            total, kept = unit.num_channels, left(unit)
            if total in spans and kept < total and misleads(kept, total):
                counts = rng.permutation(np.array(_counts(unit))).tolist()
                count = min(counts, key=lambda c: misleads(total - c if opposite else c, total))
                self._kept[unit.name] = (*self._kept[unit.name][:-1], count)
                self._dead[unit.name] = unit.classes[_removed(rng.permutation(total), count, opposite)]

    def tells_apart(self, names: Iterable[str]) -> bool:
        """Whether no unit of the same size kept as many as one of these, here and in all before."""
        equal = Counter(self._kept.values())
        return all(equal[self._kept[name]] == 1 for name in names)

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


def _removed(order: IntArray, count: int, opposite: bool) -> IntArray:
    """Return the positions that go, of a permutation of all; in the opposite case those that would stay."""
    return np.sort(order[: len(order) - count] if not opposite else order[len(order) - count :])


def _grids(closure: Closure, units: Sequence[UnitSpec]) -> set[tuple[UnitSpec, UnitSpec]]:
    """Return the pairs of units that span a grid, as heads and their channels do."""
    owner = np.full(closure.count, -1)
    for number, unit in enumerate(units):
        owner[unit.classes] = number
    pairs = set()
    for product in closure.products:
        numbers = [np.unique(owner[closure.classes[axis]]) for axis in product.axes]
        if len(numbers) == 2 and all(len(n) == 1 and n[0] >= 0 for n in numbers):
            pairs.add((units[int(numbers[0][0])], units[int(numbers[1][0])]))
    return pairs


def _counts(unit: UnitSpec) -> Sequence[int]:
    """Return how many channels a unit may keep: never so few that they broadcast, never all."""
    total = unit.num_channels
    if 1 < unit.divisor < total:
        return range(unit.divisor, total, unit.divisor)
    return range(max(2, total // 3), max(total - 1, min(total, 5))) if total > 2 else range(1, 2)


def _parts(trace: DenseTrace) -> list[IntArray]:
    """Return the parts of several channels that ops take: with nothing left of one, a sample shows little."""
    events = (event for events in trace.events.values() for event in events if event.entry.index)
    axes = (axis for event in events for out in event.out_axes for axis in out if is_labelled(axis))
    return list({id(axis): axis for axis in axes if len(axis) > 1}.values())
