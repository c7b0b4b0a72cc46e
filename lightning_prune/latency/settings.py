"""How latency is measured where it is a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.latency.backends import BACKENDS
from lightning_prune.latency.measure import compare
from lightning_prune.latency.table import Measure

__all__ = ["LatencySettings", "resolve_latency"]


@dataclass(frozen=True)
class LatencySettings:
    """How latency is measured where it is a target; see `lightning_prune.latency.compare`.

    Args:
        backend: "eager", "compile" or "onnxruntime". The last two build every model that is measured anew.
        device: Where to run, such as "cpu"; None takes the device that the model is on.
        batch_size: Examples of one forward; None takes those of the example input.
        rounds: Timed forwards of each model, in turns; of a plan up to five times as many, where they vary much.
        warm_up: Forwards of each before.
        threads: Of the CPU; None takes `torch.get_num_threads()`.
        corrections: How often at most a plan is made anew because its measured model misses the target.
        measure: Called with the models, the example input and the options above in place of `compare`: for a device
            that is not this machine.

    Raises:
        ConfigError: A backend that there is not, or a number that is none.
    """

    backend: str = "eager"
    device: str | None = None
    batch_size: int | None = None
    rounds: int = 20
    warm_up: int = 3
    threads: int | None = None
    corrections: int = 5
    measure: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"Got backend={self.backend!r} for latency. {did_you_mean(self.backend, BACKENDS)}")
        for name in ("batch_size", "rounds", "warm_up", "threads", "corrections"):
            count, least = getattr(self, name), int(name != "corrections")
            is_count = isinstance(count, int) and not isinstance(count, bool) and count >= least
            if not is_count and not (count is None and name in ("batch_size", "threads")):
                raise ConfigError(f"Got {name}={count!r} for latency; expected a whole number of at least {least}.")

    def measure_with(self, example_input: Any) -> Measure:
        """Return a function that measures models by these settings."""
        options = ("backend", "device", "batch_size", "rounds", "warm_up", "threads")
        given = {name: getattr(self, name) for name in options}
        return partial(self.measure or compare, example_input=example_input, **given)


def resolve_latency(latency: LatencySettings | Mapping[str, Any] | None) -> LatencySettings:
    """Return settings as they are, from a mapping of their arguments, or the default ones.

    Raises:
        ConfigError: An unknown key, or something else.
    """
    if isinstance(latency, LatencySettings):
        return latency
    if latency is not None and not isinstance(latency, Mapping):
        raise ConfigError(f"Got latency={latency!r}; expected a mapping such as {{'backend': 'onnxruntime'}}.")
    given, valid = dict(latency or {}), [field.name for field in fields(LatencySettings)]
    for name in given:
        if name not in valid:
            raise ConfigError(f"Got {name!r} in latency. {did_you_mean(name, valid)}")
    return LatencySettings(**given)
