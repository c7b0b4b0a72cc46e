"""Scales of attention that a model works out from a width: `q @ k.T / sqrt(head_dim)` with the head_dim that is left.

Such a number is another one in the pruned program, as in `scaled_dot_product_attention` without `scale`. It is no
mistake if the axis that it was worked out from is the one that the product sums over: that unit then rescales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.trace import Event

__all__ = ["Scales", "ratio_of", "scale_of"]

_SCALINGS = {  # op -> the argument that is a factor or a divisor
    **{f"aten::{n}": "other" for n in ("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide")},
    **{f"aten::{n}": "alpha" for n in ("baddbmm", "addmm", "addbmm")},
    "aten::scaled_dot_product_attention": "scale",
}
_PRODUCTS = frozenset(
    f"aten::{n}"
    for n in ("matmul", "bmm", "mm", "einsum", "baddbmm", "addbmm", "addmm", "scaled_dot_product_attention")
)
_POWERS = (-0.5, 0.5, -1.0, 1.0, -0.25, 0.25)  # a fourth root where both factors have one
_STEPS = 60  # so many ops are looked at between a scale and its product

Scalars = Sequence[tuple[str, object]]


def scale_of(event: Event, scalars: Scalars) -> float | None:
    """Return by how much the one factor of an op that differs is larger than in the dense program; None for others.

    Args:
        event: The dense op.
        scalars: What the pruned op is given, where the dense one has `event.scalars`.
    """
    pairs = [(name, a, b) for (name, a), (_, b) in zip(scalars, event.scalars, strict=True) if a != b]
    if len(pairs) != 1 or pairs[0][0] != _SCALINGS.get(event.name):
        return None
    _, now, dense = pairs[0]
    if not isinstance(now, (int, float)) or not isinstance(dense, (int, float)) or not dense or now / dense <= 0:
        return None
    return now / dense


def ratio_of(event: Event, numbers: Mapping[int, tuple[float, float]]) -> float | None:
    """Return the same of the one factor or divisor that is a tensor without axes.

    Args:
        event: The dense op.
        numbers: Position among its tensors -> the number that the pruned op is given, and the dense one.
    """
    if len(numbers) != 1 or _SCALINGS.get(event.name) != "other":
        return None
    [(place, (now, dense))] = numbers.items()
    divides = "div" in event.name
    return now / dense if dense and now / dense > 0 and (place == 1 or not divides) else None


class Scales:
    """Finds what a scale belongs to.

    Args:
        events: The dense log.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events

    def rescaled(self, step: int, ratio: float, alive: BoolArray, tolerance: float) -> list[IntArray]:
        """Return the axes whose lengths explain that the scale of an op changes, none if they do not.

        Args:
            step: Number of the op.
            ratio: By how much its scale is larger in the pruned program.
            alive: Per label, whether it lives.
            tolerance: Relative, of the ratio.
        """
        for products in self._products(step):
            axes = self._explained([self._summed(k) for k in products], ratio, alive, tolerance)
            if axes:
                return axes
        return []

    def _explained(
        self, summed: Sequence[list[IntArray]], ratio: float, alive: BoolArray, tolerance: float
    ) -> list[IntArray]:
        """Return the axes that products sum over if the ratio is a power of what is left of them, of each."""
        if not summed or not all(summed):
            return []
        for axes in summed:
            left = math.prod(int(np.count_nonzero(alive[a])) for a in axes) / math.prod(len(a) for a in axes)
            if left == 1 or not any(math.isclose(ratio, left**p, rel_tol=tolerance) for p in _POWERS):
                return []
        return [axis for axes in summed for axis in axes]

    def _products(self, step: int) -> Iterator[list[int]]:
        """Yield products that a scale may be meant for, the likeliest first: of two activations, then with weights."""
        if self.events[step].costs:
            yield [step]
            return
        made = list(self._search(step, self._before))
        if not any(self._is_of_activations(k) for k in made):
            yield [k for k in self._search(step, self._after) if self._is_of_activations(k)]
        yield made

    def _search(self, step: int, following: dict[int, list[int]]) -> Iterator[int]:
        """Yield the nearest products along one direction of the program."""
        waiting, seen = list(following.get(step, ())), {step}
        while waiting and len(seen) < _STEPS:
            k = waiting.pop(0)
            if k in seen:
                continue
            seen.add(k)
            if self.events[k].costs:
                yield k
            elif "softmax" not in self.events[k].name:
                waiting += following.get(k, ())

    def _is_of_activations(self, step: int) -> bool:
        event = self.events[step]
        if event.name not in _PRODUCTS:
            return False
        factors = event.inputs[:2] if event.name.endswith(("matmul", "mm", "attention")) else event.inputs
        if event.name in ("aten::addmm", "aten::baddbmm", "aten::addbmm"):
            factors = event.inputs[1:3]
        return len(factors) > 1 and not any(self._is_constant(value) for value in factors[:2])

    def _is_constant(self, value: object) -> bool:
        """Return whether a value is a parameter, a constant, or made of those alone."""
        if isinstance(value, str):
            return not value.startswith("input ")
        assert isinstance(value, tuple), "a value is a name, a constant or the result of an op"
        return value[0] == "constant" or bool(self._constant[value[0]])

    @cached_property
    def _constant(self) -> list[bool]:
        found: list[bool] = []
        for event in self.events:
            sources = [
                not v.startswith("input ") if isinstance(v, str) else v[0] == "constant" or found[v[0]]
                for v in event.inputs
            ]
            found.append(all(sources) and not event.costs)
        return found

    def _summed(self, step: int) -> list[IntArray]:
        """Return the labelled axes that a product of two tensors sums over."""
        event = self.events[step]
        if event.name == "aten::scaled_dot_product_attention":
            last = event.in_axes[0][-1]
            return [last] if is_labelled(last) else []
        kept = {a.tobytes() for a in event.out_axes[0] if is_labelled(a)}
        return [a for _, a in event.costs[0] if is_labelled(a) and a.tobytes() not in kept]

    @cached_property
    def _before(self) -> dict[int, list[int]]:
        """Op -> the ops that make what it reads."""
        return {k: [v[0] for v in e.inputs if _is_result(v)] for k, e in enumerate(self.events)}

    @cached_property
    def _after(self) -> dict[int, list[int]]:
        """Op -> the ops that read what it makes."""
        found: dict[int, list[int]] = {}
        for k, makers in self._before.items():
            for maker in makers:
                found.setdefault(maker, []).append(k)
        return found


def _is_result(value: object) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], int)
