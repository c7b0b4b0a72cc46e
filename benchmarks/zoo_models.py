"""Examine every real model that the library is tried on: what is found, what it takes, and whether all of it holds.

Usage: `PYTHONPATH=. python benchmarks/zoo_models.py`, or `make zoo`.

One process for each model, one after the other. The file is written after each, and a model that the file holds at this
commit is not examined again; `--again` does. Ends with an error if something does not hold.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.common import ROOT, describe_environment, earlier_results, write_result
from benchmarks.process import run_apart
from tests.examine import examine, summarize_units, unexpected
from tests.models import import_timm, models

EXPECTED = ROOT / "tests" / "expected_units.json"
LIMIT_S = 600
CONFIG = {
    "analysis": "prepare_from_supernet in eval and train mode on two images or sentences, float64",
    "checks": "float64, random choice of every unit: dynamic == exported in eval and train mode, == zero-masked where "
    "no unit renormalizes or rescales; MACs == FlopCounterMode / 2",
}


def examine_apart(name: str) -> dict[str, Any]:
    """Return the record of one model from a process of its own; how it ended where there is none."""
    try:
        record: dict[str, Any] = run_apart(examine, name, limit_s=LIMIT_S)
    except RuntimeError as error:
        return {"name": name, "failures": [str(error)]}
    return record


def row_of(record: dict[str, Any]) -> str:
    """Return one line of the table."""
    if "families" not in record:
        return f"{record['name']:46}failed"
    families = ", ".join(f"{n} {family}" for family, n in record["families"].items())
    absent = "".join(f", no {family}" for family in record["absent"])
    times = f"{record['cpu_s']:6.2f} s {record['peak_mib']:5} MiB {record['prunable_macs']:7.1%}"
    return f"{record['name']:46}{times}  {families}{absent}"


def write_expected(expected: dict[str, Any]) -> None:
    """Write `tests/expected_units.json`, one line for each model."""
    lines = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in sorted(expected.items()))
    EXPECTED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main() -> None:
    """Examine the models asked for, write `results/zoo_models.json`, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names")
    parser.add_argument("--again", action="store_true", help="also what was examined at this commit")
    parser.add_argument("--expect", action="store_true", help="write the units found to tests/expected_units.json")
    arguments = parser.parse_args()
    environment = {**describe_environment("timm", "torchvision", "transformers"), "threads": 1}
    results = earlier_results("zoo_models", environment["commit"])
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    wrong = []
    import_timm()
    for name in models():
        if not any(fnmatchcase(name, pattern) for pattern in arguments.only):
            continue
        if arguments.again or name not in results:
            results[name] = examine_apart(name)
            write_result("zoo_models", CONFIG, environment, results)
        record = results[name]
        if arguments.expect and "families" in record:
            expected[name] = summarize_units(record)
        problems = unexpected(record, expected)
        print(row_of(record) + "".join(f"\n    {problem}" for problem in problems), flush=True)
        wrong += [name] if problems else []
    if arguments.expect:
        write_expected(expected)
    if wrong:
        raise SystemExit(f"Something does not hold for {len(wrong)} of {len(results)} models: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
