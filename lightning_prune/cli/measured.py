"""Verbs that measure a pruned model, or draw it."""

from __future__ import annotations

import copy
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_prune.checkpoint import load_pruned
from lightning_prune.checkpoint.read import read_file
from lightning_prune.cli.answer import Answer, table
from lightning_prune.cli.models import load_model, make_input
from lightning_prune.cli.structure import prepared
from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.latency import Measurement, compare, peak_memory
from lightning_prune.ops.structure import set_masks_
from lightning_prune.sensitivity import SensitivityTable

__all__ = ["bench", "plot"]


def bench(
    model: str,
    checkpoint: str,
    arguments: dict[str, Any] | None = None,
    input: str | None = None,
    backends: list[str] | None = None,
    batch_size: int | None = None,
    rounds: int = 20,
    threads: int | None = None,
    device: str | None = None,
    memory: bool = True,
) -> Answer:
    """Measure a pruned checkpoint against the dense model: time in turns, and peak memory in fresh processes.

    Args:
        model: The dense model: import path package.module.Class, or torchvision:name, timm:name, hf:name.
        checkpoint: The pruned one.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
        backends: Of eager, compile, onnxruntime, such as '[eager, onnxruntime]'; without it eager.
        batch_size: Examples of one forward; without it those of the input.
        rounds: Timed forwards of each.
        threads: Of the CPU.
        device: Where to run, such as cuda.
        memory: Whether to measure the peak memory; each side takes a process of its own.
    """
    dense = load_model(model, arguments)
    models = {"dense": dense, "pruned": load_pruned(checkpoint, copy.deepcopy(dense)).eval()}
    example = make_input(input, dense)
    sizes = {name: _sizes(one, input) for name, one in models.items()}
    where: dict[str, Any] = {"device": device, "batch_size": batch_size, "threads": threads}
    times: dict[str, Any] = {}
    peaks: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for backend in backends or ["eager"]:
        found = compare(models, example, backend, rounds=rounds, **where)
        times[backend] = _times(found)
        rows.append(
            (f"{backend}, ms", found["dense"].ms, found["pruned"].ms, found["pruned"].relative_to(found["dense"]))
        )
        throughput = times[backend]["examples_per_second"].values()
        rows.append((f"{backend}, examples/s", *(f"{value:.4g}" for value in throughput), ""))
        if memory:
            peaks[backend] = _peaks(models, example, backend, where)
        if "dense" in peaks.get(backend, {}):
            rows += _compared(peaks[backend], {"peak": f"{backend}, peak bytes", "added": f"{backend}, of the model"})
    rows += _compared(sizes, {key: key for key in sizes["dense"]})
    data = {"times": times, "peak_memory": peaks, "sizes": sizes}
    notes = [f"No peak memory in {name}: {found['error']}" for name, found in peaks.items() if "error" in found]
    return Answer(data, "\n".join([table(("", "dense", "pruned", "pruned / dense"), rows), *notes]))


