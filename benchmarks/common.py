"""What the benchmarks share: the record of where they ran, timing in turns, ratios with their spread, and the file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def describe_environment(*packages: str) -> dict[str, Any]:
    """Return versions, commit, machine and threads of this process, as plain data without paths or host names.

    Args:
        packages: Further distributions whose version matters.
    """
    names = ("lightning-prune", "torch", *packages)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "lightning_prune")),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "system": platform.system(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _version(package: str) -> str:
    """Return the version of an installed package, in the environment or beside it."""
    return next(iter(distributions(name=package, path=[*sys.path, str(ROOT / ".zoo")]))).version


def _git(*arguments: str) -> str:
    """Return what git prints; nothing outside a checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 5
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of each run, one per round.

    All runs take their turn in every round, so that a busy machine slows all alike, and another one begins each round,
    so that none always follows the same neighbour.

    Args:
        runs: What to time, by name.
        rounds: How often; the warm-up rounds before are not counted.
        warm_up: Rounds that are thrown away.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(warm_up + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            if index >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: tuple(values) for name, values in times.items()}


def compare_times(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """Return the median and the best milliseconds of each run, and its time relative to `base`.

    A ratio is taken inside each round, between neighbours in time; the median over the rounds is reported, with the
    first and third quartile as its spread.

    Args:
        times: Name -> seconds, one per round.
        base: The name that all are compared with.
    """
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(values), 3),
            "best_ms": round(1e3 * min(values), 3),
            "ratio": summarize([a / b for a, b in zip(values, times[base], strict=True)]),
        }
        for name, values in times.items()
    }


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles, rounded to three digits.

    Args:
        values: At least two.
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def earlier_results(name: str, commit: str) -> dict[str, Any]:
    """Return the results of a benchmark that were written at this commit already.

    Args:
        name: Of the benchmark.
        commit: The one of now.
    """
    path = RESULTS / f"{name}.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = written.get("environment", {}).get("commit") == commit
    found: dict[str, Any] = written["results"] if same else {}
    return found


def write_result(name: str, config: Mapping[str, Any], environment: Mapping[str, Any], results: Any) -> Path:
    """Write one benchmark to `benchmarks/results/{name}.json`.

    Args:
        name: Of the benchmark.
        config: What was asked for.
        environment: What `describe_environment` returned when it began.
        results: What came out, plain data.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    where = {**environment, "load_average_after": round(os.getloadavg()[0], 2)}
    record = {"benchmark": name, "config": config, "environment": where, "results": results}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
