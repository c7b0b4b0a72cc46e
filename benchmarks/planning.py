"""How long it takes to plan: scores and costs in, the kept channels of every unit out.

Usage: `PYTHONPATH=. python benchmarks/planning.py`, or `make bench`.

One threshold over all units is searched for half of the multiply-adds, with divisor 8 and a floor of a tenth, as
`PruningCallback` does: for resnet50, and for the Llama of `benchmarks/large.py`, which is nowhere in memory; its scores
are random numbers. The clock runs from the scores to the plan. A plan of every channel, `divisor=1`, is timed too.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import describe_environment, summarize, write_result
from benchmarks.large import make_llama
from benchmarks.process import run_apart
from lightning_prune.mutator import ChannelMutator
from lightning_prune.targets import make_plan
from lightning_prune.units import SequentialMutableChannelUnit
from tests.torchvision_shim import import_torchvision

TARGET = {"macs": 0.5}
MIN_RATIO = 0.1
DIVISORS = (8, 1)
LIMITS_MS = {"resnet50": 50, "llama": 2000}


def prepared(model: str) -> ChannelMutator:
    """Return the mutator of a model, analyzed."""
    if model == "llama":
        network, example = make_llama()
    else:
        network, example = import_torchvision().models.resnet50(), torch.randn(1, 3, 224, 224)
    mutator = ChannelMutator(SequentialMutableChannelUnit, example)
    mutator.prepare_from_supernet(network)
    return mutator


def plan(model: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each plan and what it keeps, by divisor."""
    mutator = prepared(model)
    cost = mutator.graph.cost
    scores = {unit.name: torch.rand(unit.num_channels) for unit in mutator.units}
    found: dict[str, Any] = {"units": len(mutator.units), "channels": int(cost.full.sum())}
    for divisor in DIVISORS:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            made = make_plan(TARGET, scores, mutator.limits(divisor, MIN_RATIO), cost)
            times.append(1e3 * (time.perf_counter() - start))
        kept = made.counts()
        left = cost.measure("macs", np.array([kept[name] for name in cost.names]))
        found[f"divisor {divisor}"] = {
            "first_ms": round(times[0], 2),
            "ms": summarize(times),
            "macs_left": round(left / cost.measure("macs", cost.full), 4),
        }
    return found


def main() -> None:
    """Measure and write `results/planning.json`; an error if a limit is passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7, help="plans of each kind, at least two")
    rounds = parser.parse_args().rounds
    environment = {**describe_environment("torchvision", "transformers", "numpy"), "threads": 1}
    results = {model: run_apart(plan, model, rounds, limit_s=600) for model in LIMITS_MS}
    for model, found in results.items():
        print(model, found)
    config = {"target": TARGET, "min_ratio": MIN_RATIO, "scope": "global", "rounds": rounds, "limits_ms": LIMITS_MS}
    write_result("planning", config, environment, results)
    slow = {model: found["divisor 8"]["ms"]["median"] for model, found in results.items()}
    if any(slow[model] > limit for model, limit in LIMITS_MS.items()):
        raise SystemExit(f"Got {slow} ms; expected at most {LIMITS_MS}.")


if __name__ == "__main__":
    main()
