"""Labels on tensor axes: what each index of an axis stands for, and what must live and die together.

An axis carries an int64 array (one label per index), `FIXED` (a size nothing may change) or `ANY` (constant along
the axis: it follows what it meets). Labels are never renamed: binding only records that two of them are one
channel, and the closure works the classes out once, on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["ANY", "FIXED", "Axis", "IntArray", "LabelSpace", "Product", "is_labelled"]

IntArray: TypeAlias = npt.NDArray[np.int64]
Axis: TypeAlias = Any  # IntArray | FIXED | ANY; a union with str makes numpy's overloads unreadable
FIXED = "fixed"
ANY = "any"


def is_labelled(axis: Axis) -> bool:
    """Return whether the axis carries labels."""
    return type(axis) is np.ndarray


@dataclass(frozen=True, eq=False)
class Product:
    """`flat[i, j] lives <=> axes[0][i] and axes[1][j] live`, for any number of axes, row-major."""

    flat: IntArray
    axes: tuple[IntArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each factor."""
        return tuple(len(a) for a in self.axes)


@dataclass
class LabelSpace:
    """All labels of one model, with what was learned about them.

    Args:
        size: Number of labels handed out.
        pairs: `(a, b)`: label a[i] is the same channel as b[i].
        frozen: `(labels, reason)`: these may never be removed.
        products: Axes that are grids of other axes.
        marks: Role -> labels an op gave it. Of weight axes: "in" (a contraction sums over it), "out" (it survives a
            contraction), "both" (it runs over the groups of a convolution). Of any axis: "heads", "head_dim",
            "groups", and "rescaled" (the scale of attention derives from its length).
        renormalized: Labels that a mean, variance, norm or plain sum runs over, or a sum of products of activations
            that are not zero where channels are removed.
        steps: `(axis, n)`: how much of the axis is kept is a multiple of n.
    """

    size: int = 0
    pairs: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    frozen: list[tuple[IntArray, str]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    marks: dict[str, list[IntArray]] = field(default_factory=dict)
    renormalized: list[IntArray] = field(default_factory=list)
    steps: list[tuple[IntArray, int]] = field(default_factory=list)
    _stay: set[int] = field(default_factory=set)  # ids of frozen axes, which `frozen` keeps alive
    _splits: dict[tuple[bytes, tuple[int, ...]], tuple[IntArray, ...]] = field(default_factory=dict)
    _merges: dict[tuple[bytes, ...], IntArray] = field(default_factory=dict)
    _grids: set[tuple[bytes, ...]] = field(default_factory=set)

    def fresh(self, count: int) -> IntArray:
        """Return `count` labels that no axis carries yet."""
        labels = np.arange(self.size, self.size + count, dtype=np.int64)
        self.size += count
        return labels

    def freeze(self, axis: Axis, reason: str) -> None:
        """Forbid the removal of every label of the axis."""
        if is_labelled(axis):
            self.frozen.append((axis, reason))
            self._stay.add(id(axis))

    def rewind(self, pairs: int, frozen: int) -> None:
        """Forget all bindings and freezes but the first ones."""
        self._stay -= {id(axis) for axis, _ in self.frozen[frozen:]} - {id(axis) for axis, _ in self.frozen[:frozen]}
        del self.pairs[pairs:], self.frozen[frozen:]

    def stays(self, axis: Axis) -> bool:
        """Return whether this very axis was frozen; another one with the same labels may have been."""
        return id(axis) in self._stay

    def bind(self, a: Axis, b: Axis, reason: Callable[[], str]) -> Axis:
        """Make two axes of equal length one; return the axis that describes both.

        Binding labels to `FIXED` freezes them for `reason()`.
        """
        if is_labelled(a) and is_labelled(b):
            if a is not b:
                self.pairs.append((a, b))
            return a
        if is_labelled(a) or is_labelled(b):
            labels, other = (a, b) if is_labelled(a) else (b, a)
            if isinstance(other, str) and other == FIXED:
                self.freeze(labels, reason())
            return labels
        return FIXED if a == FIXED or b == FIXED else ANY

    def mark(self, role: str, axis: Axis) -> None:
        """Note the role that an op gives the axis."""
        if is_labelled(axis):
            self.marks.setdefault(role, []).append(axis)

    def mark_once(self, role: str, axes: Iterable[IntArray]) -> None:
        """Note the role of axes that do not have it."""
        known = self.marks.setdefault(role, [])
        known += {id(a): a for a in axes if not any(a is b for b in known)}.values()

    def split(self, flat: Axis, shape: Sequence[int]) -> list[Axis]:
        """Split an axis row-major into a grid; the same split always gives the same labels.

        Args:
            flat: The axis, of length `prod(shape)`.
            shape: Length of each new axis, each at least 1. Axes of length 1 come back as `ANY`.

        Returns:
            One axis per entry of `shape`.
        """
        if not is_labelled(flat):
            return [flat if n > 1 else ANY for n in shape]
        real = tuple(n for n in shape if n > 1)
        if len(real) <= 1:
            return [flat if n > 1 else ANY for n in shape]
        key = (flat.tobytes(), real)
        if key not in self._splits:
            axes = tuple(self.fresh(n) for n in real)
            self._remember(flat, axes)
        factors = iter(self._splits[key])
        return [next(factors) if n > 1 else ANY for n in shape]

    def merge(self, axes: Sequence[IntArray]) -> IntArray:
        """Merge labelled axes row-major into one; the inverse of `split` gives back the same labels."""
        if len(axes) == 1:
            return axes[0]
        key = tuple(a.tobytes() for a in axes)
        if key not in self._merges:
            self._remember(self.fresh(math.prod(len(a) for a in axes)), tuple(axes))
        return self._merges[key]

    def grid(self, flat: IntArray, axes: Sequence[IntArray]) -> None:
        """Record that the flat axis is the grid of these axes, beside what else it is."""
        key = (flat.tobytes(), *(a.tobytes() for a in axes))
        if key not in self._grids:
            self._grids.add(key)
            self.products.append(Product(flat, tuple(axes)))

    def _remember(self, flat: IntArray, axes: tuple[IntArray, ...]) -> None:
        self.grid(flat, axes)
        self._splits.setdefault((flat.tobytes(), tuple(len(a) for a in axes)), axes)
        self._merges.setdefault(tuple(a.tobytes() for a in axes), flat)
