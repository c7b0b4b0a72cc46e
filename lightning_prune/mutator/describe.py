"""Describe a structure: each unit with its share of the cost and what it may lose, each frozen axis with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.channel_graph import home_of
from lightning_prune.graph.labels import IntArray
from lightning_prune.plan import StructureReport, UnitLimits, UnitRow
from lightning_prune.units import MutableChannelUnit

__all__ = ["describe_structure", "limits_of"]


def describe_structure(graph: ChannelGraph, units: Sequence[MutableChannelUnit], counts: IntArray) -> StructureReport:
    """Return the report of a structure.

    Args:
        graph: The graph of the model.
        units: Its units.
        counts: Int64 `[U]`, kept channels in the order of `graph.cost.names`.
    """
    model, by_name = graph.cost, {u.name: u for u in units}
    least = np.array([by_name[n].min_channels for n in model.names], np.int64)
    total = max(model.measure("macs", model.full), 1)
    one_cut = np.where(np.eye(len(model.names), dtype=np.bool_), 1, model.full)
    shares = 1 - model.measure_many("macs", one_cut) / total
    rows = []
    for spec, kept, share in zip(graph.units, counts.tolist(), shares.tolist(), strict=True):
        remarks = [word for word, on in (("renormalizing", spec.renormalizing), ("rescaling", spec.rescaling)) if on]
        layers = tuple(dict.fromkeys(home_of(p.layer) or p.tensor for p in spec.places))
        rows.append(UnitRow(spec.name, spec.axis, spec.num_channels, kept, layers, share, tuple(remarks)))
    costs = {
        key: (model.measure(key, counts), model.measure(key, model.full), model.measure(key, least))
        for key in ("macs", "params", "channels", "memory")
    }
    frozen = tuple((f.tensor, f.dim, f.size, f.reason) for f in graph.frozen)
    unknown = [f"no rule for {op} ({n} calls): what it touches is frozen" for op, n in graph.unknown.items()]
    return StructureReport(tuple(rows), frozen, costs, (*graph.notes, *unknown))


def limits_of(unit: MutableChannelUnit, divisor: int, min_ratio: float) -> UnitLimits:
    """Return what a plan may do with a unit (see `ChannelMutator.limits`).

    Args:
        unit: The unit; a fixed one stays at the count it has.
        divisor: Kept counts are multiples of it, on channel axes of at least twice as many channels.
        min_ratio: Floor of what remains, beside the unit's own.
    """
    if not unit.is_mutable:
        count = unit.activated_channels
        return UnitLimits(unit.name, unit.num_channels, unit.kind, count, 1, count)
    applies = unit.axis == "channels" and unit.num_channels >= 2 * divisor
    step = math.lcm(unit.divisor, divisor) if applies else unit.divisor
    floor = max(unit.min_channels, math.ceil(min_ratio * unit.num_channels - 1e-9))
    return UnitLimits(unit.name, unit.num_channels, unit.kind, floor, step)
