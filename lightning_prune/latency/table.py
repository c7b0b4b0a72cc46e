"""From a few measured widths of each unit to the latency of any structure, as one more cost that a plan may bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError
from lightning_prune.graph.cost import CostModel
from lightning_prune.latency.measure import Measurement, Quartiles
from lightning_prune.mutator import ChannelMutator
from lightning_prune.mutator.preview import preview
from lightning_prune.plan import KeepPlan, UnitLimits
from lightning_prune.targets.parse import LATENCY_KEYS
from lightning_prune.targets.planning import NANOSECONDS
from lightning_prune.targets.steps import FloatArray, IntArray

__all__ = ["LatencyCosts", "LatencyTable", "Measure", "build_table"]

Measure = Callable[[Mapping[str, nn.Module]], Mapping[str, Measurement]]
"""Name -> model, one of them "dense", to name -> times of the same rounds."""

_LEVELS = (0.25, 0.5, 0.75)  # of each unit alone, and of all together; and the floor
_PRIOR = 1e-2  # weight of the belief that time goes by MACs and memory, where the measurements do not say


@dataclass(frozen=True)
class LatencyTable:
    """Measured structures, as plain data that a checkpoint can hold.

    Args:
        counts: Int64 `[S, U]`, kept channels in the order of `CostModel.names`; the first row has every unit at its
            floor.
        shares: Float64 `[S, 3]`, time relative to the dense model: median, first and third quartile of the rounds.
        dense_ms: Milliseconds of the dense model.
        about: How it was measured.
    """

    counts: IntArray
    shares: FloatArray
    dense_ms: float
    about: str = ""

    @property
    def floor(self) -> Quartiles:
        """What the model takes with every unit at its floor, relative to the dense one."""
        return Quartiles(*self.shares[0].tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `torch.load(weights_only=True)` reads."""
        tensors = {"counts": torch.tensor(self.counts), "shares": torch.tensor(self.shares)}
        return {**tensors, "dense_ms": self.dense_ms, "about": self.about}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LatencyTable:
        """Return the table that `to_dict` gave.

        Raises:
            CheckpointError: It is damaged.
        """
        parts: list[Any] = [saved.get(name) for name in ("counts", "shares", "dense_ms")]
        counts, shares, dense_ms = parts
        are_right = isinstance(counts, Tensor) and isinstance(shares, Tensor) and isinstance(dense_ms, float)
        if are_right and counts.ndim == 2 and len(counts) and shares.shape == (len(counts), 3):
            return cls(counts.numpy(), shares.numpy(), dense_ms, str(saved.get("about", "")))
        raise CheckpointError(f"Got a latency table of {sorted(saved)} that do not fit together; it is damaged.")


class LatencyCosts:
    """Costs of a model, with its latency among them.

    What a unit of n channels takes is known from its table: piecewise linear between the measured widths, monotone, as
    an *effective* width; a plateau, where more channels cost nothing, is one width. The latency of a structure is

        share(n) = a + sum of x[t] * term[t](effective(n)),  a >= 0, x >= 0

    over the products of widths that MACs and memory are sums of (one for each pair of units that meet in a layer, and
    one for each unit), fitted to the measured structures by non-negative least squares. So it is monotone in each
    width, and two units that are cut together do not save the time of their common layer twice.

    Args:
        cost: Prices everything else.
        table: Of the same units.

    Raises:
        CheckpointError: The table is of other units.

    Source: Shen et al., "HALP: Hardware-Aware Latency Pruning", 2021, arXiv:2110.10811, sec. 3.2: the latency of a
        network is the sum of its layers', looked up by input and output width.
        We differ: the whole model is measured, not layers alone, so what a backend fuses or overlaps counts as it is;
        a few widths of each unit instead of every pair of widths of each layer.
    """

    def __init__(self, cost: CostModel, table: LatencyTable) -> None:
        full = cost.full
        if table.counts.shape[1] != len(full) or (table.counts > full).any() or (table.counts < 1).any():
            raise CheckpointError(
                f"Got a latency table of {table.counts.shape[1]} units; this model has {len(full)} of other sizes. It "
                "is of another model: measure anew."
            )
        self.table, self.names, self.full, self.batch_size = table, cost.names, full, cost.batch_size
        self._cost = cost
        self._effective = _effective_widths(table, full)
        macs, memory = (terms[0] for terms in cost.terms(full[None].astype(np.float64)))
        self._dense = np.concatenate([[1.0], macs, memory])
        features = self._features(table.counts)
        believed = np.concatenate([[1.0], macs / max(macs.sum(), 1), memory / max(memory.sum(), 1)]) / 3
        # relative errors: of a small structure as of a big one
        dense, prior = np.ones((1, len(believed))), _PRIOR * np.eye(len(believed))
        rows = np.concatenate([features / table.shares[:, :1], dense, prior])
        asked = np.concatenate([np.ones(len(features) + 1), _PRIOR * believed])
        weights = nnls(rows, asked)[0] * (self._dense > 0)
        self._weights = weights / weights.sum()  # of the dense model every feature is 1

    def _features(self, counts: IntArray) -> FloatArray:
        """Return the constant and every product of effective widths, relative to the dense ones, `[B, 1 + T]`."""
        widths = self._effective[np.arange(len(self.full)), counts]
        terms = np.concatenate([np.ones((len(counts), 1)), *self._cost.terms(widths)], 1)
        features: FloatArray = terms / np.maximum(self._dense, 1.0)
        return features

    def share(self, counts: IntArray) -> FloatArray:
        """Return the latency of `[B, U]` kept counts relative to the dense model, `[B]`."""
        shares: FloatArray = self._features(counts) @ self._weights
        return shares

    def measure(self, key: str, counts: Any) -> int:
        """Return one cost of `[U]` kept counts; that of a latency in nanoseconds, as predicted."""
        return int(self.measure_many(key, np.asarray(counts, np.int64)[None])[0])

    def measure_many(self, key: str, counts: IntArray) -> IntArray:
        """Return one cost of `[B, U]` kept counts, `[B]`."""
        if key not in LATENCY_KEYS:
            return self._cost.measure_many(key, counts)
        return np.asarray(np.rint(self.share(counts) * self.table.dense_ms * NANOSECONDS), np.int64)


