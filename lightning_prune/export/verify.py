"""What every export to a file shares: a small copy, a check against it, and a file that is whole or not there."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.errors import ConfigError, ExportError
from lightning_prune.export.pruned import export_pruned
from lightning_prune.mutator.arguments import split_input

__all__ = ["Prepared", "Run", "check_outputs", "placed", "prepare", "said_by", "tensors_of"]

Run = Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
"""Positional and keyword arguments to the tensors that the exported model returns, in order."""

ANOTHER_BATCH = 3
SAID = 300  # letters of an exporter's message
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be exported.

    Args:
        model: Plain, small, on the CPU, in eval mode.
        args: Positional arguments to trace with.
        kwargs: Keyword arguments to trace with.
        shapes: Argument -> which axes may vary, as `torch.export` takes it; None if none may.
        checks: Arguments to check it with: those given, and another batch size if that may vary.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, Any] | None
    checks: tuple[Any, ...]


def prepare(model: nn.Module, example_input: Any, *, dynamic_batch: bool) -> Prepared:
    """Make a small copy of a model, and what it is traced and checked with.

    Args:
        model: Dynamic, small or dense; it is left alone.
        example_input: A tensor, a tuple (positional) or a mapping (keywords), on any device.
        dynamic_batch: Whether the first axis of each tensor that is as long as that of the first one may vary.

    Raises:
        ConfigError: The input has no tensor with an axis, or is no input of the model's forward.
    """
    small = export_pruned(model).cpu().eval()
    given = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, example_input)
    if not dynamic_batch:
        args, kwargs = split_input(given)
        return Prepared(small, args, kwargs, None, (given,))
    size = next((len(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if not size:
        raise ConfigError(
            f"Got {example_input!r:.80} to export with; expected a tensor with a batch, or dynamic_batch=False."
        )
    traced = given if size > 1 else _with_batch(given, size, 2)  # a batch of 1 would be taken for a constant
    args, kwargs = split_input(traced)
    batch = torch.export.Dim("batch")
    try:
        arguments = inspect.signature(small.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ConfigError(f"Got an example input that is none of {type(model).__name__}.forward: {error}.") from error

    def varies(leaf: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == max(size, 2) else None

    shapes = {name: tree_map(varies, value) for name, value in arguments.items()}
    return Prepared(
        small, args, kwargs, shapes, (given, _with_batch(given, size, ANOTHER_BATCH + (size == ANOTHER_BATCH)))
    )


def _with_batch(example_input: Any, size: int, wanted: int) -> Any:
    """Return an input of another batch size: its examples, over and over."""
    rows = torch.arange(wanted) % size
    return tree_map(
        lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf,
        example_input,
    )


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a nest of tuples, lists and mappings, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def check_outputs(prepared: Prepared, run: Run, tolerance: float, what: str) -> None:
    """Run the exported model and the one it was made from on the same inputs.

    Args:
        prepared: What was exported.
        run: Runs the export, read back from its file.
        tolerance: Greatest difference, relative to the greatest output but at least to 1.
        what: How to call the export.

    Raises:
        ExportError: They differ, in number, shape or values.
    """
    for example in prepared.checks:
        args, kwargs = split_input(example)
        try:
            with torch.no_grad():
                expected = tensors_of(prepared.model(*args, **kwargs))
            found = run(args, kwargs)
        except Exception as error:  # of the model, or of what runs the file
            shapes = [list(tensor.shape) for tensor in tensors_of(example)]
            raise ExportError(
                f"Got inputs {shapes} that the model or the {what} cannot run: {said_by(error)}. Try "
                "dynamic_batch=False, if the batch is the reason."
            ) from error
        if [list(one.shape) for one in found] != [list(one.shape) for one in expected]:
            raise ExportError(
                f"Got outputs {[list(one.shape) for one in found]} from the {what}; the model gives "
                f"{[list(one.shape) for one in expected]} for the same input. Try dynamic_batch=False."
            )
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            difference = _difference(one, other)
            if not difference <= tolerance:
                raise ExportError(
                    f"Got outputs of the {what} that differ from the model's by {difference:.2e} in output {index}; "
                    f"expected at most {tolerance:.0e}. The file is not written; tolerance= allows more."
                )


def said_by(error: BaseException) -> str:
    """Return the beginning of what an exporter says, and of the reason behind it, on one line; it says a lot."""
    words = " ".join(_COLOURS.sub("", str(error)).split())[:SAID] or type(error).__name__
    return words if error.__cause__ is None else f"{words[: SAID // 2]} ({said_by(error.__cause__)})"


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the greatest difference, relative to the greatest value but at least to 1; inf where only one is NaN."""
    a, b = one.double(), other.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


@contextmanager
def placed(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; what lies beside it is put in place if all goes well, the named file last.

    Args:
        path: Where the file is to be. Its folder is made if it is not there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        yield written
        for other in sorted(Path(folder).iterdir(), key=lambda item: item == written):
            other.replace(target.parent / other.name)
