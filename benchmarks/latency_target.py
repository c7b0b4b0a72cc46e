"""Does a latency that is asked for come out? A ResNet-20 and torchvision's resnet18, pruned to 0.6 of their time.

Usage: `PYTHONPATH=. python benchmarks/latency_target.py`, or `make bench`.

Random weights, l1 scores, one global threshold: for the time it is all the same which channels go. Beside what the plan
was predicted and measured to take, before and after corrections, stands what the same network takes at 0.6 of its
multiply-adds. "Measured again" is measured once more, with more rounds, after everything has been decided.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import describe_environment, write_result
from benchmarks.step import make_resnet
from lightning_prune.importance import l1
from lightning_prune.latency import LatencySettings, Quartiles, build_table, compare, plan_measured
from lightning_prune.mutator import ChannelMutator
from lightning_prune.mutator.preview import preview
from lightning_prune.plan import KeepPlan
from lightning_prune.targets import make_plan
from tests.torchvision_shim import import_torchvision

SHARE = 0.6
DIVISOR = 8


class Setting(NamedTuple):
    """What is asked of one network."""

    name: str
    make: Callable[[], nn.Module]
    images: tuple[int, ...]
    backend: str


def resnet18() -> nn.Module:
    """Return torchvision's resnet18 without trained weights."""
    import_torchvision()
    from torchvision.models import resnet18 as make

    model: nn.Module = make()
    return model


SETTINGS = (
    Setting("ResNet-20, 8 CIFAR images, eager", lambda: make_resnet(16, 3), (8, 3, 32, 32), "eager"),
    Setting("ResNet-20, 8 CIFAR images, onnxruntime", lambda: make_resnet(16, 3), (8, 3, 32, 32), "onnxruntime"),
    Setting("resnet18, one image, eager", resnet18, (1, 3, 224, 224), "eager"),
)


def rounded(share: Quartiles) -> list[float]:
    """Return median, first and third quartile."""
    return [round(value, 3) for value in share]


def ask(setting: Setting, rounds: int) -> dict[str, Any]:
    """Return what came of asking for `SHARE` of the latency."""
    torch.manual_seed(0)
    images = torch.randn(setting.images)
    mutator = ChannelMutator(example_input=images)
    mutator.prepare_from_supernet(setting.make())
    scores: dict[str, Tensor] = {unit.name: l1(unit) for unit in mutator.units}
    limits = mutator.limits(DIVISOR, 0.1)
    settings = LatencySettings(backend=setting.backend, rounds=rounds, threads=1)
    start = time.perf_counter()
    table = build_table(mutator, limits, settings.measure_with(images))
    table_s, start = time.perf_counter() - start, time.perf_counter()
    outcome = plan_measured(
        {"latency": SHARE}, mutator, scores, latency=settings, table=table, divisor=DIVISOR, min_ratio=0.1
    )
    plan_s = time.perf_counter() - start
    assert outcome.chosen is not None
    by_macs = make_plan({"macs": SHARE}, scores, limits, mutator.graph.cost)
    dense = KeepPlan({unit.name: tuple(range(unit.num_channels)) for unit in mutator.units})
    plans = {"dense": dense, "latency": outcome.plan, "macs": by_macs}
    models = {name: preview(mutator, plan) for name, plan in plans.items()}
    again = compare(models, images, setting.backend, rounds=5 * rounds, threads=1)
    cost, first = mutator.graph.cost, outcome.attempts[0]
    counts = [outcome.plan.counts()[name] for name in cost.names]
    return {
        "asked": SHARE,
        "predicted": round(first.predicted, 3),
        "measured, first plan": rounded(first.measured),
        "corrections": outcome.corrections,
        "measured, after corrections": rounded(outcome.chosen.measured),
        "rounds of it": outcome.chosen.time.rounds,
        "measured again": rounded(again["latency"].relative_to(again["dense"])),
        "macs of it": round(cost.measure("macs", counts) / cost.measure("macs", cost.full), 3),
        "measured, 0.6 of MACs": rounded(again["macs"].relative_to(again["dense"])),
        "dense_ms": rounded(again["dense"].ms),
        "floor": rounded(table.floor),
        "table": {"seconds": round(table_s, 1), "structures": len(table.counts), "units": len(limits)},
        "plan_seconds": round(plan_s, 1),
    }


def main() -> None:
    """Ask for every setting and write `results/latency_target.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each measurement")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    environment = describe_environment("torchvision", "onnxruntime")
    config = {"rounds": rounds, "divisor": DIVISOR, "min_ratio": 0.1, "shares": "median, first and third quartile"}
    results = {}
    for setting in SETTINGS:
        results[setting.name] = ask(setting, rounds)
        print(
            setting.name, *(f"{key}: {value}" for key, value in results[setting.name].items()), sep="\n  ", flush=True
        )
        write_result("latency_target", config, environment, results)


if __name__ == "__main__":
    main()
