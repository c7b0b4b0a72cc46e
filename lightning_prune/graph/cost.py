"""Cost as polynomials in the kept counts: any structure is priced in microseconds, without running the model.

One MAC is one multiply-add of a convolution, linear, matmul, attention or recurrent layer; bias, normalisation and
activation are not counted. Each axis size is a constant plus products of kept counts, and each op costs a product of
axis sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.graph.labels import IntArray

__all__ = ["Cost", "CostModel", "Expression", "Polynomial"]

# constant + sum of numerator * product of the kept counts of the units // denominator
Expression = tuple[int, tuple[tuple[int, int, tuple[int, ...]], ...]]


@dataclass(frozen=True)
class Cost:
    """What one forward of the example input costs.

    Args:
        macs: Multiply-adds of the whole example batch.
        params: Elements of all parameters, tied ones once.
        by_op: MACs per ATen op.
        batch_size: Examples in the batch.
    """

    macs: int
    params: int
    by_op: Mapping[str, int] = field(default_factory=dict)
    batch_size: int = 1

    @property
    def per_example(self) -> int:
        """MACs of one example (rounded down)."""
        return self.macs // max(self.batch_size, 1)


class Polynomial:
    """A sum of products of axis sizes.

    Args:
        terms: `(constant factor, axis sizes)` of each product.
        num_units: U, the number of units the expressions refer to.
    """

    def __init__(self, terms: Iterable[tuple[int, Sequence[Expression]]], num_units: int) -> None:
        merged: dict[tuple[Expression, ...], int] = {}
        for factor, sizes in terms:
            varying = tuple(sorted(e for e in sizes if e[1]))
            scale = factor * math.prod(constant for constant, parts in sizes if not parts)
            merged[varying] = merged.get(varying, 0) + scale
        self.scale = np.array(list(merged.values()), np.int64)
        expressions = {e: k for k, e in enumerate({e for sizes in merged for e in sizes})}
        self._constant = np.array([e[0] for e in expressions], np.int64)
        owned = [(k, *term) for e, k in expressions.items() for term in e[1]]
        self._owner = np.array([k for k, *_ in owned], np.int64)
        self._numerator = np.array([n for _, n, _, _ in owned], np.int64)
        self._denominator = np.array([d for _, _, d, _ in owned], np.int64)
        self._units = _padded([units for *_, units in owned], num_units)
        self._factors = _padded([[expressions[e] for e in sizes] for sizes in merged], len(expressions))

    def __call__(self, counts: IntArray) -> IntArray:
        """Evaluate.

        Args:
            counts: Int64 `[..., U]`, kept channels of each unit.

        Returns:
            Int64 `[...]`.
        """
        result: IntArray = self.terms(counts).sum(-1)
        return result

    def terms(self, counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Evaluate each product alone.

        Args:
            counts: Int64 or float64 `[..., U]`, kept channels of each unit.

        Returns:
            Of the same type, `[..., T]`; their sum is the value.
        """
        ones = np.ones((*counts.shape[:-1], 1), counts.dtype)
        products = self._numerator * np.concatenate([counts, ones], -1)[..., self._units].prod(-1)
        values = products // self._denominator if counts.dtype == np.int64 else products / self._denominator
        sizes = np.broadcast_to(self._constant, (*counts.shape[:-1], len(self._constant))).astype(counts.dtype)
        np.add.at(sizes.T, self._owner, values.T)  # the transpose is a view: one row per expression
        result: npt.NDArray[Any] = self.scale * np.concatenate([sizes, ones], -1)[..., self._factors].prod(-1)
        return result


def _padded(rows: Sequence[Sequence[int]], filler: int) -> IntArray:
    width = max((len(r) for r in rows), default=0)
    return np.array([[*r, *[filler] * (width - len(r))] for r in rows], np.int64).reshape(len(rows), width)


class CostModel:
    """Prices structures.

    Args:
        names: Names of the units, in the order of every `counts`.
        full: Int64 `[U]`, channels of the dense units.
        macs: ATen op -> its multiply-adds.
        params: Elements of all parameters.
        memory: Bytes of the activations of the example batch (results that are neither views nor in place).
        batch_size: Examples in the example input.
    """

    def __init__(
        self,
        names: Sequence[str],
        full: IntArray,
        macs: Mapping[str, Polynomial],
        params: Polynomial,
        memory: Polynomial,
        batch_size: int,
    ) -> None:
        self.names = tuple(names)
        self.full = full
        self.batch_size = batch_size
        self._by_op = dict(macs)
        self._memory = memory
        self._measures: dict[str, Callable[[IntArray], IntArray]] = {
            "channels": lambda counts: np.asarray(counts.sum(-1)),
            "params": params,
            "macs": self._macs,
            "flops": lambda counts: 2 * self._macs(counts),
            "memory": memory,
        }

    def _macs(self, counts: IntArray) -> IntArray:
        total = np.zeros(counts.shape[:-1], np.int64)
        for polynomial in self._by_op.values():
            total = total + polynomial(counts)
        return total

    def measure(self, key: str, counts: npt.ArrayLike) -> int:
        """Return one cost of one structure.

        Args:
            key: "channels" (kept channels of all units), "params", "macs", "flops" (2 x MACs) or "memory" (bytes).
            counts: `[U]` kept channels per unit, in the order of `names`.

        Raises:
            ConfigError: Unknown key.
        """
        return int(self.measure_many(key, np.asarray(counts, np.int64)[None])[0])

    def measure_many(self, key: str, counts: IntArray) -> IntArray:
        """Return one cost of many structures: `[B, U]` counts -> `[B]`."""
        if key not in self._measures:
            raise ConfigError(f"Got cost {key!r}. {did_you_mean(key, self._measures)}")
        return self._measures[key](counts)

    def terms(self, counts: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the products of axis sizes that the MACs, and those that the memory of structures are sums of.

        Args:
            counts: Int64 or float64 `[B, U]`, kept channels per unit.

        Returns:
            Of the same type, `[B, T]` each, at least 0, and monotone in each count.
        """
        macs = [polynomial.terms(counts) for polynomial in self._by_op.values()]
        return np.concatenate([np.zeros((len(counts), 0), counts.dtype), *macs], -1), self._memory.terms(counts)

    def cost(self, counts: npt.ArrayLike) -> Cost:
        """Return MACs and parameters of one structure, MACs by op."""
        row = np.asarray(counts, np.int64)[None]
        by_op = {op: int(polynomial(row)[0]) for op, polynomial in self._by_op.items()}
        return Cost(sum(by_op.values()), self.measure("params", row[0]), by_op, self.batch_size)
