"""What can never go, whatever the bindings say: found on the classes, before any structure is tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lightning_prune.graph.channel_graph import unit_sets
from lightning_prune.graph.closure import BoolArray, Closure
from lightning_prune.graph.event import VIEWS
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.partition import Partition
from lightning_prune.graph.trace import DenseTrace

__all__ = ["find_doubled", "find_lasting", "find_vanishing"]


def find_lasting(trace: DenseTrace, closure: Closure) -> Iterator[tuple[IntArray, str]]:
    """Yield `(labels, reason)`, one label of every free class that has to stay.

    Args:
        trace: The dense trace.
        closure: Its classes.
    """
    for find, reason in (
        (_vital, "without it a whole tensor would be empty"),
        (_squares, "a grid of channels with themselves"),
        (_unread, "no traced op reads it"),
    ):
        found = find(trace, closure)
        found = found[~closure.frozen[found]]
        if len(found):
            yield closure.first[found], reason


def find_doubled(trace: DenseTrace, closure: Closure, units: Partition) -> list[tuple[IntArray, IntArray]]:
    """Return pairs of labels, one of each of two classes of a unit that some position lives by: they go together.

    Args:
        trace: The dense trace.
        closure: Its classes.
        units: The units.
    """
    found: set[tuple[int, int]] = set()
    for axis in (axis for axes in trace.axes.values() for axis in axes if is_labelled(axis)):
        positions, classes = closure.living_by(axis)
        if len(positions) > len(axis):  # a grid
            owner = units.owner[classes]
            order = np.lexsort((owner, positions))
            same = (np.diff(positions[order]) == 0) & (np.diff(owner[order]) == 0) & (owner[order][1:] >= 0)
            pairs = classes[order][:-1][same], classes[order][1:][same]
            found |= set(zip(*(half.tolist() for half in pairs), strict=True))
    return [(closure.first[[one]], closure.first[[other]]) for one, other in sorted(found)]


def _vital(trace: DenseTrace, closure: Closure) -> IntArray:
    """Return every class that all positions of some axis live by."""
    vital: list[int] = []
    for axes in trace.axes.values():
        for axis in axes:
            if is_labelled(axis):
                positions, classes = closure.living_by(axis)
                if len(positions) == len(axis):  # no grid: vital only if the whole axis is one class
                    found = classes[:1] if (classes == classes[0]).all() else classes[:0]
                else:
                    values, counts = np.unique(classes, return_counts=True)
                    found = values[counts == len(axis)]
                vital += found[~closure.frozen[found]].tolist()
    return np.unique(np.array(vital, np.int64))


def _squares(trace: DenseTrace, closure: Closure) -> IntArray:
    """Return the classes that a grid has on two of its axes: how many of its elements live is no product."""
    found: list[int] = []
    for product in closure.products:
        axes = [np.unique(closure.classes[a]) for a in product.axes]
        classes, counts = np.unique(np.concatenate([a[~closure.frozen[a]] for a in axes]), return_counts=True)
        found += classes[counts > 1].tolist()
    return np.unique(np.array(found, np.int64))


def _unread(trace: DenseTrace, closure: Closure) -> IntArray:
    """Return the classes that only views and slices see: a longer input would read what this one leaves out."""
    read: BoolArray = np.zeros(closure.count, np.bool_)
    seen: set[int] = set()
    for event in (e for events in trace.events.values() for e in events):
        if not event.entry.index and event.name not in VIEWS:
            for axis in (a for axes in event.in_axes for a in axes):
                if is_labelled(axis) and id(axis) not in seen:
                    seen.add(id(axis))
                    read[closure.classes[axis]] = True
    read |= np.asarray(closure.factors.T @ read.astype(np.int32) > 0)
    held: BoolArray = np.zeros(closure.count, np.bool_)
    for name, axes in trace.axes.items():
        for axis in axes if name in trace.read else ():
            if is_labelled(axis):
                held[closure.living_by(axis)[1]] = True
    return np.flatnonzero(held & ~read)


def find_vanishing(closure: Closure, units: Partition, axes: Iterable[IntArray]) -> list[IntArray]:
    """Return the first label of every axis that some choice would leave without channels.

    An axis that holds all channels of a unit never vanishes, since a unit keeps at least one.

    Args:
        closure: The classes.
        units: The units that they make.
        axes: The axes that integers follow: a size of 0 is none.
    """
    full = np.array([unit.num_channels for unit in units.units], np.int64)
    found: list[IntArray] = []
    distinct = {closure.classes[labels].tobytes(): labels for labels in axes}  # most layers share theirs with another
    for labels in distinct.values():
        classes, first = np.unique(closure.classes[labels], return_index=True)
        if closure.frozen[classes].any():
            continue
        sets = unit_sets(closure, units.owner, labels[first])
        whole = any(count == int(np.prod(full[list(members)])) for members, count in sets)
        if not whole:
            found.append(labels[:1])
    return found
