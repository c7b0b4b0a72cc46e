"""Verbs that measure a pruned model, or draw it."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_prune.checkpoint import load_pruned
from lightning_prune.checkpoint.read import read_file
from lightning_prune.cli.answer import Answer, table
from lightning_prune.cli.models import load_model, make_input
from lightning_prune.cli.structure import prepared
from lightning_prune.errors import ConfigError
from lightning_prune.latency import compare
from lightning_prune.ops.structure import set_masks_

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
) -> Answer:
    """Measure a pruned checkpoint against the dense model: in turns, medians and quartiles.

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
    """
    dense = load_model(model, arguments)
    models = {"dense": dense, "pruned": load_pruned(checkpoint, copy.deepcopy(dense)).eval()}
    example = make_input(input, dense)
    sizes = {name: _sizes(one, input) for name, one in models.items()}
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "rounds": rounds, "threads": threads}
    times: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for backend in backends or ["eager"]:
        found = compare(models, example, backend, **options)
        ratio = found["pruned"].relative_to(found["dense"])
        throughput = {name: one.batch_size * 1e3 / one.ms.median for name, one in found.items()}
        times[backend] = {
            **{f"{name}_ms": one.ms._asdict() for name, one in found.items()},
            "ratio": ratio._asdict(),
            "examples_per_second": throughput,
        }
        rows.append((f"{backend}, ms", found["dense"].ms, found["pruned"].ms, ratio))
        rows.append((f"{backend}, examples/s", *(f"{value:.4g}" for value in throughput.values()), ""))
    for key in sizes["dense"]:
        before, after = (sizes[name][key] for name in models)
        rows.append((key, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.3f}"))
    return Answer({"times": times, "sizes": sizes}, table(("", "dense", "pruned", "pruned / dense"), rows))


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
) -> Answer:
    """Draw what a checkpoint keeps of each unit, and what each unit costs.

    Args:
        model: The dense model: import path package.module.Class, or torchvision:name, timm:name, hf:name.
        checkpoint: The pruned one.
        output: File to write: .png or .svg.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
    """
    if not output.endswith((".png", ".svg")):
        raise ConfigError(f"Got output {output!r}; expected a name that ends in .png or .svg.")
    if find_spec("matplotlib") is None:
        raise ConfigError("Got no matplotlib; expected the extra 'plots': pip install 'lightning-prune[plots]'.")
    structure = read_file(checkpoint).structure
    if structure is None:
        raise ConfigError(f"Got {checkpoint} without a structure; there is nothing to draw.")
    dense = load_model(model, arguments)
    mutator = prepared(dense, input)
    set_masks_(dense, structure)
    rows = mutator.report().units
    _draw([(row.name, row.num_channels, row.kept, row.macs_share) for row in rows], output)
    data = [{"unit": r.name, "channels": r.num_channels, "kept": r.kept, "macs_share": r.macs_share} for r in rows]
    return Answer({"output": output, "units": data}, f"{output}: {len(rows)} units")


def _draw(rows: list[tuple[str, int, int, float]], output: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, dense, kept, shares = zip(*rows, strict=True)
    figure = Figure(figsize=(11, 1.5 + 0.25 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, dense, color="lightgrey", label="dense")
    left.barh(names, kept, color="tab:blue", label="kept")
    left.set_xlabel("channels")
    left.legend()
    left.invert_yaxis()
    right.barh(names, [100 * share for share in shares], color="tab:orange")
    right.set_xlabel("share of the dense MACs that goes with the unit, %")
    figure.savefig(output)
