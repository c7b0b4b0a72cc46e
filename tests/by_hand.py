"""Units made by hand: layers whose weights are written out, and spans over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.units import Channel, MutableChannelUnit


def span(
    module: nn.Module, dim: int = 0, start: int = 0, end: int | None = None, index: Any = None, **more: Any
) -> Channel:
    tensor = more.get("tensor", "weight")
    end = getattr(module, tensor).shape[dim] if end is None else end
    index = None if index is None else torch.tensor(index)
    return Channel("layer", module, tensor, dim, start, end, dim == 0, index)


def unit(
    num_channels: int, makes: Sequence[Channel], reads: Sequence[Channel] = (), name: str = "unit_(0, 3)"
) -> MutableChannelUnit:
    made = MutableChannelUnit(num_channels)
    made.name, made.output_related, made.input_related = name, list(makes), list(reads)
    return made


def linear(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), dtype=dtype)
    layer.weight.data = torch.tensor(rows, dtype=dtype)
    return layer


def conv(rows: list[list[float]]) -> nn.Conv2d:
    """A 1x1 convolution with these weights `[C_out][C_in]`."""
    layer = nn.Conv2d(len(rows[0]), len(rows), 1)
    layer.weight.data = torch.tensor(rows)[:, :, None, None]
    return layer


def norm(scales: list[float]) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(scales))
    layer.weight.data = torch.tensor(scales)
    return layer
