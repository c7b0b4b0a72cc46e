"""How long it takes to know the structure of a network: this library against Torch-Pruning.

Usage: `PYTHONPATH=. python benchmarks/analysis.py`, or `make bench`.

Each measurement is a process of its own, and the two libraries take turns. The clock starts when the packages are
imported and the network is built. Here: `ChannelMutator.prepare_from_supernet`, which traces, certifies and converts;
then half of every unit is chosen, certified and exported. There: the pruner, which is told the classifier to spare,
and one step to half of the channels.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, describe_environment, summarize, write_result

MODELS = ("resnet50", "densenet121")
SHAPE = (1, 3, 224, 224)


def time_lightning_prune(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the seconds of the analysis, and of choosing and exporting half of every unit after it."""
    from lightning_prune.export import export_pruned
    from lightning_prune.mutator import ChannelMutator

    start = time.perf_counter()
    mutator = ChannelMutator(example_input=images)
    mutator.prepare_from_supernet(model)
    analyzed = time.perf_counter()
    mutator.set_choices({"*": 0.5})
    export_pruned(model)
    return {"analysis": analyzed - start, "halving": time.perf_counter() - analyzed}


def time_torch_pruning(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the seconds of making the pruner, and of one step to half of the channels."""
    import torch_pruning  # type: ignore[import-untyped] # carries no annotations

    model.eval()
    classifiers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    start = time.perf_counter()
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, images, importance=importance, pruning_ratio=0.5, ignored_layers=classifiers
    )
    analyzed = time.perf_counter()
    pruner.step()
    return {"analysis": analyzed - start, "halving": time.perf_counter() - analyzed}


LIBRARIES = {"lightning_prune": time_lightning_prune, "torch_pruning": time_torch_pruning}


def measure_here(library: str, name: str) -> dict[str, float]:
    """Return the seconds of each phase in this process, and its peak memory in MiB."""
    from tests.torchvision_shim import import_torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torchvision = import_torchvision()
    if library == "torch_pruning":
        import torch_pruning  # noqa: F401 - imports are not on the clock
    else:
        import lightning_prune.export
        import lightning_prune.mutator  # noqa: F401
    model = getattr(torchvision.models, name)(weights=None)
    seconds = LIBRARIES[library](model, torch.randn(SHAPE))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**seconds, "together": sum(seconds.values()), "peak_mib": peak}


def measure_in_process(library: str, name: str) -> dict[str, float]:
    """Return what `measure_here` finds in a fresh process."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--library", library, "--model", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{library} failed on {name}:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Return medians and spread of both libraries on one network, and how they relate round by round."""
    found: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for index in range(rounds):
        for library in sorted(LIBRARIES, reverse=bool(index % 2)):
            found[library].append(measure_in_process(library, name))
    ours, theirs = found["lightning_prune"], found["torch_pruning"]
    ratios = {
        "analysis / (pruner + step)": [a["analysis"] / b["together"] for a, b in zip(ours, theirs, strict=True)],
        "together / together": [a["together"] / b["together"] for a, b in zip(ours, theirs, strict=True)],
    }
    summary: dict[str, Any] = {}
    for library, rows in found.items():
        seconds = {f"{key}_s": summarize([row[key] for row in rows]) for key in ("analysis", "halving", "together")}
        summary[library] = {**seconds, "peak_mib": round(median(row["peak_mib"] for row in rows))}
    return {**summary, "ratio": {key: summarize(values) for key, values in ratios.items()}}


def main() -> None:
    """Measure every network and write `results/analysis.json`; or one measurement, as a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7, help="processes for each library and network")
    parser.add_argument("--library", choices=sorted(LIBRARIES), help="measure once, here")
    parser.add_argument("--model", choices=MODELS, help="what to measure here")
    arguments = parser.parse_args()
    if arguments.library:
        print(json.dumps(measure_here(arguments.library, arguments.model)))
        return
    environment = {**describe_environment("torch-pruning"), "threads": 1}
    results = {name: compare(name, arguments.rounds) for name in MODELS}
    for name, result in results.items():
        print(name)
        for library in LIBRARIES:
            row = result[library]
            phases = ", ".join(f"{key} {row[f'{key}_s']['median']:.2f} s" for key in ("analysis", "halving"))
            print(f"  {library:16}{phases}, peak {row['peak_mib']} MiB")
        for key, ratio in result["ratio"].items():
            print(f"  {key}: {ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]")
    config = {
        "input": list(SHAPE),
        "rounds": arguments.rounds,
        "lightning_prune": {"analysis": "prepare_from_supernet", "halving": "set_choices 0.5, certified, and export"},
        "torch_pruning": {"analysis": "MagnitudePruner made", "halving": "one step, pruning_ratio 0.5"},
    }
    write_result("analysis", config, environment, results)


if __name__ == "__main__":
    main()
