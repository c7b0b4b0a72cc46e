"""From bindings to classes: which labels are one channel, which are frozen, and which are grids of others.

All on arrays: connected components over label pairs, then products until nothing changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from lightning_prune.graph.labels import Axis, IntArray, LabelSpace, Product, is_labelled

__all__ = ["Closure", "Strand", "close"]

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Strand:
    """The channels along an axis: one object for all axes of the same channels.

    Args:
        classes: Class of each position.
        positions: Int64 `[n]`, ascending.
        living: Int64 `[n]`, a class that the position lives by: itself, but for a grid, which lives by several.
    """

    classes: IntArray
    positions: IntArray
    living: IntArray

    @property
    def is_grid(self) -> bool:
        """Whether some position lives by several classes."""
        return len(self.positions) > len(self.classes)

    @cached_property
    def first(self) -> IntArray:
        """The first position of each class."""
        if (self.classes[1:] > self.classes[:-1]).all():  # the usual case, at once
            return np.arange(len(self.classes))
        return np.unique(self.classes, return_index=True)[1]


@dataclass(frozen=True)
class Closure:
    """The classes of labels.

    Args:
        classes: Class of each label.
        frozen: Per class, whether it may not be removed.
        reason: Per class, index into the reasons (-1 where not frozen).
        factors: Sparse `[classes, classes]`: row c holds the classes that c lives by; a class that is no grid has
            itself alone.
        derived: Per class, whether it is a grid element of two or more free classes.
        products: Every product the closure used.
    """

    classes: IntArray
    frozen: BoolArray
    reason: IntArray
    factors: csr_matrix
    derived: BoolArray
    products: tuple[Product, ...]
    _strands: dict[bytes, Strand] = field(default_factory=dict, repr=False)
    _along: dict[int, tuple[IntArray, Strand]] = field(default_factory=dict, repr=False)  # by the id of an axis

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.frozen)

    @cached_property
    def first(self) -> IntArray:
        """One label of every class, the first."""
        first = np.zeros(self.count, np.int64)
        first[self.classes[::-1]] = np.arange(len(self.classes))[::-1]
        return first

    def along(self, labels: IntArray) -> Strand:
        """Return the channels along an axis."""
        axis, strand = self._along.get(id(labels), (None, None))
        if axis is not labels or strand is None:  # a copy of this object has the numbers of other arrays
            strand = self._strand(self.classes[labels])
            self._along[id(labels)] = labels, strand
        return strand

    def _strand(self, classes: IntArray) -> Strand:
        key = classes.tobytes()
        if key not in self._strands:
            positions, living = np.arange(len(classes)), classes
            if self.derived[classes].any():
                rows = self.factors[classes].tocoo()
                positions, living = rows.row.astype(np.int64), rows.col.astype(np.int64)
            self._strands[key] = Strand(classes, positions, living)
        return self._strands[key]

    def strands(self, axes: Iterable[Axis]) -> Collection[Strand]:
        """Return each strand along some axes once, in their order."""
        return dict.fromkeys(self.along(axis) for axis in axes if is_labelled(axis)).keys()

    def living_by(self, labels: IntArray) -> tuple[IntArray, IntArray]:
        """Return `(positions, classes)`: which classes each position of an axis lives by, several for a grid."""
        strand = self.along(labels)
        return strand.positions, strand.living

    def alive(self, dead: BoolArray) -> BoolArray:
        """Return per label whether it lives when the given classes are removed."""
        return np.asarray(self.factors @ dead.astype(np.int32) == 0)[self.classes]


def close(
    space: LabelSpace, pairs: Sequence[tuple[IntArray, IntArray]], frozen: Sequence[tuple[IntArray, int]]
) -> Closure:
    """Work out the classes.

    Args:
        space: The labels with their products.
        pairs: All bindings.
        frozen: `(labels, reason index)`.

    Returns:
        The smallest classes that satisfy every binding, freeze and product.
    """
    bound = _forest(pairs)
    a, b = _joined([axis for axis, _ in bound]), _joined([other for _, other in bound])
    classes = _components(space.size, a, b)
    known = 0
    while known < len(space.products):
        known = len(space.products)
        _refine_grids(space, classes)
        if space.size > len(classes):  # what was split may be a grid too
            classes = _components(space.size, a, b)
    products = space.products
    seeds, causes = _joined([a for a, _ in frozen]), _joined([np.full(len(a), r) for a, r in frozen])
    while True:
        state = _State(classes, seeds, causes)
        for product in products:
            state.spread(product)
        state.bind_grids()
        if not state.pairs and not state.seeds:
            break
        a, b = (classes[_joined([pair[side] for pair in state.pairs])] for side in (0, 1))
        classes = _components(len(state.frozen), a, b)[classes]
        seeds = np.concatenate([seeds, *state.seeds])
        causes = np.concatenate([causes, *state.causes])
    derived, factors = _factors(state, products)
    closure = Closure(classes, state.frozen, state.reason, factors, derived, tuple(products))
    for axis, other in bound:
        closure._along[id(axis)] = axis, closure.along(other)
    return closure


def _forest(pairs: Iterable[tuple[IntArray, IntArray]]) -> list[tuple[IntArray, IntArray]]:
    """Return as few pairs as bind the same: each axis but one of those that are bound as wholes, with that one."""
    above: dict[int, IntArray] = {}

    def top(axis: IntArray) -> IntArray:
        while (upper := above.setdefault(id(axis), axis)) is not axis:
            above[id(axis)] = axis = above[id(upper)]
        return axis

    axes: list[IntArray] = []
    for pair in pairs:
        a, b = map(top, pair)
        if a is not b and len(a):
            if a[0] < b[0]:  # the one that came first is above
                a, b = b, a
            above[id(a)] = b
            axes.append(a)
    return [(axis, top(axis)) for axis in axes]


def _joined(arrays: Sequence[IntArray]) -> IntArray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _components(count: int, a: IntArray, b: IntArray) -> IntArray:
    """Return the component of each of `count` nodes, where a[i] and b[i] are linked, numbered by their first nodes."""
    nodes = np.arange(count)
    low = nodes.copy()
    low[a] = np.minimum(a, b)  # one link of each node; nearly always it has one alone
    others = low[a] != b
    while ((lower := low[low]) != low).any():
        low = lower
    first = np.flatnonzero(low == nodes)
    nodes[first] = np.arange(len(first))
    found: IntArray = nodes[low]
    a, b = found[a[others]], found[b[others]]
    if (a != b).any():
        links = coo_matrix((np.ones(len(a), np.bool_), (a, b)), shape=(len(first), len(first)))
        found = connected_components(links, directed=False)[1].astype(np.int64)[found]
    return found


class _State:
    """One round of the fixed point: what the products add to the classes found so far."""

    def __init__(self, classes: IntArray, seeds: IntArray, causes: IntArray) -> None:
        self.classes = classes
        count = int(classes.max()) + 1 if len(classes) else 0
        self.reason = np.full(count, -1, np.int64)
        self.reason[classes[seeds[::-1]]] = causes[::-1]  # the first cause stays
        self.frozen = self.reason >= 0
        self.pairs: list[tuple[IntArray, IntArray]] = []
        self.seeds: list[IntArray] = []
        self.causes: list[IntArray] = []
        self._by_flat: dict[tuple[bytes, tuple[int, ...]], Product] = {}
        self._by_axes: dict[tuple[bytes, ...], Product] = {}
        self._spread: set[tuple[bytes, ...]] = set()
        self._grids: dict[int, list[tuple[npt.NDArray[np.uint64], IntArray]]] = {}
        self._hash = np.random.default_rng(0).integers(1, 2**63, size=max(count, 1)).astype(np.uint64)

    def spread(self, product: Product) -> None:
        """Apply one product: freezes of elements to factors, equal grids, and grids with few free factors."""
        flat = self.classes[product.flat]
        axes = [self.classes[a] for a in product.axes]
        key = flat.tobytes(), *(a.tobytes() for a in axes)
        if key in self._spread:  # most layers have the grids of others
            return
        self._spread.add(key)
        frozen = self.frozen[flat]
        if frozen.any():
            self._freeze_factors(product, axes, flat, frozen)
        self._equal_grids(product, *key)
        free = [k for k, a in enumerate(axes) if not self.frozen[a].all()]
        if not free:
            if not frozen.all():
                cause = self.reason[axes[0]].max()
                self._freeze(product.flat[~frozen], np.full(int((~frozen).sum()), cause))
        elif len(free) == 1:
            follower = np.broadcast_to(_along(product.axes[free[0]], free[0], product), product.shape).reshape(-1)
            if (self.classes[follower] != flat).any():
                self.pairs.append((product.flat, follower))
        else:
            self._grids.setdefault(len(free), []).append((self._coordinates(product, axes, free), product.flat))

    def _freeze_factors(self, product: Product, axes: list[IntArray], flat: IntArray, frozen: BoolArray) -> None:
        """A frozen element freezes the factors it lives by."""
        grid, causes = frozen.reshape(product.shape), self.reason[flat].reshape(product.shape)
        for k, labels in enumerate(product.axes):
            others = tuple(j for j in range(grid.ndim) if j != k)
            hit = grid.any(axis=others) & ~self.frozen[axes[k]]
            if hit.any():
                self._freeze(labels[hit], causes.max(axis=others)[hit])

    def _freeze(self, labels: IntArray, causes: IntArray) -> None:
        self.seeds.append(labels)
        self.causes.append(causes)

    def _equal_grids(self, product: Product, flat: bytes, *axes: bytes) -> None:
        """Equal elements have equal factors, and the other way round."""
        first = self._by_flat.setdefault((flat, product.shape), product)
        for a, b in zip(product.axes, first.axes, strict=True):
            if first is not product and (self.classes[a] != self.classes[b]).any():
                self.pairs.append((a, b))
        first = self._by_axes.setdefault(axes, product)
        if first is not product:
            self.pairs.append((first.flat, product.flat))

    def _coordinates(self, product: Product, axes: list[IntArray], free: list[int]) -> npt.NDArray[np.uint64]:
        """Hash the set of free classes of each element, whatever their order."""
        total = np.zeros(product.shape, np.uint64)
        for k in free:
            total = total + _along(self._hash[axes[k]] * np.uint64(0x9E3779B97F4A7C15), k, product)
        return total.reshape(-1)

    def bind_grids(self) -> None:
        """Elements with the same free classes are one channel (query heads that follow a key-value head)."""
        for grids in self._grids.values():
            coordinates = np.concatenate([c for c, _ in grids])
            flats = np.concatenate([f for _, f in grids])
            order = np.argsort(coordinates, kind="stable")
            coordinates, flats = coordinates[order], flats[order]
            same = coordinates[1:] == coordinates[:-1]
            differ = same & (self.classes[flats[1:]] != self.classes[flats[:-1]])
            if differ.any():
                self.pairs.append((flats[1:][differ], flats[:-1][differ]))


def _along(values: npt.NDArray[Any], axis: int, product: Product) -> npt.NDArray[Any]:
    shape = [1] * len(product.axes)
    shape[axis] = -1
    return values.reshape(shape)


def _refine_grids(space: LabelSpace, classes: IntArray) -> None:
    """Make factorisations of one axis agree: where one refines the other, split the coarse factor too."""
    by_flat: dict[bytes, list[Product]] = {}
    for product in list(space.products):
        by_flat.setdefault(classes[product.flat].tobytes(), []).append(product)
    _cut_grids(space, classes, by_flat)
    for group in by_flat.values():
        if len({p.shape for p in group}) > 1:
            _common_refinement(space, group)


def _cut_grids(space: LabelSpace, classes: IntArray, by_flat: Mapping[bytes, list[Product]]) -> None:
    """Rows of a grid over several axes in a row, as heads of a concatenation, are a grid over each of these axes."""
    starting: dict[int, list[list[Product]]] = {}
    for group in by_flat.values():
        starting.setdefault(int(classes[group[0].flat[0]]), []).append(group)
    for product in [product for group in by_flat.values() for product in group]:
        heads, *rest = product.axes
        width, flat = len(product.flat) // len(heads), classes[product.flat]
        for row, first in enumerate(flat[::width].tolist()):
            for group in starting.get(first, ()):
                part = group[0].flat
                rows = slice(row, row + len(part) // width)
                is_part = len(part) < len(flat) and len(part) % width == 0
                if is_part and np.array_equal(flat[row * width :][: len(part)], classes[part]):
                    space.grid(part, (heads[rows], *rest))


def _common_refinement(space: LabelSpace, group: Sequence[Product]) -> None:
    cuts = sorted({int(np.prod(p.shape[k:])) for p in group for k in range(len(p.shape))} | {1})
    if any(b % a for a, b in pairwise(cuts)):
        return  # they do not nest: the certificate will freeze what cannot work
    for product in group:
        fine: list[IntArray] = []
        for k, labels in enumerate(product.axes):
            low = int(np.prod(product.shape[k + 1 :]))
            inner = [c for c in cuts if low <= c <= low * len(labels)]
            fine += space.split(labels, [b // a for a, b in pairwise(inner)][::-1])
        if len(fine) > len(product.axes):
            space.grid(product.flat, fine)  # equal grids of equal shape bind their factors


def _factors(state: _State, products: Sequence[Product]) -> tuple[BoolArray, csr_matrix]:
    """Return which classes are grids of free classes, and for every class those it lives by, down to the free ones."""
    classes, count = state.classes, len(state.frozen)
    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for product in products:
        axes = [classes[a] for a in product.axes]
        free = [k for k, a in enumerate(axes) if not state.frozen[a].all()]
        if len(free) > 1:
            for k in free:
                rows.append(classes[product.flat])
                columns.append(np.broadcast_to(_along(axes[k], k, product), product.shape).reshape(-1))
    row, column = np.concatenate(rows), np.concatenate(columns)
    derived = np.zeros(count, np.bool_)
    derived[row] = True
    step = csr_matrix((np.ones(len(row), np.int32), (row, column)), shape=(count, count))
    own = np.flatnonzero(~derived)
    step = step + csr_matrix((np.ones(len(own), np.int32), (own, own)), shape=(count, count))
    step.data[:] = 1
    for _ in range(4):  # grids of grids
        further = step @ step
        further.data[:] = 1
        if (further != step).nnz == 0:
            break
        step = further
    return derived, step
