"""What can never go, whatever the bindings say: found on the classes, before any structure is tried."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np

from lightning_prune.graph.channel_graph import unit_sets
from lightning_prune.graph.closure import BoolArray, Closure, Strand
from lightning_prune.graph.event import VIEWS, Event
from lightning_prune.graph.labels import IntArray
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
        (_passed_over, "a slice leaves it out: a longer input may read it"),
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
    for strand in closure.strands(axis for axes in trace.axes.values() for axis in axes):
        if strand.is_grid:
            owner = units.owner[strand.living]
            order = np.lexsort((owner, strand.positions))
            same = (np.diff(strand.positions[order]) == 0) & (np.diff(owner[order]) == 0) & (owner[order][1:] >= 0)
            pairs = strand.living[order][:-1][same], strand.living[order][1:][same]
            found |= set(zip(*(half.tolist() for half in pairs), strict=True))
    return [(closure.first[[one]], closure.first[[other]]) for one, other in sorted(found)]


def _vital(trace: DenseTrace, closure: Closure) -> IntArray:
    """Return every class that all positions of some axis live by."""
    vital: list[int] = []
    for strand in closure.strands(axis for axes in trace.axes.values() for axis in axes):
        classes = strand.classes
        if strand.is_grid:
            values, counts = np.unique(strand.living, return_counts=True)
            found = values[counts == len(classes)]
        else:  # vital only if the whole axis is one class
            found = classes[:1] if (classes == classes[0]).all() else classes[:0]
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
    events = (e for events in trace.events.values() for e in events if not e.entry.index and e.name not in VIEWS)
    read: BoolArray = np.zeros(closure.count, np.bool_)
    for strand in closure.strands(axis for event in events for axes in event.in_axes for axis in axes):
        read[strand.classes] = True
    read |= np.asarray(closure.factors.T @ read.astype(np.int32) > 0)
    held: BoolArray = np.zeros(closure.count, np.bool_)
    for strand in closure.strands(a for name, axes in trace.axes.items() if name in trace.read for a in axes):
        held[strand.living] = True
    return np.flatnonzero(held & ~read)


def _passed_over(trace: DenseTrace, closure: Closure) -> IntArray:
    """Return the classes that slices leave out, of which no op does more than to hand them on to these."""
    passed: BoolArray = np.zeros(closure.count, np.bool_)
    events = [e for events in trace.events.values() for e in events]
    for strand, after in (pair for e in events if e.entry.index for pair in _ending(e, closure)):
        left = strand.classes
        for other in after:
            left = left[~np.isin(left, other.classes)]
        passed[left] = True
    if passed.any():
        for strand, _ in (pair for e in events if not e.entry.index for pair in _ending(e, closure)):
            passed[strand.classes] = False
    return np.flatnonzero(passed)


def _ending(event: Event, closure: Closure) -> Iterator[tuple[Strand, Collection[Strand]]]:
    """Yield the channels that an op takes in and does not hand on as they are, with those that it hands on."""
    after = closure.strands(axis for axes in event.out_axes for axis in axes)
    for strand in closure.strands(axis for axes in event.in_axes for axis in axes):
        if strand not in after:
            yield strand, after


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
    distinct = {closure.along(labels): labels for labels in axes}  # most layers share theirs with another
    for strand, labels in distinct.items():
        if closure.frozen[strand.classes].any():
            continue
        once = strand if len(strand.first) == len(labels) else closure.along(labels[strand.first])
        sets = unit_sets(once, units.owner)
        whole = any(count == int(np.prod(full[list(members)])) for members, count in sets)
        if not whole:
            found.append(labels[:1])
    return found
