"""Blocks that work on each channel, or on all of them together, and leave their number alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_blocks.block import (
    IMAGE,
    TOKENS,
    VECTOR,
    Block,
    Pick,
    Shape,
    block,
    channel_dim,
    channels_last,
    divisors,
    width_of,
)


@block
class Norm(Block):
    family = "norm"
    spellings = ("batch", "batch plain", "group", "layer", "rms", "functional", "by hand", "unit length")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        spellings, groups = [*cls.spellings], [1, *divisors(width_of(shapes[0]))]
        if len(shapes[0]) == IMAGE and shapes[0][1] > 1:  # torch refuses to normalise a single value
            spellings += ["instance", "instance affine", "layer all", "batch no statistics"]
            groups.append(width_of(shapes[0]))
        return {"groups": pick(*groups), "spelling": pick(*spellings)}

    def __init__(self, shape: Shape, groups: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        width = width_of(shape)
        batch_norm = nn.BatchNorm2d if len(shape) == IMAGE else nn.BatchNorm1d
        makers: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda: batch_norm(width),
            "batch plain": lambda: batch_norm(width, affine=False),
            "batch no statistics": lambda: batch_norm(width, track_running_stats=False),
            "group": lambda: nn.GroupNorm(groups, width),
            "instance": lambda: nn.InstanceNorm2d(width),
            "instance affine": lambda: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
            "layer": lambda: nn.LayerNorm(width),
            "layer all": lambda: nn.LayerNorm(list(shape)),
            "rms": lambda: nn.RMSNorm(width),
        }
        self.norm = makers[spelling]() if spelling in makers else nn.Identity()
        if spelling in ("functional", "by hand"):
            self.weight = nn.Parameter(torch.rand(width) + 0.5)
            self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "layer" | "rms":
                return channels_last(self.norm, x)
            case "functional":
                return channels_last(lambda y: F.layer_norm(y, y.shape[-1:], self.weight, self.bias), x)
            case "by hand":
                return channels_last(self.by_hand, x)
            case "unit length":
                return F.normalize(x, dim=channel_dim(x))
        return self.norm(x.mT).mT if x.dim() == 1 + TOKENS else self.norm(x)

    def by_hand(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


@block
class Activation(Block):
    family = "pointwise"
    spellings = ("relu", "gelu", "sigmoid", "tanh", "silu", "hardswish", "softplus", "in place", "slopes", "dropout")

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        if spelling == "slopes":
            self.slopes = nn.PReLU(width_of(shape))
        if spelling == "dropout":
            self.drop = nn.Dropout2d(0.3) if len(shape) == IMAGE else nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "slopes":
                return self.slopes(x.mT).mT if x.dim() == 1 + TOKENS else self.slopes(x)
            case "dropout":
                return self.drop(x)
            case "in place":
                return F.relu((x * 2).add_(0.1), inplace=True)
        return getattr(F, self.spelling)(x)


@block
class Scale(Block):
    family = "raw parameters"
    spellings = ("flat", "shaped", "affine", "buffer", "expanded")

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        width = width_of(shape)
        trail = (1, 1) if len(shape) == IMAGE else ()
        value = torch.rand(width) + 0.5
        if spelling == "buffer":
            self.register_buffer("scale", value)
        else:
            self.scale = nn.Parameter(value.view(1, width, *trail) if spelling == "shaped" else value)
        if spelling == "affine":
            self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "shaped":
            return x * self.scale
        trail = (1, 1) if x.dim() == 1 + IMAGE else ()
        if self.spelling == "expanded":
            return x * channels_last(lambda y: self.scale.expand_as(y), x)
        x = x * self.scale.view(-1, *trail)
        return x + self.shift.reshape(1, -1, *trail) if self.spelling == "affine" else x


@block
class SqueezeExcitation(Block):
    family = "gate"
    takes = (IMAGE,)
    spellings = ("convolutions", "linears")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"hidden": pick(4, 6), **super().options(pick)}

    def __init__(self, shape: Shape, hidden: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        layer = nn.Linear if spelling == "linears" else lambda a, b: nn.Conv2d(a, b, 1)
        self.down, self.up = layer(shape[0], hidden), layer(hidden, shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "linears":
            return x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()[:, :, None, None]
        return x * self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


@block
class Modulate(Block):
    """A vector for each example acts on every place of it."""

    family = "gate"
    takes = (0, VECTOR)
    spellings = ("add", "gate", "einsum")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(shapes[0]) != VECTOR and width_of(shapes[0]) == shapes[1][0]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.spelling == "einsum":
            return torch.einsum("bchw,bc->bchw" if x.dim() == 1 + IMAGE else "bnc,bc->bnc", x, y)
        y = y[:, :, None, None] if x.dim() == 1 + IMAGE else y.unsqueeze(1)
        return x * y.sigmoid() if self.spelling == "gate" else x + y


@block
class TokenGate(Block):
    """The mean token decides about every channel."""

    family = "gate"
    takes = (TOKENS,)

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc = nn.Linear(shape[1], shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(1, keepdim=True)).sigmoid()


@block
class Join(Block):
    family = "join"
    takes = (0, 0)
    spellings = ("add", "mul", "gate", "sub", "maximum", "where", "lerp", "in place")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        match self.spelling:
            case "gate":
                return x * y.sigmoid()
            case "where":
                return torch.where(x > 0, x, y)
            case "lerp":
                return torch.lerp(x, y, 0.3)
            case "in place":
                return (x * 1.0).add_(y)
        return getattr(torch, self.spelling)(x, y)


@block
class Stack(Block):
    family = "stack"
    takes = (0, 0)
    spellings = ("sum", "mean", "amax", "select", "softmax", "interleave")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"dim": pick(0, -1), **super().options(pick)}

    def __init__(self, *shapes: Shape, dim: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.spelling == "interleave":
            return torch.stack([x, y], channel_dim(x) + 1).flatten(channel_dim(x), channel_dim(x) + 1)
        stacked = torch.stack([x, y], self.dim)
        if self.spelling == "select":
            return stacked.select(self.dim, 0) - stacked.unbind(self.dim)[1]
        if self.spelling == "softmax":
            return (stacked * stacked.softmax(self.dim)).sum(self.dim)
        return getattr(stacked, self.spelling)(dim=self.dim)


@block
class Reading(Block):
    """The number of channels, or the place of one among them, is read as a value: nothing may go."""

    family = "trap"
    spellings = ("divide", "positions", "parity", "first", "sum of ones", "softmax", "cumulate", "largest")

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.read, x)

    def read(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        readings: dict[str, Callable[[], Tensor]] = {
            "divide": lambda: x / width,
            "positions": lambda: x + torch.arange(width).to(x).sin(),
            "parity": lambda: x * 2 if width % 2 else x,
            "first": lambda: x * x[..., :1].sigmoid(),
            "sum of ones": lambda: x * torch.ones(width).to(x).sum(),
            "softmax": lambda: x.softmax(-1),
            "cumulate": lambda: x.cumsum(-1),
            "largest": lambda: x.topk(min(width, 4), -1).values,
        }
        return readings[self.spelling]()
