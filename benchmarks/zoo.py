"""Every real model, halved by this library and by Torch-Pruning: does it work, is it right, and what does it take?

Usage: `PYTHONPATH=. python benchmarks/zoo.py`, or `make bench`.

Seconds and memory are those of the analysis and of halving every unit on one image of full size in float32; of making
the pruner and one step there. What is right is found on smaller inputs in float64. Each of the four is a process of its
own with a limit, and the libraries take turns. The files are written after each model, and a model that they hold at
this commit is not run again; `--again` does.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

import lightning_prune.compact
import lightning_prune.export
import lightning_prune.mutator  # noqa: F401 - imports are not on the clock
from benchmarks import zoo_sides
from benchmarks.common import RESULTS, describe_environment, write_result
from benchmarks.process import run_apart
from benchmarks.zoo_table import write_table
from tests.models import import_timm, models

Record = dict[str, Any]

LIMIT_GIB = 16
SIDES: dict[str, tuple[Callable[[str], Record], Callable[[str, bool], Record]]] = {
    "lightning_prune": (zoo_sides.time_lightning_prune, zoo_sides.check_lightning_prune),
    "torch_pruning": (zoo_sides.time_torch_pruning, zoo_sides.check_torch_pruning),
}


def run(side: str, name: str, rounds: int, limit_s: float) -> Record:
    """Return what one library makes of one model; `error` says what came instead."""
    time_it, check = SIDES[side]
    try:
        times = [run_apart(time_it, name, limit_s=limit_s, limit_gib=LIMIT_GIB) for _ in range(rounds)]
        found: Record = {key: round(median(t[key] for t in times), 3) for key in times[0]}
    except RuntimeError as error:
        return {"error": str(error)}
    for full in (False, True):  # some cannot prune what a small image makes smaller
        try:
            return found | run_apart(check, name, full, limit_s=limit_s, limit_gib=LIMIT_GIB)
        except RuntimeError as error:
            problem = str(error)
    return {**found, "error": problem}


def earlier_results(config: Record, commit: str) -> dict[str, Any]:
    """Return the results that were written already with this configuration at this commit."""
    path = RESULTS / "zoo.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = written.get("config") == config and written["environment"]["commit"] == commit
    found: dict[str, Any] = written["results"] if same else {}
    return found


def main() -> None:
    """Run the models asked for and write `results/zoo.json` and `results/zoo.md`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each process")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is timed; the median counts")
    parser.add_argument("--again", action="store_true", help="also what was run at this commit")
    arguments = parser.parse_args()
    environment = {**describe_environment("torch-pruning", "timm", "torchvision", "transformers"), "threads": 1}
    config = {
        "ratio": zoo_sides.torch_pruning_settings.RATIO,
        "limit_s": arguments.limit,
        "limit_gib": LIMIT_GIB,
        "rounds": arguments.rounds,
        "timed": "float32, one image of full size or two short sentences; from the built model to the small one",
        "checked": "float64, two small images; one of full size where they fail",
        "torch_pruning": "arguments of its examples; see benchmarks/torch_pruning_settings.py",
    }
    results = earlier_results(config, environment["commit"])
    import_timm()
    importlib.import_module("torch_pruning")  # beside the environment, as timm
    names = [n for n in models() if any(fnmatchcase(n, pattern) for pattern in arguments.only)]
    for index, name in enumerate(names):
        if arguments.again or name not in results:
            record = {side: run(side, name, arguments.rounds, arguments.limit) for side in sides_of_round(index)}
            results[name] = {side: record[side] for side in SIDES}
            write_result("zoo", config, environment, results)
            write_table(results, environment)
        print(name, *(f"\n  {side}: {results[name][side]}" for side in SIDES), flush=True)


def sides_of_round(index: int) -> list[str]:
    """Return both libraries, another one first in every round."""
    return sorted(SIDES, reverse=bool(index % 2))


if __name__ == "__main__":
    main()
