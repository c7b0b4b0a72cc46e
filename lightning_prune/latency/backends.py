"""What runs a forward: torch as it is, torch.compile, or ONNX Runtime on an export."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import ConfigError, did_you_mean

__all__ = ["BACKENDS", "Run", "check_backend", "runner"]

BACKENDS = ("eager", "compile", "onnxruntime")
Run = Callable[[], object]
_MANY = 10_000  # models of one class share their code: past a limit torch.compile runs them as they are
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def check_backend(backend: str, device: torch.device) -> None:
    """Check that a backend is there, and can run on a device.

    Raises:
        ConfigError: There is no such backend, packages are missing, or it cannot run there.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"Got backend={backend!r}. {did_you_mean(backend, BACKENDS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Got device={str(device)!r} to measure on; torch sees no CUDA device here.")
    if backend != "onnxruntime":
        return
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Got backend='onnxruntime' without {', '.join(missing)}; expected the extra 'onnx': "
            "pip install 'lightning-prune[onnx]'."
        )
    import onnxruntime

    provider = _PROVIDERS.get(device.type, device.type)
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"Got device={str(device)!r} for backend='onnxruntime', which has {onnxruntime.get_available_providers()} "
            "here; expected one that it can run on. Write device: cpu, or install onnxruntime-gpu."
        )


def runner(
    backend: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    threads: int,
    stack: ExitStack,
) -> Run:
    """Return a function that runs one forward.

    Args:
        backend: One of `BACKENDS`.
        model: In eval mode, on the device.
        args: Positional arguments, on the device.
        kwargs: Keyword arguments, on the device.
        device: Where to run; checked.
        threads: Of the CPU, for a backend with threads of its own.
        stack: What the run needs is given back when it closes.
    """
    if backend == "onnxruntime":
        return _onnx_run(model, args, kwargs, device, threads, stack)
    if backend == "compile":
        limits: dict[str, Any] = {"recompile_limit": _MANY, "accumulated_recompile_limit": _MANY}
        stack.enter_context(torch._dynamo.config.patch(limits))
        model = torch.compile(model, dynamic=False)  # type: ignore[assignment]  # callable, which is all that counts
    return lambda: model(*args, **kwargs)


def _onnx_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    threads: int,
    stack: ExitStack,
) -> Run:
    import onnxruntime

    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says to its own authors
        torch.onnx.export(model, args, path, kwargs=dict(kwargs), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=[_PROVIDERS[device.type]])
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    names = [node.name for node in session.get_inputs()]
    inputs = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
    return lambda: session.run(None, inputs)
