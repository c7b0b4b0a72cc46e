"""Axes of parameters and inputs in terms of the dense model, whether the layer is dense, dynamic or small already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["DenseAxis", "Reader", "parameter_axes", "readers_of"]


class Masked(Protocol):
    """What an axis needs of a mask."""

    @property
    def current_mask(self) -> Tensor:
        """Bool `[n]` on the CPU, True = keep."""
        ...


@dataclass(frozen=True, eq=False)
class DenseAxis:
    """An axis that may have lost positions.

    Args:
        size: Its dense length.
        container: Says which positions remain; None where nothing can be cut.
        repeats: How many times the axis fits into the container, whose positions then are [repeats, size].
    """

    size: int
    container: Masked | None = None
    repeats: int = 1

    def spread(self, values: Tensor) -> Tensor:
        """Return `[size]` values from those of the positions that remain; 0 at the others.

        Args:
            values: `[size]` already, or one for each position that remains.
        """
        if len(values) == self.size:
            return values
        assert self.container is not None, "an axis without a mask keeps its length"
        mask = self.container.current_mask.view(self.repeats, -1).any(0).to(values.device)
        assert int(mask.sum()) == len(values), f"{len(values)} values for {int(mask.sum())} positions that remain"
        return values.new_zeros(self.size).masked_scatter_(mask, values)


def parameter_axes(span: Channel) -> dict[str, tuple[int, DenseAxis]]:
    """Return the parameters of a layer that have the axis of a span: tensor name -> dim, and the axis.

    Args:
        span: Of a dynamic op, or of a layer that stays dense; then it is the span's tensor alone.
    """
    module: Any = span.module
    own = {span.tensor: (span.dim, DenseAxis(span.full().shape[span.dim]))}
    axes = getattr(module, "tensor_axes", {})
    if span.tensor not in axes:
        return own
    attr = axes[span.tensor][span.dim]
    base = str(attr).removesuffix("_per_group")
    repeats = module.__dict__["groups"] if base != attr else 1  # channels counted inside one group
    axis = DenseAxis(span.full().shape[span.dim], module.mutable_attrs.get(base), repeats)
    found = {tensor: (names.index(attr), axis) for tensor, names in axes.items() if attr in names}
    return {tensor: place for tensor, place in found.items() if module._parameters.get(tensor) is not None}


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the channels of a unit.

    Args:
        name: Qualified name of the layer.
        module: A convolution or a linear layer.
        dim: Channel axis of its input, counted from the end.
        axis: That axis.
        spans: `(start, end, index)` of each run of it that belongs to the unit; `index` maps positions to channels.
        num_channels: C of the unit.
    """

    name: str
    module: nn.Module
    dim: int
    axis: DenseAxis
    spans: Sequence[tuple[int, int, Tensor | None]]
    num_channels: int

    def per_channel(self, values: Tensor) -> Tensor:
        """Sum values of the input's positions, `[..., kept]`, into values of the unit's channels, `[..., C]`."""
        flat = values.reshape(-1, values.shape[-1])
        total = flat.new_zeros(len(flat), self.num_channels)
        kept, channels = self._places(values.shape[-1])
        total.index_add_(1, channels.to(flat.device), flat.index_select(1, kept.to(flat.device)))
        return total.view(*values.shape[:-1], self.num_channels)

    def covered(self) -> Tensor:
        """Return which channels of the unit the layer reads, bool `[C]` on the CPU."""
        channels = torch.cat([torch.arange(b - a) if index is None else index for a, b, index in self.spans])
        return torch.zeros(self.num_channels, dtype=torch.bool).index_fill_(0, channels, True)

    def _places(self, length: int) -> tuple[Tensor, Tensor]:
        """Return positions of an input of this length that belong to the unit, and the channel of each."""
        place = self.axis.spread(torch.arange(1, length + 1)) - 1  # dense position -> position that remains, or -1
        dense = torch.cat([torch.arange(start, end) for start, end, _ in self.spans])
        channels = torch.cat([torch.arange(b - a) if index is None else index for a, b, index in self.spans])
        lives = place[dense] >= 0
        return place[dense][lives], channels[lives]


def readers_of(unit: MutableChannelUnit) -> list[Reader]:
    """Return the convolutions and linear layers that read a unit, in model order, each once."""
    found: dict[int, Reader] = {}
    for span in unit.input_related:
        layer: Any = span.module
        side = getattr(layer, "aliases", {}).get("in_channels", "in_channels")
        container = getattr(layer, "mutable_attrs", {}).get(side)  # a layer whose weight is made anew has none
        if container is None or not isinstance(span.module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        runs = [(s.start, s.end, s.index) for s in container.spans if s.mutable is unit.mutable]
        dim = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        axis = DenseAxis(container.num_channels, container)
        found[id(layer)] = Reader(span.name, layer, dim, axis, runs, unit.num_channels)
    return [reader for reader in found.values() if reader.spans]
