"""A program: run a saved model in a process that does nothing else, and print how much memory that took.

It is run as a file, so that nothing of this package counts; see `lightning_prune.latency.memory`.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

RUNS = 3


def resident(key: str) -> int:
    """Return bytes of this process in memory: "VmRSS" now, "VmHWM" at most so far.

    Linux hands the peak of the parent on to `ru_maxrss` of a child, so that it is read only where there is no /proc.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_torch(folder: Path, backend: str, device: str) -> dict[str, int]:
    """Run the saved module; the classes it is made of are imported, and torch is warm, before memory is counted."""
    torch.load(folder / "model.pt", weights_only=False, map_location="meta")
    torch.nn.Conv2d(8, 8, 3)(torch.ones(1, 8, 8, 8))
    start = resident("VmRSS")
    model, args, kwargs = torch.load(folder / "model.pt", weights_only=False, map_location=device)
    run: Any = torch.compile(model, dynamic=False) if backend == "compile" else model
    for _ in range(RUNS):
        run(*args, **kwargs)
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
        return {"peak": peak, "added": peak}
    return counted(start)


def run_onnx(folder: Path, threads: int) -> dict[str, int]:
    """Run the exported file, without torch's part in it."""
    import onnxruntime

    inputs = torch.load(folder / "inputs.pt")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    start = resident("VmRSS")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return counted(start)


def counted(start: int) -> dict[str, int]:
    """Return the peak, and what came on top of what there was at the start."""
    peak = resident("VmHWM")
    return {"peak": peak, "added": max(peak - start, 0)}


def main() -> None:
    """Read the folder, backend, device and number of threads from the command line; print JSON in the last line."""
    folder, backend, device, threads = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(threads)
    with torch.no_grad():
        found = run_onnx(folder, threads) if backend == "onnxruntime" else run_torch(folder, backend, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
