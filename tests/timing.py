"""A clock that follows a law: how long a model takes is a function of its layers, so that tests know what is true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_prune.latency import Measurement

NOISE = (0.98, 0.99, 1.0, 1.01, 1.02)


def steps_of(count: int, size: int) -> int:
    """Channels as hardware sees them: whole vectors."""
    return -(-count // size) * size


def law(model: nn.Module, vector: int = 8, overhead: float = 2.0) -> float:
    """Milliseconds: an overhead, and for each convolution and linear layer its whole vectors of both widths."""
    total = overhead
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            out, into, *kernel = layer.weight.shape
            area = kernel[0] * kernel[1] if kernel else 1
            total += 1e-3 * area * steps_of(out, vector) * steps_of(into, vector)
    return total


class FakeClock:
    """Stands in for `compare`: times by a law, and notes what was asked.

    Args:
        time: A model's milliseconds.
        noise: Factors on the times of the rounds; the dense model has none.
        bias: Factor on the time of a plan that is measured alone beside the dense model; the table knows nothing of it.
    """

    def __init__(
        self, time: Callable[[nn.Module], float] = law, bias: float = 1.0, noise: Sequence[float] = NOISE
    ) -> None:
        self.time, self.bias, self.noise = time, bias, noise
        self.calls: list[list[str]] = []
        self.options: dict[str, Any] = {}

    def __call__(
        self, models: Mapping[str, nn.Module], example_input: Any, backend: str = "eager", **options: Any
    ) -> dict[str, Measurement]:
        self.calls.append(list(models))
        self.options = {"backend": backend, **options}
        found = {}
        for name, model in models.items():
            ms = self.time(model) * (self.bias if name == "pruned" else 1.0)
            noise = (1.0,) * len(self.noise) if name == "dense" else self.noise
            found[name] = Measurement(tuple(ms * factor for factor in noise), backend)
        return found

    @property
    def tables(self) -> int:
        """How many measurements were for a table."""
        return sum("pruned" not in names for names in self.calls)


def slow(models: Mapping[str, nn.Module], example_input: Any, **options: Any) -> dict[str, Measurement]:
    """A measurement by the law, as a function with an import path."""
    return FakeClock(bias=2.0)(models, example_input, **options)
