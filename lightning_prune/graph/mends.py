"""What may be bound or kept where a pruned run disagrees, so that no more than needed is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Protocol

import numpy as np

from lightning_prune.graph.axes import AxisTable
from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.mismatch import Mismatch

__all__ = ["keep_slices", "mend"]

_CUTS = frozenset(f"aten::{n}" for n in ("split", "split_with_sizes", "unsafe_split", "tensor_split"))


class Constraints(Protocol):
    """What a mend adds to."""

    pairs: list[tuple[IntArray, IntArray]]
    mended: set[tuple[str, str, int]]

    def freeze(self, labels: IntArray, reason: str) -> None:
        """Add a freeze."""

    def place(self, mismatch: Mismatch) -> str:
        """Name the innermost module of a mismatch."""

    def followed(self, mismatch: Mismatch) -> Sequence[IntArray]:
        """Return the axes that integers of the modules on the stack follow."""


Mend = Callable[[Constraints, AxisTable, BoolArray, Mismatch], bool]


def mend(
    known: Constraints, axes: AxisTable, alive: BoolArray, mismatches: Sequence[Mismatch], *, surely: bool = False
) -> bool:
    """Bind axes that must lose equally; each kind of mend once for each op.

    Args:
        known: The constraints; they grow.
        axes: The axes of the model.
        alive: Per label, whether it lived in the run that disagreed.
        mismatches: Where it disagreed.
        surely: Bind only axes that integers follow.

    Returns:
        Whether anything was bound.
    """
    kinds = (_bind_followed,) if surely else (_bind_parts, _bind_followed, _bind_quotient, _bind_multiple, _bind_nearby)
    return _mend(known, axes, alive, mismatches, kinds)


def keep_slices(known: Constraints, axes: AxisTable, alive: BoolArray, mismatches: Sequence[Mismatch]) -> bool:
    """Keep what is before a literal; the last resort, with what `mend` is given.

    Returns:
        Whether anything was kept.
    """
    return _mend(known, axes, alive, mismatches, (_keep_slice,))


def _mend(
    known: Constraints, axes: AxisTable, alive: BoolArray, mismatches: Sequence[Mismatch], kinds: Sequence[Mend]
) -> bool:
    before = frozenset(known.mended)
    for mismatch in mismatches:
        for kind in kinds:
            key = (kind.__name__, mismatch.mode, mismatch.step)
            if mismatch.event is not None and key not in before and kind(known, axes, alive, mismatch):
                known.mended.add(key)
                break
    return len(known.mended) > len(before)


def _bind_parts(known: Constraints, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
    """The parts of an equal cut must lose equally."""
    event = mismatch.event
    if event is None or event.name not in _CUTS:
        return False
    bound = False
    for dim, axis in enumerate(event.in_axes[0]):
        pieces = [a[dim] for a in event.out_axes]
        if is_labelled(axis) and len({len(p) for p in pieces}) == 1 and len(pieces[0]) < len(axis):
            known.pairs += [(pieces[0], piece) for piece in pieces[1:]]
            bound |= any(axes.key(pieces[0]) != axes.key(p) for p in pieces[1:])
    return bound


def _bind_followed(known: Constraints, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
    """An axis that came out as long as another one of its dense size follows that one: they must lose equally.

    One head_dim for q, k and v; heads that are as many as `C // head_dim`. One that came out as of old follows one of
    its make that is left whole in this structure.
    """
    followed = known.followed(mismatch) if mismatch.axes else []
    offers = []
    for met, labels in mismatch.axes:
        if met is not None:
            alike = (a for a in followed if axes.shape(a) == axes.shape(labels) and axes.unit_of(a) is not None)
            offers.append((met, labels, followed if met != len(labels) else alike))
    return _bind(known, axes, alive, offers)


def _bind_nearby(known: Constraints, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
    """As `_bind_followed`, to an axis nearby: it may be as long by luck, so this comes last."""
    place = known.place(mismatch)
    offers = [(met, labels, axes.changed(place, len(labels), alive)) for met, labels in _wrong(mismatch)]
    return _bind(known, axes, alive, offers)


def _wrong(mismatch: Mismatch) -> list[tuple[int, IntArray]]:
    """Return the axes whose size is neither the old one nor right."""
    return [(met, labels) for met, labels in mismatch.axes if met is not None and met != len(labels)]


def _bind(
    known: Constraints, axes: AxisTable, alive: BoolArray, offers: Sequence[tuple[int, IntArray, Iterable[IntArray]]]
) -> bool:
    bound = False
    for met, labels, candidates in offers:
        fits = [axis for axis in candidates if _follows(axes, alive, met, labels, axis)]
        if fits:  # of the same make, if there is one: heads may be as many as head_dim
            axis = next((a for a in fits if axes.shape(a) == axes.shape(labels)), fits[0])
            known.pairs.append((labels, axis))
            known.pairs += _alike(axes, labels, axis)
            bound = True
    return bound


def _follows(axes: AxisTable, alive: BoolArray, met: int, labels: IntArray, axis: IntArray) -> bool:
    """Return whether an axis is another one, of the same dense size, and as long as was met."""
    fits = len(axis) == len(labels) and int(np.count_nonzero(alive[axis])) == met
    return fits and axes.key(axis) != axes.key(labels) and not axes.span_a_grid(axis, labels)


def _alike(axes: AxisTable, labels: IntArray, followed: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Return the same binding for all units of the kind, each to the unit of the other kind that is nearest."""
    one, other = axes.unit_of(labels), axes.unit_of(followed)
    if one is None or other is None:
        return []
    units = axes.units.units
    others = [unit for unit in units if unit.kind == other.kind]
    order, followed_order = (axes.units.channel[axes.closure.classes[a]] for a in (labels, followed))
    pairs = []
    for unit in (u for u in units if u.kind == one.kind and u is not one):
        nearest = max(others, key=lambda u: _shared(u.name.split("."), unit.name.split(".")))
        pairs.append((axes.labels_of(unit)[order], axes.labels_of(nearest)[followed_order]))
    return pairs


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many parts two paths share from their root on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _bind_quotient(known: Constraints, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
    """An axis that came out as another one divided by its other factors is a factor of that one too.

    The channels of a head in `reshape(..., heads, width // heads)`: the width goes with heads and their channels.
    """
    for met, labels in mismatch.axes:
        for grid in axes.closure.products if met not in (None, len(labels)) else ():
            others = [a for a in grid.axes if axes.key(a) is not axes.key(labels)]
            divisor = math.prod(int(np.count_nonzero(alive[a])) for a in others)
            if not divisor or len(others) == len(grid.axes):
                continue
            fits = [
                axis
                for axis in axes.changed(known.place(mismatch), len(grid.flat), alive)
                if int(np.count_nonzero(alive[axis])) // divisor == met and axes.key(axis) is not axes.key(grid.flat)
            ]
            # what else was cut may explain it, unless nothing else does
            cut = np.count_nonzero(alive[grid.flat])
            if fits and (cut == len(grid.flat) or (len(fits) == 1 and cut // divisor != met)):
                known.pairs.append((fits[0], grid.flat))
                return True
    return False


def _bind_multiple(known: Constraints, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
    """An axis that came out as so many times another one as it is of old consists of that one: `ratio * self.key_dim`.

    Integers follow the other one; the axis loses the same channels in each part.
    """
    for met, labels in _wrong(mismatch):
        for axis in known.followed(mismatch):
            times, rest = divmod(len(labels), len(axis))
            of_units = axes.unit_of(labels) is not None and axes.unit_of(axis) is not None
            of_units &= not axes.span_a_grid(labels, axis)
            if of_units and times > 1 and not rest and met == times * int(np.count_nonzero(alive[axis])):
                known.pairs.append((labels, np.tile(axis, times)))
                return True
    return False


def _keep_slice(known: Constraints, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
    """A slice by literal numbers holds when everything before its last literal stays."""
    event = mismatch.event
    if event is None or event.name != "aten::slice":
        return False
    kept = False
    for axis, part in zip(event.in_axes[0], event.out_axes[0], strict=True):
        if is_labelled(axis) and len(part) < len(axis):
            stays = axis[: -len(part)] if axis[-1] == part[-1] else axis[: int(np.flatnonzero(axis == part[-1])[0]) + 1]
            if not axes.closure.frozen[axes.closure.classes[stays]].all():
                known.freeze(stays, f"a slice by constant numbers in {known.place(mismatch)}")
                kept = True
    return kept
