"""How much memory a forward takes at most: a fresh process for each measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigError
from lightning_prune.export.onnx import feed, open_session, write_onnx
from lightning_prune.latency.backends import check_backend
from lightning_prune.latency.measure import _evaluating, _home, _placed
from lightning_prune.mutator.arguments import split_input

__all__ = ["PeakMemory", "peak_memory"]

PROGRAM = Path(__file__).with_name("alone.py")
# glibc else learns to keep freed blocks of up to 32 MB, and what is counted depends on which sizes came in which order.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class PeakMemory:
    """The memory of a process that loads a model and runs its forward.

    Args:
        peak: Bytes at most: resident memory of the whole process, where freed blocks go back to the system at once; on
            a CUDA device what torch has allocated there.
        added: Bytes of it that came with the model: its weights, its activations, and what the backend needs for them.
    """

    peak: int
    added: int

    def __str__(self) -> str:
        return f"{self.added / 2**20:.1f} MiB on top of {(self.peak - self.added) / 2**20:.1f} MiB"


def peak_memory(
    model: nn.Module,
    example_input: Any,
    backend: str = "eager",
    *,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> PeakMemory:
    """Run a model in a process of its own, in eval mode and without gradients, and ask for its peak memory.

    Args:
        model: A model that can be pickled; it is not changed.
        example_input: Its input, as of `compare`.
        backend: "eager", "compile" (what the compiler takes counts), or "onnxruntime" (of the CPU; what the export
            takes does not count).
        device: Where to run; None takes the device of the model.
        batch_size: Examples of one forward, as of `compare`.
        threads: Of the CPU; None takes `torch.get_num_threads()`.

    Raises:
        ConfigError: An argument that does not fit, a model that cannot be pickled, or one that fails there.
    """
    where = torch.device(device) if device is not None else _home(model)
    check_backend(backend, where)
    if backend == "onnxruntime" and where.type != "cpu":
        raise ConfigError(f"Got device={str(where)!r} for the memory of onnxruntime; torch sees only its own there.")
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name, _evaluating(model, cpu), torch.no_grad():
        folder = Path(name)
        args, kwargs = split_input(_placed(example_input, cpu, model, batch_size))
        if backend == "onnxruntime":
            write_onnx(model, args, kwargs, folder / "model.onnx")
            fed = feed(open_session(folder / "model.onnx"), args, kwargs)
            torch.save({key: torch.as_tensor(value) for key, value in fed.items()}, folder / "inputs.pt")
        else:
            _pickle(model, args, kwargs, folder / "model.pt")
        return PeakMemory(**_run(name, backend, str(where), str(threads or torch.get_num_threads())))


def _pickle(model: nn.Module, args: Any, kwargs: Any, path: Path) -> None:
    try:
        torch.save((model, args, kwargs), path)
    except Exception as error:  # of somebody else's class
        raise ConfigError(
            f"Got {type(model).__name__}, which cannot be pickled for a process of its own: {error}"
        ) from error


def _run(*words: str) -> dict[str, int]:
    """Run the program with the import path of this process, and return what it prints."""
    start = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    command = [sys.executable, "-W", "ignore", "-c", start, *words]
    environment = {**os.environ, **RETURN_FREED, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or f"it ended with status {done.returncode}"
        raise ConfigError(f"Got a model that does not run in a process of its own: {last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
