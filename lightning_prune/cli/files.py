"""Verbs on files: what is in a checkpoint, how two differ, and other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_prune.checkpoint import load_pruned, save_pruned
from lightning_prune.checkpoint.describe import Description, description_of
from lightning_prune.cli.answer import Answer, table
from lightning_prune.cli.models import load_model, make_input
from lightning_prune.errors import ConfigError
from lightning_prune.export import export_onnx, export_program

__all__ = ["compare", "describe", "export"]

FORMATS = (".onnx", ".pt2", ".safetensors", ".ckpt")


def describe(checkpoint: str) -> Answer:
    """Tell what is in a checkpoint; the class of the model is not needed.

    Args:
        checkpoint: A .ckpt of Lightning or of save_pruned, a saved state dict, or .safetensors.
    """
    found = description_of(checkpoint)
    return Answer(found.to_dict(), str(found))


def export(
    checkpoint: str,
    model: str,
    output: str,
    arguments: dict[str, Any] | None = None,
    input: str | None = None,
    dynamic_batch: bool = True,
) -> Answer:
    """Write a pruned checkpoint in another format, checked against the model where it is a program.

    Args:
        checkpoint: A .ckpt of Lightning or of save_pruned, a saved state dict, or .safetensors.
        model: The dense model: import path package.module.Class, or torchvision:name, timm:name, hf:name.
        output: File to write: .onnx, .pt2, .safetensors or .ckpt.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
        dynamic_batch: Whether the file takes any batch size.
    """
    suffix = Path(output).suffix
    if suffix not in FORMATS:
        raise ConfigError(f"Got output {output!r}; expected a name that ends in one of {', '.join(FORMATS)}.")
    small = load_pruned(checkpoint, load_model(model, arguments)).eval()
    if suffix in (".onnx", ".pt2"):
        write = export_onnx if suffix == ".onnx" else export_program
        write(small, make_input(input, small), output, dynamic_batch)
    else:
        save_pruned(small, output, hyper_parameters=arguments or {})
    size = Path(output).stat().st_size
    return Answer({"output": output, "bytes": size}, f"{output}: {size:,} bytes")


def compare(first: str, second: str) -> Answer:
    """Tell what two checkpoints keep of each unit; of each tensor, where their units were not saved.

    Args:
        first: A checkpoint.
        second: Another one.
    """
    one, other = description_of(first), description_of(second)
    if one.fingerprint != other.fingerprint and None not in (one.fingerprint, other.fingerprint):
        raise ConfigError(f"Got {first} and {second}, which are of different dense models.")
    kind = "units" if one.units and other.units else "tensors"
    kept = [_kept(found, kind) for found in (one, other)]
    names = list(dict.fromkeys([*kept[0], *kept[1]]))
    rows = {name: [side.get(name) for side in kept] for name in names}
    totals = {name: [found.entries[name] for found in (one, other)] for name in ("dense", "kept")}
    lines = [(name, *map(_told, pair), "" if pair[0] == pair[1] else "differs") for name, pair in rows.items()]
    lines.append(("entries of tensors", *(f"{count:,}" for count in totals["kept"]), ""))
    return Answer({kind: rows, "entries": totals}, table((kind[:-1], first, second, ""), lines))


def _kept(found: Description, kind: str) -> dict[str, Any]:
    return found.units if kind == "units" else {name: list(line.kept) for name, line in found.tensors.items()}


def _told(value: Any) -> str:
    return "-" if value is None else str(value)
