"""Penalties on channels, as gradients: what sparse training adds before an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import ConfigError
from lightning_prune.recovery.base import Run
from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["SCHEDULES", "Group", "add_", "at", "checked_strength", "groups_of", "scale_of"]

SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda share: 1.0, "linear": lambda share: share}


def checked_strength(name: str, strength: Any) -> float:
    """Return a strength.

    Raises:
        ConfigError: It is no number of at least 0.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not float(strength) >= 0:
        raise ConfigError(f"Got strength={strength!r} for {name}; expected a number of at least 0.")
    return float(strength)


def at(schedule: str | Callable[[float], float], share: float) -> float:
    """Return what a schedule says of a share of the way to the last firing.

    Raises:
        ConfigError: An unknown schedule.
    """
    if callable(schedule):
        return float(schedule(share))
    if schedule not in SCHEDULES:
        raise ConfigError(f"Got schedule={schedule!r}; expected one of {', '.join(SCHEDULES)}, or a function.")
    return SCHEDULES[schedule](share)


def scale_of(run: Run, optimizer: Optimizer) -> float:
    """Return what the gradients are multiplied by: a fused optimizer unscales them by itself, later."""
    scaler = getattr(run.trainer.precision_plugin, "scaler", None)
    is_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and is_scaled else 1.0


@torch.no_grad()
def add_(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to the gradient of a parameter, which may have none yet."""
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


@dataclass(frozen=True, eq=False)
class _Place:
    """The entries of one parameter that belong to the channels of a unit."""

    parameter: nn.Parameter
    dim: int
    start: int
    end: int
    index: Tensor
    """Int64 `[end - start]`, position -> channel."""
    lines: tuple[tuple[int, Channel, MutableChannelUnit], ...]
    """All axes of the parameter that can be cut: entries that are removed along another axis do not count."""

    def living(self) -> Tensor | None:
        """Return which entries remain, bool and broadcast over the parameter; None where all do."""
        found: Tensor | None = None
        for dim, span, unit in self.lines:
            mask = unit.mutable.current_mask
            if bool(mask.all()):
                continue
            line = torch.ones(self.parameter.shape[dim], dtype=torch.bool)
            line[span.start : span.end] = mask if span.index is None else mask[span.index]
            line = line.to(self.parameter.device).view([-1 if d == dim else 1 for d in range(self.parameter.dim())])
            found = line if found is None else found & line
        return found

    def values(self) -> Tensor:
        """Return the entries of the span, at least float32, with 0 for what is removed."""
        return self._of(self.parameter.detach())

    def ones(self) -> Tensor:
        """Return 1 for each entry of the span, at least float32, with 0 for what is removed."""
        return self._of(torch.ones_like(self.parameter))

    def _of(self, full: Tensor) -> Tensor:
        living = self.living()
        full = full if living is None else full * living
        part = full.narrow(self.dim, self.start, self.end - self.start)
        return part.to(torch.promote_types(part.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Group:
    """A unit and all parameters that have an axis of its channels: what is removed together.

    Args:
        unit: Has the masks.
        places: Where its channels are.
    """

    unit: MutableChannelUnit
    places: tuple[_Place, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the parameters have their dense size: those of a small model do not."""
        return all(place.parameter.shape[place.dim] >= place.end for place in self.places)

    def _per_channel(self, entries: Callable[[_Place], Tensor]) -> Tensor:
        """Sum something of the entries over each channel, `[C]`."""
        device = self.places[0].parameter.device
        total = torch.zeros(self.unit.num_channels, device=device)
        for place in self.places:
            rows = entries(place).movedim(place.dim, 0).reshape(len(place.index), -1).sum(1)
            total = total.to(rows.dtype).index_add_(0, place.index.to(device), rows.to(device))
        return total

    def sizes(self) -> Tensor:
        """Return how many entries each channel has, `[C]`."""
        return self._per_channel(_Place.ones)

    def norms(self) -> Tensor:
        """Return the L2 norm of each channel's entries, `[C]`."""
        return self._per_channel(lambda place: place.values().square()).sqrt()

    def add_(self, coefficients: Tensor, parameters: set[int]) -> None:
        """Add ``coefficients[c] * w`` to the gradient of every entry w of each channel c that remains.

        Args:
            coefficients: `[C]`.
            parameters: Ids of those that are stepped now.
        """
        for place in self.places:
            if id(place.parameter) not in parameters:
                continue
            values = place.values()
            row = coefficients.to(values)[place.index.to(values.device)]
            gradient = torch.zeros_like(place.parameter, dtype=values.dtype)
            shape = [-1 if d == place.dim else 1 for d in range(values.dim())]
            gradient.narrow(place.dim, place.start, place.end - place.start).copy_(values * row.view(shape))
            add_(place.parameter, gradient)


def groups_of(units: Iterable[MutableChannelUnit], *, trainable: set[int]) -> list[Group]:
    """Return a group for each unit that may be pruned.

    Args:
        units: Of a model with its dense sizes.
        trainable: Ids of the parameters that matter.
    """
    owned: dict[int, dict[tuple[int, int, int], tuple[nn.Parameter, Channel, MutableChannelUnit]]] = {}
    for unit in units:
        for span in (*unit.output_related, *unit.input_related):
            for parameter, dim in _along(span):
                if id(parameter) in trainable:
                    owned.setdefault(id(parameter), {})[dim, span.start, span.end] = parameter, span, unit
    places: dict[MutableChannelUnit, list[_Place]] = {}
    for held in owned.values():
        lines = tuple((dim, span, unit) for (dim, _, _), (_, span, unit) in held.items())
        for (dim, start, end), (parameter, span, unit) in held.items():
            index = torch.arange(end - start) if span.index is None else span.index
            places.setdefault(unit, []).append(_Place(parameter, dim, start, end, index, lines))
    return [Group(unit, tuple(found)) for unit, found in places.items()]


def _along(span: Channel) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the parameters of a layer that have the axis of a span, and which axis of theirs it is."""
    module: Any = span.module
    axes = getattr(module, "tensor_axes", {})
    own = axes.get(span.tensor)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if own is not None and own[span.dim] in axes.get(name, ()):
            yield parameter, axes[name].index(own[span.dim])
        elif name == span.tensor:
            yield parameter, span.dim
