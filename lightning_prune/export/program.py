"""`torch.export`: a program that runs without the Python code of the model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ExportError
from lightning_prune.export.verify import check_outputs, placed, prepare, said_by, tensors_of

__all__ = ["export_program"]


def export_program(
    model: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    dynamic_batch: bool = True,
    *,
    tolerance: float = 1e-4,
) -> Path:
    """Write a model as a program of `torch.export`, small, once it has been read back and seen to compute the same.

    ``torch.export.load(path).module()`` runs it.

    Args:
        model: Dynamic, small or dense, on any device; it is left alone.
        example_input: A tensor, a tuple (positional) or a mapping (keywords).
        path: Where to; its name ends in ``.pt2``.
        dynamic_batch: Whether the program takes any batch size. It is then checked with two.
        tolerance: Greatest difference of outputs, relative to the greatest output but at least to 1.

    Returns:
        The path. What was there before is replaced only if all went well.

    Raises:
        ExportError: The exporter cannot do the model, or the program computes something else.
        ConfigError: The example is no input.
    """
    prepared = prepare(model, example_input, dynamic_batch=dynamic_batch)
    with placed(path) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says to its own authors
        try:
            shapes = prepared.shapes
            program = torch.export.export(prepared.model, prepared.args, prepared.kwargs, dynamic_shapes=shapes)
            torch.export.save(program, written)
        except Exception as error:  # the exporter raises what it likes
            raise ExportError(
                f"Got {type(model).__name__}, which torch.export cannot write: {said_by(error)}. Try "
                "dynamic_batch=False; if the dense model fails too, its forward is the reason."
            ) from error
        loaded = torch.export.load(written).module()

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
            with torch.no_grad():
                return tensors_of(loaded(*args, **kwargs))

        check_outputs(prepared, run, tolerance, "program")
    return Path(path)
