"""Describe a structure: each unit with its share of the cost and what it may lose, each frozen axis with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.channel_graph import home_of
from lightning_prune.graph.labels import IntArray
from lightning_prune.plan import StructureReport, UnitLimits, UnitRow

__all__ = ["describe_structure"]


def describe_structure(graph: ChannelGraph, limits: Sequence[UnitLimits], counts: IntArray) -> StructureReport:
    """Return the report of a structure.

    Args:
        graph: The graph of the model.
        limits: What a plan may do with each of its units.
        counts: Int64 `[U]`, kept channels in the order of `graph.cost.names`.
    """
    model, by_name = graph.cost, {limit.name: limit.at(1.0).allowed for limit in limits}
    least, most = (np.array([by_name[n][end] for n in model.names], np.int64) for end in (0, -1))
    total = max(model.measure("macs", model.full), 1)
    one_cut = np.where(np.eye(len(model.names), dtype=np.bool_), 1, model.full)
    shares = 1 - model.measure_many("macs", one_cut) / total
    rows = []
    for spec, kept, share in zip(graph.units, counts.tolist(), shares.tolist(), strict=True):
        remarks = [word for word, on in (("renormalizing", spec.renormalizing), ("rescaling", spec.rescaling)) if on]
        layers = tuple(dict.fromkeys(home_of(p.layer) or p.tensor for p in spec.places))
        rows.append(UnitRow(spec.name, spec.axis, spec.num_channels, kept, layers, share, tuple(remarks)))
    costs = {
        key: tuple(model.measure(key, row) for row in (counts, model.full, least, most))
        for key in ("macs", "params", "channels", "memory")
    }
    frozen = tuple((f.tensor, f.dim, f.size, f.reason) for f in graph.frozen)
    unknown = [
        f"no rule for {op} ({n} call{'s' * (n > 1)}): what it touches is frozen" for op, n in graph.unknown.items()
    ]
    return StructureReport(tuple(rows), frozen, costs, (*graph.notes, *unknown), model.batch_size)