def _peaks(models: dict[str, nn.Module], example: Any, backend: str, where: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory of both models, or why it cannot be measured: their times are there by then."""
    try:
        return {name: asdict(peak_memory(one, example, backend, **where)) for name, one in models.items()}
    except ConfigError as error:
        return {"error": str(error)}


def _times(found: dict[str, Measurement]) -> dict[str, Any]:
    """Return what was measured of both models as plain data."""
    return {
        **{f"{name}_ms": one.ms._asdict() for name, one in found.items()},
        "ratio": found["pruned"].relative_to(found["dense"])._asdict(),
        "examples_per_second": {name: one.batch_size * 1e3 / one.ms.median for name, one in found.items()},
    }


def _compared(numbers: dict[str, dict[str, int]], names: dict[str, str]) -> list[tuple[object, ...]]:
    """Return a row per whole number that is known of both models."""
    pairs = {told: (numbers["dense"][key], numbers["pruned"][key]) for key, told in names.items()}
    return [(told, f"{one:,}", f"{two:,}", f"{two / max(one, 1):.3f}") for told, (one, two) in pairs.items()]


def _sizes(model: nn.Module, input: str | None) -> dict[str, int]:
    """Return what a forward of a model costs, and the bytes of its weights."""
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    costs = prepared(copy.deepcopy(model), input).report().costs
    return {**{key: costs[key][0] for key in ("macs", "params", "memory")}, "bytes of weights": stored}


def plot(
    model: str,
    checkpoint: str,
    output: str,
    arguments: dict[str, Any] | None = None,
    input: str | None = None,
    sensitivity: str | None = None,
) -> Answer:
    """Draw what a checkpoint keeps of each unit, what each unit costs, and how much a metric suffers without it.

    Args:
        model: The dense model: import path package.module.Class, or torchvision:name, timm:name, hf:name.
        checkpoint: The pruned one.
        output: File to write: .png or .svg.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
        sensitivity: A table to draw beside it, as lightning_prune.sensitivity(...).save wrote it.
    """
    if not output.endswith((".png", ".svg")):
        raise ConfigError(f"Got output {output!r}; expected a name that ends in .png or .svg.")
    if find_spec("matplotlib") is None:
        raise ConfigError("Got no matplotlib; expected the extra 'plots': pip install 'lightning-prune[plots]'.")
    measured = None if sensitivity is None else SensitivityTable.load(sensitivity)
    structure = read_file(checkpoint).structure
    if structure is None:
        raise ConfigError(f"Got {checkpoint} without a structure; there is nothing to draw.")
    dense = load_model(model, arguments)
    mutator = prepared(dense, input)
    set_masks_(dense, structure)
    rows = mutator.report().units
    data = [{"unit": r.name, "channels": r.num_channels, "kept": r.kept, "macs_share": r.macs_share} for r in rows]
    values = {} if measured is None else _values(measured, [row.name for row in rows], sensitivity)
    for row in data:
        row.update({"sensitivity": values[row["unit"]]} if row["unit"] in values else {})
    _draw(data, measured, output)
    return Answer({"output": output, "units": data}, f"{output}: {len(rows)} units")


def _values(measured: SensitivityTable, names: list[str], path: str | None) -> dict[object, dict[str, float]]:
    """Return unit -> ratio -> the metric, of the units that are there."""
    found: dict[object, dict[str, float]] = {
        row.unit: {f"{ratio:g}": value for ratio, value in zip(measured.ratios, row.values, strict=True)}
        for row in measured.rows
        if row.unit in names
    }
    if not found:
        raise ConfigError(
            f"Got sensitivity {path!r}, which has none of the units of the model. "
            f"{did_you_mean(measured.rows[0].unit if measured.rows else '', names)}"
        )
    return found


def _draw(rows: list[dict[str, Any]], measured: SensitivityTable | None, output: str) -> None:
    """Draw a panel for the channels, one for the costs, and one for the sensitivity where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [row["unit"] for row in rows]
    panels = 2 if measured is None else 3
    figure = Figure(figsize=(2 + 4.5 * panels, 1.5 + 0.25 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True)
    axes[0].barh(names, [row["channels"] for row in rows], color="lightgrey", label="dense")
    axes[0].barh(names, [row["kept"] for row in rows], color="tab:blue", label="kept")
    axes[0].set_xlabel("channels")
    axes[0].legend()
    axes[0].invert_yaxis()
    axes[1].barh(names, [100 * row["macs_share"] for row in rows], color="tab:orange")
    axes[1].set_xlabel("share of the dense MACs that goes with the unit, %")
    if measured is not None:
        for ratio in (f"{ratio:g}" for ratio in measured.ratios):
            points = [(row["sensitivity"][ratio], row["unit"]) for row in rows if "sensitivity" in row]
            axes[2].plot(*zip(*points, strict=True), "o", label=f"{ratio} of its channels")
        axes[2].axvline(measured.before, color="grey", linestyle=":", label="nothing pruned")
        axes[2].set_xlabel(f"{measured.monitor} with the unit pruned alone")
        axes[2].legend()
    figure.savefig(output)
