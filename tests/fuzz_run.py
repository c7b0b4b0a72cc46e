"""Examine many random networks on all cores, to be stopped and gone on with at will; `make fuzz` runs it.

Each seed is a network of its own. What a seed showed is a line in a file that belongs to the commit, and a seed that
has a line is not looked at again. When all have one, the summary goes to `benchmarks/results/fuzz.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, describe_environment, write_result
from tests.fuzz import MOST_NODES, Network, random_network, shrink
from tests.fuzz_blocks import BLOCKS
from tests.fuzz_checks import Outcome, examine

LISTED = 20  # failures that the summary spells out


def look_at(seed: int) -> dict[str, Any]:
    """Return what the network of a seed showed, as plain data; one that fails is made smaller."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, network = time.perf_counter(), random_network(seed)
    outcome = attempt(network)
    found: dict[str, Any] = {"seed": seed, "blocks": dict(Counter(BLOCKS[n.block].family for n in network.nodes))}
    if isinstance(outcome, Outcome):
        found |= {"units": dict(outcome.units), "pruned": sorted(outcome.pruned)}
        found |= {"structures": outcome.structures, "refused": outcome.refused}
    else:
        smaller = shrink(network, lambda each: kind_of(attempt(each)) == kind_of(outcome))
        found |= {"failure": outcome[:500], "network": repr(smaller)}
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def attempt(network: Network) -> Outcome | str:
    """Return the outcome, or the words of the failure."""
    try:
        return examine(network)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def kind_of(outcome: Outcome | str) -> str:
    return "" if isinstance(outcome, Outcome) else re.sub(r"\d[\d.e+-]*", "#", outcome)[:60]


def known(path: Path, seeds: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return the lines of a file for the seeds."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    wanted = set(seeds)
    return {line["seed"]: line for line in map(json.loads, lines) if line["seed"] in wanted}


def run(seeds: Sequence[int], processes: int, path: Path) -> list[dict[str, Any]]:
    """Look at all seeds that have no line yet; return all lines."""
    path.parent.mkdir(exist_ok=True)
    found = known(path, seeds)
    missing = [seed for seed in seeds if seed not in found]
    print(f"{len(found)} of {len(seeds)} networks are known from {path}", flush=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool, path.open("a", encoding="utf-8") as file:
        for line in pool.imap_unordered(look_at, missing, chunksize=4):
            found[line["seed"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
            if "failure" in line:
                print(f"seed {line['seed']}: {line['failure'].splitlines()[0]}\n  {line['network']}", flush=True)
            if len(found) % 100 == 0:
                print(f"{len(found)} of {len(seeds)}", flush=True)
    return [found[seed] for seed in seeds]


def summarize(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what all lines say together."""
    units, blocks, networks, pruned = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for line in lines:
        units.update(line.get("units", {}))
        blocks.update(line["blocks"])
        networks.update(line["blocks"].keys())
        pruned.update(line.get("pruned", []))
    failures = [line for line in lines if "failure" in line]
    return {
        "examples": len(lines),
        "failures": len(failures),
        "share_with_units": round(sum(bool(line.get("units")) for line in lines) / len(lines), 4),
        "units_by_axis": dict(units.most_common()),
        "structures": sum(line.get("structures", 0) for line in lines),
        "refused_structures": sum(len(line.get("refused", [])) for line in lines),
        "families": {
            name: {"blocks": count, "networks": networks[name], "networks_where_pruned": pruned[name]}
            for name, count in blocks.most_common()
        },
        "seconds": round(sum(line["seconds"] for line in lines)),
        "failed": [{k: line[k] for k in ("seed", "failure", "network")} for line in failures[:LISTED]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=int(os.environ.get("EXAMPLES", "20000")))
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    environment = describe_environment("hypothesis")
    path = ROOT / "runs" / f"fuzz-{environment['commit'][:12]}.jsonl"
    if environment["uncommitted_changes"]:
        path.unlink(missing_ok=True)
    lines = run(range(arguments.seed, arguments.seed + arguments.examples), arguments.processes, path)
    config = {"examples": arguments.examples, "seed": arguments.seed, "most_nodes": MOST_NODES}
    results = summarize(lines)
    print(write_result("fuzz", config, environment, results))
    if results["failures"]:
        raise SystemExit(f"{results['failures']} of {results['examples']} networks fail")


if __name__ == "__main__":
    main()
