"""What is too slow for every day: runs that are killed, and every case of the matrix; `make torture` runs it.

With `--quick` it does the share of the tests. The result goes to `benchmarks/results/torture.json`, or where `--to`
says.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe_environment, write_result
from tests.kills import torture
from tests.matrix import CASES, QUICK, examine_all

SETTINGS: dict[str, dict[str, Any]] = {
    "pruned, taylor, compact at the end": {},
    "pruned, l1, compact at each firing": {"importance": "l1", "compact": "each"},
    "pruned, wanda, by masks": {"importance": {"name": "wanda", "batches": 3}, "compact": "never", "report": True},
    "not pruned": {"is_pruned": False},
}
KILLS = 30


def killed(folder: Path, kills: int, seed: int, names: list[str]) -> dict[str, Any]:
    return {name: torture(folder / f"kills{k}", kills, seed + k, SETTINGS[name]) for k, name in enumerate(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["all", "kills", "matrix"], nargs="?", default="all")
    parser.add_argument("--quick", action="store_true", help="5 kills of one setting, 12 cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=None, help="a file for the results, in place of the committed one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    environment, start = describe_environment("lightning"), time.perf_counter()
    kills, cases = (5, QUICK) if arguments.quick else (KILLS, CASES)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part in ("all", "kills"):
            names = list(SETTINGS)[:1] if arguments.quick else list(SETTINGS)
            results["kills"] = killed(Path(folder), kills, arguments.seed, names)
        if arguments.part in ("all", "matrix"):
            results["matrix"] = examine_all(cases, Path(folder))
    results["seconds"] = round(time.perf_counter() - start)
    config = {"kills": kills, "seed": arguments.seed, "cases": len(cases), "part": arguments.part}
    if arguments.to is None:
        print(write_result("torture", config, environment, results))
    else:
        arguments.to.write_text(json.dumps(results), encoding="utf-8")
    failed = [name for name, found in results.get("kills", {}).items() if found["differences"]]
    failed += [name for name, message in results.get("matrix", {}).items() if message]
    if failed:
        raise SystemExit(f"These fail: {failed}")


if __name__ == "__main__":
    main()
