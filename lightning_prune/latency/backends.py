"""What runs a forward: torch as it is, torch.compile, or ONNX Runtime on an export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.export.onnx import check_packages, feed, open_session, write_onnx

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
    check_packages()
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
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
    write_onnx(model, args, kwargs, path)
    session = open_session(path, _PROVIDERS[device.type], threads)
    inputs = feed(session, args, kwargs)
    return lambda: session.run(None, inputs)
