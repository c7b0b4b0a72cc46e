"""Blocks of known families in the zoo: shuffles, pixels and channels, gates, and the parts of a detector."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_models import CLASSES, conv_norm, pooled_head


class ShuffleUnit(nn.Module):
    """One half goes through a branch, both are joined and interleaved, as in ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = conv_norm(8, 10, 1)
        self.spatial = conv_norm(10, 10, groups=10)
        self.project = conv_norm(10, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.project(self.spatial(self.expand(right)))], dim=1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def channel_shuffle() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=conv_norm(3, 16), unit=ShuffleUnit(), head=pooled_head(16)))


def pixel_shuffle() -> nn.Module:
    """Each of 6 channels is made of 4."""
    return nn.Sequential(
        OrderedDict(
            stem=conv_norm(3, 8), up=nn.Conv2d(8, 24, 1), shuffle=nn.PixelShuffle(2), out=nn.Conv2d(6, 3, 3, padding=1)
        )
    )


def pixel_unshuffle() -> nn.Module:
    """Each of 6 channels becomes 4."""
    return nn.Sequential(
        OrderedDict(stem=conv_norm(3, 6), unshuffle=nn.PixelUnshuffle(2), down=conv_norm(24, 10), head=pooled_head(10))
    )


def gated_convolution() -> nn.Module:
    """`nn.GLU` halves 16 channels."""
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 16, 3, padding=1), gate=nn.GLU(1), head=pooled_head(8)))


class SwiGLU(nn.Module):
    """`silu(a) * b` of the halves of one layer, residual, as in DINOv2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 20)
        self.both, self.back = nn.Linear(20, 28), nn.Linear(14, 20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.head((x + self.back(F.silu(gate) * value)).mean(1))


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.one, self.two = conv_norm(channels, hidden), conv_norm(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class C2f(nn.Module):
    """Halves, one of which goes through bottlenecks; every step of it is joined at the end, as in YOLOv8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv_norm(8, 12, 1)
        self.steps = nn.ModuleList([Bottleneck(6, 7), Bottleneck(6, 9)])
        self.last = conv_norm(24, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(step(parts[-1]) for step in self.steps)
        return self.last(torch.cat(parts, 1))


def c2f() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=conv_norm(3, 8), block=C2f(), head=pooled_head(10)))


class SPPF(nn.Module):
    """Pools of pools, joined, as in YOLOv5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_norm(8, 6, 1), conv_norm(24, 10, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.first(x)]
        pools.extend(self.pool(pools[-1]) for _ in range(3))
        return self.last(torch.cat(pools, 1))


def sppf() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=conv_norm(3, 8), block=SPPF(), head=pooled_head(10)))


class Detect(nn.Module):
    """Boxes as distributions over 4 bins and 3 classes at two scales; decoded in eval mode, as in YOLOv8."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.bins = 3, 4
        self.stem, self.down = conv_norm(3, 8), conv_norm(8, 12, stride=2)
        self.boxes = nn.ModuleList(self._branch(c, 6 + k, 4 * self.bins) for k, c in enumerate((8, 12)))
        self.scores = nn.ModuleList(self._branch(c, 9 + k, self.classes) for k, c in enumerate((8, 12)))
        self.expectation = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
        self.expectation.weight.data[:] = torch.arange(float(self.bins)).view(1, -1, 1, 1)

    @staticmethod
    def _branch(channels: int, hidden: int, out: int) -> nn.Sequential:
        return nn.Sequential(conv_norm(channels, hidden), nn.Conv2d(hidden, out, 1))

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        levels = [x, self.down(x)]
        maps = [torch.cat([b(x), s(x)], 1) for b, s, x in zip(self.boxes, self.scores, levels, strict=True)]
        return maps if self.training else (self.decoded(maps), maps)

    def decoded(self, maps: list[Tensor]) -> Tensor:
        width = 4 * self.bins + self.classes
        boxes, scores = torch.cat([m.view(len(m), width, -1) for m in maps], 2).split((4 * self.bins, self.classes), 1)
        batch, _, places = boxes.shape
        distances = self.expectation(boxes.view(batch, 4, self.bins, places).transpose(2, 1).softmax(1))
        before, after = distances.view(batch, 4, places).chunk(2, 1)
        centers, strides = self.anchors(maps)
        return torch.cat([(centers - before) * strides, (centers + after) * strides, scores.sigmoid()], 1)

    @staticmethod
    def anchors(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        centers, strides = [], []
        for stride, m in zip((1.0, 2.0), maps, strict=True):
            rows, columns = (torch.arange(n).to(m) + 0.5 for n in m.shape[2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centers.append(torch.stack((x, y)).flatten(1))
            strides.append(torch.full((1, x.numel()), stride).to(m))
        return torch.cat(centers, 1), torch.cat(strides, 1)
