"""The whole report as one mapping: what was asked, what each step of the schedule left, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_prune.graph.cost import CostModel
from lightning_prune.report.history import History

__all__ = ["COSTS", "make_document"]

VERSION = 1
COSTS = ("macs", "params", "channels", "memory")
_PER_EXAMPLE = ("macs", "memory")  # the model prices the whole example batch


def make_document(
    history: History, cost: CostModel, kept: Mapping[str, int], facts: Mapping[str, Any], monitor: str | None
) -> dict[str, Any]:
    """Return the report of a run.

    Metrics are those of validations, and means over epochs of training. Around a step they are ``before`` (the last
    value under the structure before it), ``after`` (the first one under its own) and ``recovered`` (the last one under
    its own); None where none was read.

    Args:
        history: What happened.
        cost: Of the model.
        kept: Unit name -> channels that remain now.
        facts: What else belongs in it, as plain data: "model", "target", "schedule", "units", ...
        monitor: The metric to show first; None, or one that nobody logged, takes the first that was read.

    Returns:
        `facts`, and beside them: "metric" (the one to show first), "readings", "steps" (each with "kept" channels of
        every unit, "costs", what "remains" of them, in (0, 1], and "metrics") and "final" ("costs", dense and pruned,
        and "metrics", before the first step and at the end). MACs and memory (bytes) are those of one example.
    """
    names = history.metrics
    metric = monitor if monitor in names else next(iter(names), None)
    readings = [
        {"epoch": r.epoch, "global_step": r.step, "after_steps": r.structure, "metrics": r.metrics}
        for r in history.readings
    ]
    return {
        "version": VERSION,
        **facts,
        "metric": metric,
        "readings": readings,
        "steps": _steps(history, cost),
        "final": {"costs": _final_costs(cost, kept), "metrics": {name: _final(history, name) for name in names}},
    }


def _counts(cost: CostModel, kept: Mapping[str, int]) -> list[int]:
    """Return kept channels in the order of the cost model; a unit that is not named keeps all."""
    return [kept.get(name, full) for name, full in zip(cost.names, cost.full.tolist(), strict=True)]


def _measured(cost: CostModel, key: str, rows: list[list[int]]) -> list[int]:
    values = cost.measure_many(key, np.array(rows, np.int64).reshape(len(rows), len(cost.names))).tolist()
    return [value // max(cost.batch_size, 1) if key in _PER_EXAMPLE else value for value in values]


def _steps(history: History, cost: CostModel) -> list[dict[str, Any]]:
    structures = [dict(zip(history.units, change.kept, strict=True)) for change in history.changes]
    rows = [_counts(cost, structure) for structure in structures]
    table = {key: _measured(cost, key, [_counts(cost, {}), *rows]) for key in COSTS}
    steps = []
    for index, (change, kept) in enumerate(zip(history.changes, structures, strict=True)):
        costs = {key: values[index + 1] for key, values in table.items()}
        steps.append(
            {
                "epoch": change.epoch,
                "global_step": change.step,
                "progress": change.progress,
                "restored": change.why,
                "kept": kept,
                "costs": costs,
                "remains": {key: value / max(table[key][0], 1) for key, value in costs.items()},
                "metrics": {name: _around(history, index, name) for name in history.metrics},
            }
        )
    return steps


def _around(history: History, index: int, name: str) -> dict[str, float | None]:
    """Return a metric around one change."""
    before, after = history.of_structure(index, name), history.of_structure(index + 1, name)
    return {
        "before": before[-1] if before else None,
        "after": after[0] if after else None,
        "recovered": after[-1] if after else None,
    }


def _final_costs(cost: CostModel, kept: Mapping[str, int]) -> dict[str, dict[str, float]]:
    found = {}
    for key in COSTS:
        dense, pruned = _measured(cost, key, [_counts(cost, {}), _counts(cost, kept)])
        found[key] = {"dense": dense, "pruned": pruned, "remains": pruned / max(dense, 1)}
    return found


def _final(history: History, name: str) -> dict[str, float | None]:
    """Return the last value of a metric before the first change, and after the last one."""
    dense = history.of_structure(0, name) if history.is_whole else []
    pruned = history.of_structure(len(history.changes), name)
    ends = [values[-1] if values else None for values in (dense, pruned)]
    difference = None if ends[0] is None or ends[1] is None else ends[1] - ends[0]
    return {"before": ends[0], "final": ends[1], "difference": difference}
