"""Measured time of a model's forward: on its own, and as a target of pruning; and its peak memory.

found = compare({"dense": model, "pruned": small}, images, backend="onnxruntime")
print(found["pruned"], found["pruned"].relative_to(found["dense"]))

outcome = plan_measured({"latency": 0.6}, mutator, scores)  # for `PruningCallback`, the target is enough
mutator.apply(outcome.plan)
"""

from __future__ import annotations

from lightning_prune.latency.measure import Measurement, Quartiles, compare, measure
from lightning_prune.latency.meet import Attempt, LatencyOutcome, meet, plan_measured
from lightning_prune.latency.memory import PeakMemory, peak_memory
from lightning_prune.latency.settings import LatencySettings, resolve_latency
from lightning_prune.latency.table import LatencyCosts, LatencyTable, build_table

__all__ = [
    "Attempt",
    "LatencyCosts",
    "LatencyOutcome",
    "LatencySettings",
    "LatencyTable",
    "Measurement",
    "PeakMemory",
    "Quartiles",
    "build_table",
    "compare",
    "measure",
    "meet",
    "peak_memory",
    "plan_measured",
    "resolve_latency",
]
