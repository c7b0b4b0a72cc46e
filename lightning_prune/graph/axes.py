"""Look axes up by their length, by what they are made of, and by how a module sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from math import prod

import numpy as np

from lightning_prune.graph.channel_graph import UnitSpec, unit_sets
from lightning_prune.graph.closure import BoolArray, Closure, Strand
from lightning_prune.graph.labels import IntArray, Product, is_labelled
from lightning_prune.graph.partition import Partition
from lightning_prune.graph.trace import DenseTrace

__all__ = ["AxisTable", "View"]

_UP = 2  # so many modules further out an integer may follow an axis that the module itself has no tensor of
Shape = tuple[tuple[str, ...], ...]  # what an axis is made of: axis names of the units of each of its terms


@dataclass(frozen=True)
class View:
    """An axis as seen from a module, so that it can be found again in another module of the class.

    Args:
        tensor: Name of the parameter relative to the module, or to one around it; None for any.
        ordinal: Which of the axes of that parameter, and of what these are made of.
        shape: What the axis is made of.
        up: How many modules further out the name begins.
    """

    tensor: str | None
    ordinal: int
    shape: Shape
    up: int = 0


class AxisTable:
    """The axes that an integer may be the length of: those of parameters, the factors of grids, and parts of either.

    Args:
        trace: The dense trace.
        closure: Its classes.
        units: The units that they make.
    """

    def __init__(self, trace: DenseTrace, closure: Closure, units: Partition) -> None:
        self.closure, self.units = closure, units
        self._grids: dict[Strand, list[Product]] = {}
        inner = self._inner_axes(trace)
        self._by_size: dict[int, list[tuple[str, int, IntArray]]] = {}
        self._ranks: dict[str, int] = {}
        for tensor, axes in trace.axes.items():
            found: list[tuple[IntArray, tuple[Strand, ...]]] = [(axis, ()) for axis in axes if is_labelled(axis)]
            self._ranks[tensor] = len(found)
            for ordinal, (axis, around) in enumerate(found):  # it grows: an axis, then what it is made of
                self._by_size.setdefault(len(axis), []).append((tensor, ordinal, axis))
                around = (*around, self.key(axis))
                found += [(part, around) for part in inner.get(around[-1], ()) if self.key(part) not in around]
        parts = (tensor.split(".") for tensor, rank in self._ranks.items() if rank)
        self._homes = {".".join(names[:k]) for names in parts for k in range(len(names))}
        self._classes = {name: type(module) for name, module in trace.sandbox.model.named_modules()}
        self._sets: dict[int, frozenset[tuple[int, ...]]] = {}
        self._found: dict[tuple[str, int, View], IntArray | None] = {}

    def _inner_axes(self, trace: DenseTrace) -> dict[Strand, list[IntArray]]:
        """Return for each axis the factors of its grids, and the parts that some op cuts it into."""
        inner: dict[Strand, dict[Strand, IntArray]] = {}
        for product in self.closure.products:
            self._grids.setdefault(self.key(product.flat), []).append(product)
            inner.setdefault(self.key(product.flat), {}).update((self.key(a), a) for a in product.axes)
        for event in (e for events in trace.events.values() for e in events if e.entry.index and len(e.in_axes) == 1):
            for dim, axis in enumerate(event.in_axes[0]):
                for part in (a[dim] for a in event.out_axes if is_labelled(axis) and len(a) == len(event.in_axes[0])):
                    if len(part) < len(axis):
                        inner.setdefault(self.key(axis), {}).setdefault(self.key(part), part)
        return {key: list(axes.values()) for key, axes in inner.items()}

    def key(self, labels: IntArray) -> Strand:
        """Return what is equal for axes of the same channels."""
        return self.closure.along(labels)

    def view(self, module: str, labels: IntArray) -> View:
        """Describe an axis as seen from a module, or from the nearest around it that has any."""
        key, shape = self.key(labels), self.shape(labels)
        same = [(t, k) for t, k, axis in self._by_size.get(len(labels), ()) if self.key(axis) == key]
        for up in range(_UP + 1):
            prefix = self._prefix(module, up)
            for tensor, ordinal in same:
                if tensor.startswith(prefix):
                    return View(tensor[len(prefix) :], ordinal, shape, up)
        return View(None, 0, shape)

    def find(self, module: str, size: int, view: View) -> IntArray | None:
        """Return the axis of a module that a view describes; None where none does, or several that differ."""
        key = (self._prefix(module, view.up), size, view)
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def _find(self, prefix: str, size: int, view: View) -> IntArray | None:
        inside = [entry for entry in self._by_size.get(size, ()) if entry[0].startswith(prefix)]
        for tensor, ordinal, axis in inside:
            # an axis of a parameter is the same one whatever it is made of; a factor or part of one is not
            alike = ordinal < self._ranks[tensor] or self.shape(axis) == view.shape
            if (tensor[len(prefix) :], ordinal) == (view.tensor, view.ordinal) and alike:
                return axis
        fits = [entry for entry in inside if self.shape(entry[2]) == view.shape]
        return fits[0][2] if len({self._unit_sets(axis) for _, _, axis in fits}) == 1 else None

    def _prefix(self, module: str, up: int = 0) -> str:
        """Return what the names of the tensors begin with that a module sees: its own, or of the nearest around it."""
        while module not in self._homes and module:
            module = module.rpartition(".")[0]
        for _ in range(up):
            module = module.rpartition(".")[0]
        return f"{module}." if module else ""

    def changed(self, module: str, size: int, alive: BoolArray) -> Iterator[IntArray]:
        """Yield axes of a size whose length changes, one for each new length, those inside the module first."""
        prefix, seen = f"{module}." if module else "", {size}
        sized = self._by_size.get(size, ())
        for inside in (True, False):
            for tensor, _, axis in sized:
                if tensor.startswith(prefix) is inside and (inside or not self._is_twins(module, tensor)):
                    living = int(np.count_nonzero(alive[axis]))
                    if living not in seen:
                        seen.add(living)
                        yield axis

    def _is_twins(self, module: str, tensor: str) -> bool:
        """Return whether a tensor is beside a module, in one like that which the module is in: each has its own."""
        around = [*takewhile(lambda pair: pair[0] == pair[1], zip(module.split("."), tensor.split("."), strict=False))]
        own, other = (".".join(path.split(".")[: len(around) + 1]) for path in (module, tensor))
        return own != other and self._classes.get(own) is self._classes.get(other)

    def stale(self, labels: IntArray, met: int, alive: BoolArray) -> Iterator[IntArray]:
        """Yield the factors of a grid whose old size explains how long it came out: what else it is made of is right.

        Args:
            labels: The axis.
            met: How long it came out.
            alive: Per label, whether it lives.
        """
        for product in self._grids.get(self.key(labels), ()):
            living = [int(np.count_nonzero(alive[axis])) for axis in product.axes]
            for axis, left in zip(product.axes, living, strict=True):
                if left != len(axis) and met * left == prod(living) * len(axis):
                    yield axis

    def span_a_grid(self, one: IntArray, other: IntArray) -> bool:
        """Return whether two axes are factors of the same grid: if they were one, nothing of it could go."""
        keys = {self.key(one), self.key(other)}
        return any(keys <= {self.key(axis) for axis in grid.axes} for grids in self._grids.values() for grid in grids)

    def unit_of(self, labels: IntArray) -> UnitSpec | None:
        """Return the unit that every position of an axis lives by, and no other; None where there is none."""
        sets = unit_sets(self.key(labels), self.units.owner)
        if len(sets) != 1 or len(sets[0][0]) != 1 or sets[0][1] != len(labels):
            return None
        return self.units.units[sets[0][0][0]]

    def labels_of(self, unit: UnitSpec) -> IntArray:
        """Return one label of each channel of a unit."""
        labels: IntArray = self.closure.first[unit.classes]
        return labels

    def _unit_sets(self, labels: IntArray) -> frozenset[tuple[int, ...]]:
        """Return the sets of units that positions of an axis live by."""
        known = self._sets.get(id(labels))
        if known is None:
            sets = unit_sets(self.key(labels), self.units.owner)
            known = self._sets[id(labels)] = frozenset(members for members, _ in sets)
        return known

    def shape(self, labels: IntArray) -> Shape:
        """Return what an axis is made of, in words that hold for every module of a kind."""
        units = self.units.units
        return tuple(sorted({tuple(sorted(units[u].axis for u in members)) for members in self._unit_sets(labels)}))
