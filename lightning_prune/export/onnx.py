"""ONNX: written by torch's exporter, run by ONNX Runtime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigError, ExportError
from lightning_prune.export.verify import Run, check_outputs, placed, prepare, said_by, tensors_of

__all__ = ["check_packages", "export_onnx", "feed", "open_session", "write_onnx"]

PROTOBUF_LIMIT = 2**31 - 2**27  # bytes of one file; room for what is not weights


def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    dynamic_batch: bool = True,
    *,
    tolerance: float = 1e-4,
) -> Path:
    """Write a model as ONNX, small, once ONNX Runtime has been seen to compute what the model does.

    Args:
        model: Dynamic, small or dense, on any device; it is left alone.
        example_input: A tensor, a tuple (positional) or a mapping (keywords).
        path: Where to. Weights of more than 2 GB go to a second file, ``<path>.data``.
        dynamic_batch: Whether the file takes any batch size. It is then checked with two.
        tolerance: Greatest difference of outputs, relative to the greatest output but at least to 1.

    Returns:
        The path. What was there before is replaced only if all went well.

    Raises:
        ExportError: The exporter cannot do the model, or the file computes something else.
        ConfigError: Packages are missing (extra ``onnx``), or the example is no input.
    """
    check_packages()
    prepared = prepare(model, example_input, dynamic_batch=dynamic_batch)
    with placed(path) as written:
        try:
            write_onnx(prepared.model, prepared.args, prepared.kwargs, written, shapes=prepared.shapes)
        except Exception as error:  # the exporter raises what it likes
            raise ExportError(
                f"Got {type(model).__name__}, which torch.onnx.export cannot write: {said_by(error)}. Try "
                "dynamic_batch=False; if the dense model fails too, its forward is the reason."
            ) from error
        check_outputs(prepared, _runner(written), tolerance, "ONNX file")
    return Path(path)


def _runner(path: Path) -> Run:
    try:
        session = open_session(path)
    except Exception as error:  # the exporter wrote what the runtime refuses
        raise ExportError(f"Got an ONNX file that ONNX Runtime refuses: {said_by(error)}.") from error
    return lambda args, kwargs: [torch.as_tensor(one) for one in session.run(None, feed(session, args, kwargs))]


def check_packages() -> None:
    """Check that what writes and runs ONNX is installed.

    Raises:
        ConfigError: It is not.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Got ONNX to write or run without {', '.join(missing)}; expected the extra 'onnx': "
            "pip install 'lightning-prune[onnx]'."
        )


def write_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    shapes: dict[str, Any] | None = None,
) -> None:
    """Write a model by torch's exporter, whose advice to its own authors is kept quiet.

    Args:
        model: Plain, in eval mode.
        args: Positional arguments.
        kwargs: Keyword arguments.
        path: Where to.
        shapes: Argument -> axes that may vary; None for none.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": size > PROTOBUF_LIMIT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, path, kwargs=dict(kwargs), dynamic_shapes=shapes, **options)


def open_session(path: Path, provider: str = "CPUExecutionProvider", threads: int = 0) -> Any:
    """Return a session of ONNX Runtime.

    Args:
        path: Of the file.
        provider: What runs it.
        threads: Of the CPU; 0 lets it choose.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=[provider])


def feed(session: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a session by name: the tensors of a call in order."""
    names = [node.name for node in session.get_inputs()]
    tensors = tensors_of((args, dict(kwargs)))
    return {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
