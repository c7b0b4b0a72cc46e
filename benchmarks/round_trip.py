"""Does what is written come back? Every topology of the tests and every classifier of torchvision, halved and deployed.

Usage: `PYTHONPATH=. python benchmarks/round_trip.py`, or `make zoo`.

One process halves a model and writes it as `.ckpt`, `.safetensors`, ONNX and a program of `torch.export`. Another one,
which has traced nothing, builds the dense model anew with other weights, loads the first two into it and runs all four:
the same outputs bit for bit, or within 1e-4 of the greatest. A third one exports the same network built narrow by hand,
for the topologies and the smallest classifiers of each family: no export is larger than that. And it exports the dense
one, where an export was refused: what is refused dense is not asked of the pruned one.

The file is written after each model, and a model that it holds at this commit is not tried again; `--again` does.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import describe_environment, earlier_results, write_result
from benchmarks.narrow import Attention, build_narrow
from benchmarks.process import run_apart
from lightning_prune import ChannelMutator, export_onnx, export_program, export_pruned, load_pruned, save_pruned
from lightning_prune.errors import ExportError
from lightning_prune.export.onnx import feed, open_session
from lightning_prune.export.verify import tensors_of
from tests.compare import calibrate_, outputs
from tests.models import QUICK_TORCHVISION, build, import_torchvision
from tests.zoo import ZOO

TOLERANCE = 1e-4  # of the greatest output, float32
LARGER = 1.02  # a file at most, than that of the network built narrow
ATTENTION_CODE = 8 * 1024  # bytes more, for each attention that is written otherwise by hand
LIMIT_S = 900
SAVED = (".ckpt", ".safetensors")
EXPORTS: dict[str, Callable[..., Path]] = {".onnx": export_onnx, ".pt2": export_program}
BATCHES = ("any", "fixed")  # what an export takes, best first
CONFIG = {
    "choice": "half of every unit, by l1",
    "images": "two, 64 pixels on a side unless the network asks for another size; float32, one thread",
    "narrow": "bytes of the file of the same network built narrow by hand",
}
Record = dict[str, Any]


def names() -> list[str]:
    """Return the models: `zoo:topology` of the tests and `torchvision:classifier`."""
    module = import_torchvision().models
    topologies = [f"zoo:{name}" for name, case in ZOO.items() if case.units]
    return topologies + [f"torchvision:{name}" for name in module.list_models(module=module)]


def make(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a dense model in eval mode, always with the same weights, and what to call it on."""
    library, _, own = name.partition(":")
    if library == "zoo":
        return ZOO[own].make().eval(), ZOO[own].inputs()
    model, args, _ = build(name)
    calibrate_(model.eval(), args)
    return model, args


