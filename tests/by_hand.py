"""Units made by hand: layers whose weights are written out, and spans over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.ops import DynamicOp, convert_
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


def joined(
    num_channels: int, makes: Sequence[nn.Module] = (), reads: Sequence[nn.Module] = (), name: str = "unit_(0, 3)"
) -> MutableChannelUnit:
    """A unit of whole layers, which are converted and share its mask."""
    made = MutableChannelUnit(num_channels)
    made.name = name
    sides = (("out_channels", makes, made.output_related), ("in_channels", reads, made.input_related))
    for side, layers, members in sides:
        for k, layer in enumerate(layers):
            op = convert_(layer)
            assert isinstance(op, DynamicOp)
            container = op.get_mutable_attr(side)
            index = None
            if container.num_channels != num_channels:  # a flatten: so many positions for each channel
                index = torch.arange(num_channels).repeat_interleave(container.num_channels // num_channels)
            if not container.spans:
                container.register_mutable(made.mutable, 0, container.num_channels, index)
            dim = 0 if side == "out_channels" or op.weight.dim() == 1 else 1
            kind = "maker" if side == "out_channels" else "reader"
            size = container.num_channels
            members.append(Channel(f"{kind}{k}", op, "weight", dim, 0, size, side == "out_channels", index))
    return made