def _effective_widths(table: LatencyTable, full: IntArray) -> FloatArray:
    """Return the effective width of every kept count of every unit, `[U, 1 + max C]`, monotone in the count.

    Both ends are what they are; in between, the width is where the measured time lies between the times of both ends,
    as far as their difference stands out of the spread.
    """
    widths = np.repeat(np.arange(full.max() + 1, dtype=np.float64)[None], len(full), 0)
    others_full = (table.counts == full).sum(1) == len(full) - 1
    for unit, channels in enumerate(full.tolist()):
        alone = np.flatnonzero(others_full & (table.counts[:, unit] < channels))
        if len(alone) < 2:
            continue
        alone = alone[np.argsort(table.counts[alone, unit])]
        x = np.append(table.counts[alone, unit], channels).astype(np.float64)
        y = np.append(table.shares[alone, 0], 1.0)
        y = (np.maximum.accumulate(y) + np.minimum.accumulate(y[::-1])[::-1]) / 2
        signal, noise = y[-1] - y[0], np.median(np.ptp(table.shares[alone, 1:], axis=1))
        if signal > 0:
            measured = x[0] + (x[-1] - x[0]) * (y - y[0]) / signal
            x_blend = x + (measured - x) * signal**2 / (signal**2 + noise**2)
            widths[unit, : channels + 1] = np.interp(np.arange(channels + 1), [0.0, *x], [0.0, *x_blend])
    return widths


def build_table(mutator: ChannelMutator, limits: Sequence[UnitLimits], measure: Measure) -> LatencyTable:
    """Measure a few widths of one unit of each kind, all others dense, and a few structures of all units.

    Each unit's models are measured together with the dense one, and only their ratios are kept. No model is touched,
    and at most five copies exist at a time.

    Args:
        mutator: With a model; its example input is what `measure` runs.
        limits: Of every unit that may be pruned; the widths are allowed ones.
        measure: Times models.
    """
    cost = mutator.graph.cost
    column = {name: i for i, name in enumerate(cost.names)}
    columns = [column[limit.name] for limit in limits]
    together = np.repeat(cost.full[None], 1 + len(_LEVELS), 0)
    together[:, columns] = [[_snapped(limit, level) for limit in limits] for level in (0.0, *_LEVELS)]
    groups = [(together, [(0, 0)]), *(_alone(alike, cost.full, column) for alike in _by_kind(limits, cost, column))]
    counts, shares, dense = [], [], []
    for rows, members in groups:
        models = {str(i): preview(mutator, _plan_of(cost, row)) for i, row in enumerate(rows)}
        found = measure({"dense": preview(mutator, _plan_of(cost, cost.full)), **models})
        dense.append(found["dense"])
        measured = [found[name].relative_to(found["dense"]) for name in models]
        for first, other in members:  # what holds for one unit of a kind holds for all
            copied = rows.copy()
            copied[:, [first, other]] = rows[:, [other, first]]
            counts.append(copied)
            shares.append(measured)
    ms = float(np.median([one.ms.median for one in dense]))
    return LatencyTable(np.concatenate(counts), np.concatenate(shares).astype(np.float64), ms, str(dense[0]))


def _by_kind(limits: Sequence[UnitLimits], cost: CostModel, column: Mapping[str, int]) -> list[list[UnitLimits]]:
    """Return the units that have a choice, those together whose widths cost the same wherever they are."""
    found: dict[Any, list[UnitLimits]] = {}
    for limit in limits:
        if len(limit.allowed) > 1:
            row = cost.full.copy()
            row[column[limit.name]] = limit.allowed[0]
            costs = [cost.measure(key, row) for key in ("macs", "memory")]  # equal layers may see images of other sizes
            found.setdefault((limit.kind, limit.num_channels, limit.allowed, *costs), []).append(limit)
    return list(found.values())


def _alone(
    alike: Sequence[UnitLimits], full: IntArray, column: Mapping[str, int]
) -> tuple[IntArray, list[tuple[int, int]]]:
    """Return structures `[K, U]` in which only the first unit is cut, and pairs of its column and that of each unit."""
    first = alike[0]
    sizes = sorted({_snapped(first, level) for level in (0.0, *_LEVELS)} - {first.num_channels})
    rows = np.repeat(full[None], len(sizes), 0)
    rows[:, column[first.name]] = sizes
    return rows, [(column[first.name], column[other.name]) for other in alike]


def _snapped(limit: UnitLimits, level: float) -> int:
    """Return the allowed count nearest to a share of a unit's channels."""
    return min(limit.allowed, key=lambda count: abs(count - level * limit.num_channels))


def _plan_of(cost: CostModel, counts: IntArray) -> KeepPlan:
    """Return a plan that keeps the first channels of each unit: for the time it is all the same which."""
    return KeepPlan({name: tuple(range(count)) for name, count in zip(cost.names, counts.tolist(), strict=True)})