def halved(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a small model in eval mode, with half of every unit, and what to call it on."""
    model, args = make(name)
    mutator = ChannelMutator(example_input=args)
    mutator.prepare_from_supernet(model)
    mutator.set_choices({unit.name: 0.5 for unit in mutator.mutable_units})
    return export_pruned(model).eval(), args


def write_files(name: str, folder: Path) -> Record:
    """Halve a model and write it in every format, with what it computes.

    Args:
        name: From `names`.
        folder: Where to.

    Returns:
        Suffix -> bytes, and for exports the batch that they take, or why there is none.
    """
    small, args = halved(name)
    torch.save(outputs(small, args), folder / "expected")
    record: Record = {}
    for suffix in SAVED:
        path = folder / f"small{suffix}"
        save_pruned(small, path)
        record[suffix] = {"bytes": path.stat().st_size}
    record.update(export_files(small, args, folder / "small", EXPORTS))
    (folder / "written").write_text(json.dumps(record), encoding="utf-8")
    return record


def export_files(model: nn.Module, args: tuple[Any, ...], stem: Path, suffixes: Iterable[str]) -> Record:
    """Export a model in some ways, each for any batch where that goes, else for one.

    Args:
        model: In eval mode.
        args: What to call it on.
        stem: Path without suffix.
        suffixes: Of `EXPORTS`.
    """
    return {suffix: _export(EXPORTS[suffix], model, args, stem.with_suffix(suffix)) for suffix in suffixes}


def _export(export: Callable[..., Path], model: nn.Module, args: tuple[Any, ...], path: Path) -> Record:
    refused = ""
    for batch in BATCHES:
        try:
            export(model, args, path, dynamic_batch=batch == "any", tolerance=TOLERANCE)
        except ExportError as error:
            refused = re.sub(rf"{re.escape(str(path.parent))}\S*/", "", str(error))  # the folder is no finding
            continue
        return {"batch": batch, "bytes": sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))}
    return {"refused": refused}


def read_files(name: str, folder: Path) -> Record:
    """Load what `write_files` wrote, and compare what it computes.

    Returns:
        Suffix -> whether the outputs are the same bit for bit, or their difference relative to the greatest.
    """
    args, expected, record = make(name)[1], torch.load(folder / "expected"), {}
    for suffix in SAVED:
        found = outputs(load_pruned(folder / f"small{suffix}", other_weights_(make(name)[0])), args)
        record[suffix] = {"same": all(map(torch.equal, found, expected)) and len(found) == len(expected)}
    for suffix in EXPORTS:
        path = folder / f"small{suffix}"
        if path.exists():
            record[suffix] = {"difference": float(f"{difference(run_file(path, args), expected):.2g}")}
    return record


def other_weights_(model: nn.Module) -> nn.Module:
    """Replace all floats that a state dict holds: what a file does not bring would be seen."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.0)
    return model


def run_file(path: Path, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the outputs of an export."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return tensors_of(torch.export.load(path).module()(*args))
    session = open_session(path, threads=1)
    return [torch.as_tensor(one) for one in session.run(None, feed(session, args, {}))]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the greatest difference relative to the greatest value of its output; infinite where shapes differ."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)


def is_built_narrow(name: str) -> bool:
    """Whether the exports are compared with those of the network built narrow: it takes as long as all the rest."""
    library, _, own = name.partition(":")
    return library == "zoo" or own in QUICK_TORCHVISION


def write_others(name: str, folder: Path) -> Record:
    """Write what the files are compared with.

    Returns:
        "narrow": suffix -> bytes of the network built narrow; "written_otherwise": suffix -> number of attentions whose
        code is another one there; "dense": suffix -> record of the dense one, where the pruned one was refused or takes
        one batch only.
    """
    (model, args), written = make(name), json.loads((folder / "written").read_text(encoding="utf-8"))
    doubtful = [suffix for suffix in EXPORTS if written[suffix].get("batch") != BATCHES[0]]
    dense = export_files(model, args, folder / "dense", doubtful)
    narrow = build_narrow(make(name)[0], load_pruned(folder / "small.ckpt", model))
    torch.save({"state_dict": narrow.state_dict()}, folder / "narrow.ckpt")
    there = [suffix for suffix in EXPORTS if "batch" in written[suffix] and is_built_narrow(name)]
    exported = export_files(narrow, args, folder / "narrow", there)
    sizes = {suffix: entry["bytes"] for suffix, entry in exported.items()}
    sizes[".ckpt"] = (folder / "narrow.ckpt").stat().st_size
    attentions = sum(isinstance(module, Attention) for module in narrow.modules())
    return {
        "dense": dense,
        "narrow": sizes,
        "written_otherwise": dict.fromkeys(there, attentions) if attentions else {},
    }


def joined(written: Record, read: Record, others: Record) -> Record:
    """Return the record of a model, with what does not hold under `failures`.

    Args:
        written: From `write_files`.
        read: From `read_files`.
        others: From `write_others`.
    """
    record: Record = {suffix: {**written[suffix], **read.get(suffix, {})} for suffix in (*SAVED, *EXPORTS)}
    for key in ("narrow", "written_otherwise", "dense"):
        for suffix, found in others[key].items():
            record[suffix][key] = found
    failures = [f"{suffix}: other outputs in a fresh process" for suffix in SAVED if not record[suffix]["same"]]
    failures += [f"{suffix}: {fault}" for suffix in EXPORTS for fault in faults_of(record[suffix])]
    return {**record, "failures": failures}


def faults_of(entry: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with one export.

    Args:
        entry: `batch`, `difference`, `bytes`, and `narrow`, the bytes of the network built narrow, whose attentions
            may be `written_otherwise`; or `refused`. Then, and where the batch is fixed, `dense`: of the dense one.
    """
    faults = []
    ranks = [BATCHES.index(one["batch"]) if "batch" in one else len(BATCHES) for one in (entry, entry.get("dense", {}))]
    if ranks[0] > ranks[1]:
        faults.append(f"dense it takes batch={entry['dense']['batch']!r}: {entry.get('refused', 'fixed')}")
    if not entry.get("difference", 0.0) <= TOLERANCE:
        faults.append(f"outputs differ by {entry['difference']:.1e}")
    most = LARGER * entry.get("narrow", float("inf")) + ATTENTION_CODE * entry.get("written_otherwise", 0)
    if entry.get("bytes", 0) > most:
        faults.append(f"{entry['bytes']} bytes, built narrow {entry['narrow']}")
    return faults


def go_round(name: str) -> Record:
    """Return the record of one model, each step in a process of its own; how it ended where there is none."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            written = run_apart(write_files, name, folder, limit_s=LIMIT_S)
            read = run_apart(read_files, name, folder, limit_s=LIMIT_S)
            return joined(written, read, run_apart(write_others, name, folder, limit_s=LIMIT_S))
        except RuntimeError as error:
            return {"failures": [str(error)]}


def row_of(name: str, record: Record) -> str:
    """Return one line of the table."""
    cells = [f"{name:38}"]
    for suffix in EXPORTS:
        entry = record.get(suffix, {})
        size = f"{entry['bytes'] / entry['narrow']:.3f}" if "narrow" in entry else "-"
        cells.append(f"{suffix} {entry.get('batch', '-'):5} {entry.get('difference', float('nan')):8.1e} {size:>6}")
    return "  ".join(cells) + "".join(f"\n    {failure}" for failure in record["failures"])


def summary(results: Mapping[str, Record]) -> str:
    """Return the rows of the README: one for each format and collection."""
    rows = ["| | models | same bits | ONNX | `.pt2` | refused dense | greatest difference | file / built narrow |"]
    rows.append("| --- |" + " ---: |" * 7)
    for library in dict.fromkeys(name.partition(":")[0] for name in results):
        records = [record for name, record in results.items() if name.startswith(f"{library}:")]
        entries = [record[suffix] for record in records for suffix in EXPORTS if suffix in record]
        same = sum(all(record.get(suffix, {}).get("same") for suffix in SAVED) for record in records)
        counts = [sum("batch" in record.get(suffix, {}) for record in records) for suffix in EXPORTS]
        refused = sum("refused" in entry.get("dense", {}) for entry in entries)
        worst = max((entry["difference"] for entry in entries if "difference" in entry), default=0.0)
        size = max((entry["bytes"] / entry["narrow"] for entry in entries if "narrow" in entry), default=0.0)
        cells = [library, len(records), same, *counts, refused, f"{worst:.1e}", f"{size:.3f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    """Send the models asked for round, write `results/round_trip.json`, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names")
    parser.add_argument("--again", action="store_true", help="also what was tried at this commit")
    arguments = parser.parse_args()
    packages = ("torchvision", "onnx", "onnxscript", "onnxruntime", "safetensors")
    environment = {**describe_environment(*packages), "threads": 1}
    results = earlier_results("round_trip", environment["commit"])
    for name in names():
        if any(fnmatchcase(name, pattern) for pattern in arguments.only):
            if arguments.again or name not in results:
                results[name] = go_round(name)
                write_result("round_trip", CONFIG, environment, results)
            print(row_of(name, results[name]), flush=True)
    print(summary(results))
    wrong = [name for name, record in results.items() if record["failures"]]
    if wrong:
        raise SystemExit(f"Something does not hold for {len(wrong)} of {len(results)} models: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
