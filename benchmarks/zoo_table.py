"""The table of `benchmarks/zoo.py`: one row for each model, and what it comes to for each collection of models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS

Record = Mapping[str, Any]

FACTOR = 3  # so many times as quick it is meant to be where Torch-Pruning is slow
TOLERANCE = 1e-6  # relative, float64: rounding is far below, a mistake far above
LEGEND = """`benchmarks/zoo.py` at {where}. Every figure is in `zoo.json`.

Seconds of the processor and peak memory: from the built model to the small one, one image of full size, float32. MACs
left: after halving every unit or group. Prunable: the share of the MACs that goes when every unit keeps one channel.
Right: the pruned model is the dense one with the removed channels at 0; where a norm runs over what was removed, that
cannot be said from outside, and one that runs counts as working. Ratio: seconds of Torch-Pruning over ours."""
SIDES = ("lightning_prune", "torch_pruning")
TITLES = {"lightning_prune": "lightning_prune", "torch_pruning": "Torch-Pruning"}
FAULTS = {
    "forward_error": "the pruned model does not run",
    "error": "error",
    "no_op": "nothing was pruned",
    "shapes": "outputs have other shapes",
    "wrong": "not the dense model without the channels",
    "exported": "exported is not dynamic",
    "ties": "tied weights came apart",
    "scale": "the scale of attention changed unsaid",
}


def faults_of(side: Record, renormalizing: bool) -> list[str]:
    """Return what is wrong with the result of one library, as keys of `FAULTS`.

    Args:
        side: Its record.
        renormalizing: The model has units over which a norm or an attention scale runs: there the pruned model may
            differ from the dense one with zeros.
    """
    if "error" in side:
        return ["error"]
    if "forward_error" in side:
        return ["forward_error"]
    found = ["no_op"] if side.get("no_op") else []
    found += [] if side.get("shapes_kept", True) else ["shapes"]
    comparable = not renormalizing or "exported_error" in side
    found += ["wrong"] if comparable and side.get("zeroed_error", 0.0) > TOLERANCE else []
    found += ["exported"] if side.get("exported_error", 0.0) > TOLERANCE else []
    found += ["ties"] if side.get("ties_kept") is False else []
    silent = side.get("scale_kept") is False and not side.get("rescaling")
    return found + (["scale"] if silent else [])


def write_table(results: Mapping[str, Record], environment: Mapping[str, Any]) -> Path:
    """Write `results/zoo.md`.

    Args:
        results: Name of the model -> library -> record.
        environment: What `describe_environment` returned.
    """
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    where = f"{environment['commit'][:10]}; {environment['machine']}, one thread; {versions}"
    libraries = dict.fromkeys(name.partition(":")[0] for name in results)
    parts = ["# Real models, halved", LEGEND.format(where=where), _summary(results)]
    parts += [_models(library, results) for library in libraries]
    path = RESULTS / "zoo.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _faults(record: Record) -> dict[str, list[str]]:
    ours = record["lightning_prune"]
    return {side: faults_of(record[side], bool(ours.get("renormalizing"))) for side in SIDES}


def _summary(results: Mapping[str, Record]) -> str:
    head = "| | models | works | median s | longest s | works, Torch-Pruning | median s | longest s | median ratio |"
    rows = [head, "| --- |" + " ---: |" * 8]
    for library in dict.fromkeys(name.partition(":")[0] for name in results):
        records = [record for name, record in results.items() if name.startswith(f"{library}:")]
        cells = [library, str(len(records))]
        for side in SIDES:
            seconds = [record[side]["cpu_s"] for record in records if "cpu_s" in record[side]] or [float("nan")]
            right = sum(not _faults(record)[side] for record in records)
            cells += [str(right), f"{median(seconds):.2f}", f"{max(seconds):.2f}"]
        cells.append(f"{median([r for record in records if (r := _ratio(record))] or [float('nan')]):.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join((*rows, "", _compare_slow(results)))


def _ratio(record: Record) -> float | None:
    """Return the seconds of Torch-Pruning over ours, None where one of the two does not finish."""
    ours, theirs = (record[side].get("cpu_s") for side in SIDES)
    return theirs / ours if ours and theirs else None


def _compare_slow(results: Mapping[str, Record]) -> str:
    """Say how the two compare where Torch-Pruning takes more than a second."""
    slow = {n: r for n, record in results.items() if (r := _ratio(record)) and record["torch_pruning"]["cpu_s"] > 1}
    few = ", ".join(f"{name.partition(':')[2]} {ratio:.1f}" for name, ratio in slow.items() if ratio < FACTOR)
    quick = sum(ratio >= FACTOR for ratio in slow.values())
    return (
        f"Where Torch-Pruning takes more than a second, on {len(slow)} models, the median ratio is "
        f"{median(slow.values() or [float('nan')]):.1f}, and at least {FACTOR} on {quick} of them. The others: {few}."
    )


def _models(library: str, results: Mapping[str, Record]) -> str:
    head = "| model | s | MiB | units | prunable | MACs left | | s | MiB | groups | MACs left | Torch-Pruning | ratio |"
    rows = [f"## {library}", "", head, "| --- |" + " ---: |" * 5 + " --- |" + " ---: |" * 4 + " --- | ---: |"]
    for name, record in results.items():
        if not name.startswith(f"{library}:"):
            continue
        ours, theirs = record["lightning_prune"], record["torch_pruning"]
        fine = {"lightning_prune": "right", "torch_pruning": "runs" if ours.get("renormalizing") else "right"}
        faults = {side: ", ".join(FAULTS[f] for f in found) or fine[side] for side, found in _faults(record).items()}
        first = [_number(ours, key) for key in ("cpu_s", "peak_mib", "units", "prunable_macs", "macs_left")]
        second = [_number(theirs, key) for key in ("cpu_s", "peak_mib", "units", "macs_left")]
        ratio = "" if (found := _ratio(record)) is None else f"{found:.1f}"
        said = faults["torch_pruning"] + (f": {theirs['error'].partition(' (')[0]}" if "error" in theirs else "")
        cells = [name.partition(":")[2], *first, faults["lightning_prune"], *second, said.replace("|", "/"), ratio]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(record: Record, key: str) -> str:
    if key not in record:
        return ""
    if key in ("macs_left", "prunable_macs"):
        return f"{record[key]:.1%}"
    return f"{record[key]:.2f}" if key == "cpu_s" else f"{record[key]:.0f}"
