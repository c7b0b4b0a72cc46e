"""How long a forward takes: several models in turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.errors import ConfigError
from lightning_prune.latency.backends import Run, check_backend, runner
from lightning_prune.mutator.arguments import split_input

__all__ = ["Measurement", "Quartiles", "compare", "measure"]


class Quartiles(NamedTuple):
    """The median of many values, and the first and third quartile as their spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> Quartiles:
        """Return those of some numbers, at least one."""
        return cls(*(float(value) for value in np.quantile(np.asarray(values), [0.5, 0.25, 0.75])))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Measurement:
    """The time of one forward of a model.

    Args:
        times_ms: Milliseconds of each round, in order; the k-th of models measured together are neighbours in time.
        backend: "eager", "compile" or "onnxruntime".
        device: Where it ran.
        threads: Of the CPU.
        batch_size: Examples of one forward.
    """

    times_ms: tuple[float, ...]
    backend: str = "eager"
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1

    @property
    def rounds(self) -> int:
        """How many forwards were timed."""
        return len(self.times_ms)

    @property
    def ms(self) -> Quartiles:
        """Milliseconds: their median, with the interquartile range as spread."""
        return Quartiles.of(self.times_ms)

    def relative_to(self, other: Measurement) -> Quartiles:
        """Return the ratio of the times to those of a model measured together with this one, round by round.

        A ratio of neighbours in time is freer of what the machine does besides than a ratio of medians.
        """
        return Quartiles.of(np.array(self.times_ms) / np.array(other.times_ms))

    def joined(self, more: Measurement) -> Measurement:
        """Return this one with the rounds of another one of the same model."""
        return replace(self, times_ms=self.times_ms + more.times_ms)

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        how = f"{self.backend} on {self.device}, {threads}, batch of {self.batch_size}"
        return f"{self.ms} ms (median and quartiles of {self.rounds} rounds; {how})"


def measure(model: nn.Module, example_input: Any, backend: str = "eager", **options: Any) -> Measurement:
    """Time the forward of one model; see `compare`, which takes the same arguments for several.

    Example:
        >>> measure(nn.Linear(2, 2), torch.ones(4, 2), rounds=5).rounds
        5
    """
    return compare({"model": model}, example_input, backend, **options)["model"]


def compare(
    models: Mapping[str, nn.Module],
    example_input: Any,
    backend: str = "eager",
    *,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    rounds: int = 20,
    warm_up: int = 3,
    threads: int | None = None,
) -> dict[str, Measurement]:
    """Time the forward of models in turns, in eval mode and without gradients.

    In each round every model runs once, and another one begins. On a CUDA device events around a forward are read once
    the device is idle. Modes, devices, threads and torch's random numbers are afterwards what they were.

    Args:
        models: Name -> model, each on one device.
        example_input: Its input: a tensor, a tuple (positional) or a mapping (keywords). Floats take the dtype of the
            first model's parameters.
        backend: "eager", "compile" (`torch.compile`; what it compiles is warm-up), or "onnxruntime" (exported with
            `torch.onnx.export`; on "cuda" with the copies of inputs and outputs).
        device: Where to run; None takes the device of the first model.
        batch_size: Examples of one forward: those of `example_input`, repeated or cut along the first axis of each
            tensor that is as long as that of the first one. None takes them as they are.
        rounds: Timed forwards of each model, at least 1.
        warm_up: Forwards of each before, at least 1.
        threads: Of the CPU; None takes `torch.get_num_threads()`.

    Returns:
        Name -> measurement, in the order of the models.

    Raises:
        ConfigError: An argument that does not fit, a model on several devices, or packages that are missing.

    Source: torch.utils.benchmark, which reports the median and the interquartile range too.
        We differ: one forward a round, models in turns, instead of blocks of forwards of one model after another.
    """
    _check(models, rounds=rounds, warm_up=warm_up, threads=threads, batch_size=batch_size)
    first = next(iter(models.values()))
    where = torch.device(device) if device is not None else _home(first)
    check_backend(backend, where)
    threads = threads or torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([where] if where.type == "cuda" else []))
        stack.enter_context(_threads(threads))
        stack.enter_context(torch.no_grad())
        batch = _placed(example_input, where, first, batch_size)
        runs = {}
        for name, model in models.items():
            stack.enter_context(_evaluating(model, where))
            runs[name] = runner(backend, model, *split_input(batch), where, threads, stack)
        times = _in_turns(runs, where.type == "cuda" and backend != "onnxruntime", rounds, warm_up)
        return {n: Measurement(tuple(t), backend, str(where), threads, _size(batch)) for n, t in times.items()}


def _in_turns(runs: Mapping[str, Run], by_events: bool, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Return the milliseconds of each run, one per round; a round begins with another run than the one before."""
    clock: Callable[[Run], float] = _time_on_device if by_events else _time
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(warm_up + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            elapsed = clock(runs[name])
            if index >= warm_up:
                times[name].append(elapsed)
    return times


def _time(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _time_on_device(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _check(models: Mapping[str, nn.Module], **counts: int | None) -> None:
    """Raise for arguments that do not fit."""
    if not models or not all(isinstance(model, nn.Module) for model in models.values()):
        raise ConfigError(f"Got {models!r} to measure; expected modules.")
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ConfigError(f"Got {name}={count!r} for a measurement of latency; expected a whole number above 0.")


def _home(model: nn.Module) -> torch.device:
    """Return the one device of a model; the CPU if it has no tensor."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ConfigError(f"Got a model on {sorted(map(str, devices))}; expected one device. Measure its parts.")
    return next(iter(devices), torch.device("cpu"))


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model on a device and in eval mode for a while."""
    home, modes = _home(model), {module: module.training for module in model.modules()}
    try:
        model.to(device).eval()
        yield
    finally:
        model.to(home)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _size(example_input: Any) -> int:
    """Return the length of the first axis of the first tensor that has one."""
    return next((len(x) for x in tree_leaves(example_input) if isinstance(x, Tensor) and x.dim()), 1)


def _placed(example_input: Any, device: torch.device, model: nn.Module, batch_size: int | None) -> Any:
    """Return the input on a device, in the model's dtype, with so many examples."""
    size = _size(example_input)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    rows = None if batch_size is None else torch.arange(batch_size, device=device) % size

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().to(device, dtype if leaf.is_floating_point() else None)
        return leaf[rows] if rows is not None and leaf.dim() and len(leaf) == size else leaf

    return tree_map(place, example_input)
