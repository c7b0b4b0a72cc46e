"""Blocks that keep something: states along the tokens, statistics, constants of earlier runs, sizes of their layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_blocks.block import TOKENS, WIDTHS, Block, Pick, Shape, block, channels_last, divisors, width_of


@block
class Recurrent(Block):
    family = "recurrent"
    takes = (TOKENS,)
    spellings = ("GRU", "LSTM", "RNN")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"hidden": pick(4, 5, 6), "layers": pick(1, 2), "both_ways": pick(False, True), **super().options(pick)}

    def __init__(self, shape: Shape, hidden: int, layers: int, both_ways: bool, spelling: str) -> None:
        super().__init__()
        self.layer = getattr(nn, spelling)(shape[1], hidden, layers, batch_first=True, bidirectional=both_ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@block
class RunningMean(Block):
    """Statistics kept by hand."""

    family = "statistics"
    spellings = ("assigned", "in place", "interpolated")

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.register_buffer("mean", torch.randn(width_of(shape)))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.center, x)

    def center(self, x: Tensor) -> Tensor:
        if self.training:
            now = x.detach().flatten(0, -2).mean(0)
            match self.spelling:
                case "assigned":
                    self.mean = self.mean * 0.9 + now * 0.1
                case "in place":
                    self.mean.mul_(0.9).add_(now * 0.1)
                case "interpolated":
                    self.mean.lerp_(now, 0.1)
            self.steps += 1
        return x - self.mean


WAVES: dict[int, Tensor] = {}


def wave(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64).sin()


remembered_wave = functools.lru_cache(wave)


class Waves:
    def __init__(self) -> None:
        self.values: Tensor | None = None

    def __call__(self, count: int) -> Tensor:
        if self.values is None or len(self.values) != count:
            self.values = wave(count)
        return self.values


@block
class Remembered(Block):
    """A constant is made in the first run and taken from somewhere in the next."""

    family = "remembered"
    takes = (TOKENS,)
    spellings = ("attribute", "dict", "file", "object", "function", "channels")

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.waves: Any = Waves() if spelling == "object" else {} if spelling == "dict" else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wave(x).to(x)

    def wave(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        match self.spelling:
            case "attribute":
                if self.waves is None:
                    self.waves = wave(count)[:, None]
                return self.waves
            case "channels":
                if self.waves is None:
                    self.waves = torch.ones(x.shape[2]) / 3
                return self.waves
            case "dict" | "file":
                store = self.waves if self.spelling == "dict" else WAVES
                if count not in store:
                    store[count] = wave(count)
                return store[count][:, None]
            case "object":
                return self.waves(count)[:, None]
        return remembered_wave(count)[:, None]


@block
class ReadSizes(Block):
    """What the layers say of themselves is used in a view."""

    family = "sizes read"
    spellings = ("out_features", "in_features", "weight", "numel")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(divisors(width_of(shapes[0]))) > 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"groups": pick(*divisors(width_of(shapes[0]))), **super().options(pick)}

    def __init__(self, shape: Shape, groups: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        width = width_of(shape)
        self.groups, self.one, self.two = groups, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.by_groups, x)

    def by_groups(self, x: Tensor) -> Tensor:
        width = {
            "out_features": lambda: self.one.out_features,
            "in_features": lambda: self.two.in_features,
            "weight": lambda: self.one.weight.shape[0],
            "numel": lambda: self.one.bias.numel(),
        }[self.spelling]()
        grid = self.one(x).unflatten(-1, (self.groups, width // self.groups))
        return x + self.two(F.softplus(grid).flatten(-2))


@block
class Tokens(Block):
    """Tokens move, mix or are chosen; channels stay."""

    family = "tokens"
    takes = (TOKENS,)
    spellings = ("flip", "roll", "cumulate", "index", "gather", "best", "fourier", "softmax", "shift", "windows")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return 3 <= shapes[0][0] <= 10

    def forward(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "flip":
                return x.flip(1)
            case "roll":
                return x.roll(1, 1)
            case "cumulate":
                return x.cumsum(1)
            case "index":
                return x[:, [2, 0, 1]]
            case "gather":
                return x.gather(1, torch.tensor([1, 1, 0]).view(1, 3, 1).expand(x.shape[0], 3, x.shape[2]))
            case "fourier":
                return torch.fft.fft(x, dim=1).real
            case "softmax":
                return x * x.softmax(1)
            case "shift":
                return torch.cat([x[:, 1:], x[:, :1]], 1)
            case "windows":
                return x.unfold(1, 2, 1).mean(-1)
        best = x.norm(dim=-1).topk(2, 1).indices
        return x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[2]))


@block
class WeightNorm(Block):
    """A layer whose weight is worked out from a direction and a length."""

    family = "made weights"

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"out": pick(*WIDTHS)}

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(width_of(shape), out))

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.fc, x)
