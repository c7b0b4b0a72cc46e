"""Layers that make channels: convolutions and matrices, with weights of every origin, used once or more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_blocks.block import IMAGE, TOKENS, WIDTHS, Block, Pick, Shape, block, channels_last, divisors, width_of


def draw_groups(pick: Pick, width: int, grouped: bool = False) -> dict[str, int]:
    """Draw output channels and groups: one, one for each channel, or a number between them."""
    if grouped:
        groups = pick(*divisors(width))
        return {"out": groups * pick(2, 3, 1), "groups": groups}
    if pick(False, True):
        return {"out": width * pick(1, 2) if width <= 10 else width, "groups": width}
    return {"out": pick(*WIDTHS), "groups": 1}


@block
class Conv(Block):
    family = "convolution"
    takes = (IMAGE,)
    spellings = ("layer", "parent", "raw", "standardized")
    grouped = False

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        width, height, _ = shapes[0]
        kernel = pick(1, 3)
        return {
            **draw_groups(pick, width, cls.grouped),
            "kernel": kernel,
            "stride": pick(1, 2) if height >= 4 else 1,
            "dilation": pick(1, 2) if kernel == 3 and height >= 4 else 1,
            "bias": pick(True, False),
            **super().options(pick),
        }

    def __init__(
        self, shape: Shape, out: int, groups: int, kernel: int, stride: int, dilation: int, bias: bool, spelling: str
    ) -> None:
        super().__init__(spelling=spelling)
        padding = kernel // 2 * dilation
        conv = nn.Conv2d(shape[0], out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias)
        if spelling == "raw":
            self.weight, self.bias = conv.weight, conv.bias
            self.groups, self.stride, self.padding, self.dilation = groups, stride, padding, dilation
        else:
            self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "layer":
            return self.conv(x)
        layer: Any = self if self.spelling == "raw" else self.conv
        weight = layer.weight
        if self.spelling == "standardized":
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@block
class GroupedConv(Conv):
    family = "grouped convolution"
    grouped = True

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(divisors(shapes[0][0])) > 0


@block
class TransposedConv(Block):
    family = "transposed"
    takes = (IMAGE,)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        width, height, _ = shapes[0]
        grouped = len(divisors(width)) > 0 and pick(False, True)
        return {
            **draw_groups(pick, width, grouped),
            "stride": pick(1, 2) if height <= 4 else 1,
            "bias": pick(True, False),
        }

    def __init__(self, shape: Shape, out: int, groups: int, stride: int, bias: bool) -> None:
        super().__init__()
        kernel, padding = (2, 0) if stride == 2 else (3, 1)
        self.conv = nn.ConvTranspose2d(shape[0], out, kernel, stride, padding, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@block
class TokenConv(Block):
    family = "convolution"
    takes = (TOKENS,)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        grouped = len(divisors(shapes[0][1])) > 0 and pick(False, True)
        return draw_groups(pick, shapes[0][1], grouped)

    def __init__(self, shape: Shape, out: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(shape[1], out, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


@block
class Dense(Block):
    family = "linear"
    spellings = ("layer", "parent", "matmul", "einsum")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"out": pick(*WIDTHS), **super().options(pick)}

    def __init__(self, shape: Shape, out: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        if spelling in ("layer", "parent"):
            self.fc = nn.Linear(width_of(shape), out)
        else:
            self.weight = nn.Parameter(torch.randn(width_of(shape), out) / 3)
            self.bias = nn.Parameter(torch.randn(out) / 3)

    def apply_to_last(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "layer":
                return self.fc(x)
            case "parent":
                return F.linear(x, self.fc.weight) + self.fc.bias
            case "matmul":
                return x @ self.weight + self.bias
        return torch.einsum("...c,cd->...d", x, self.weight) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.apply_to_last, x)


@block
class TokenMixer(Block):
    """A layer along the tokens, as in MLP-Mixer."""

    family = "linear"
    takes = (TOKENS,)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"hidden": pick(*WIDTHS)}

    def __init__(self, shape: Shape, hidden: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(shape[0], hidden), nn.Linear(hidden, shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.gelu(self.one(x.mT))).mT


@block
class Bottleneck(Block):
    """A residual branch that is wider or narrower inside."""

    family = "residual"
    spellings = ("plain", "norm", "gated", "halves")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"hidden": pick(*WIDTHS), **super().options(pick)}

    def __init__(self, shape: Shape, hidden: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        width = width_of(shape)
        self.one = nn.Linear(width, hidden * (2 if spelling == "halves" else 1))
        self.two = nn.Linear(hidden, width)
        self.gate = nn.Linear(width, hidden) if spelling == "gated" else None
        self.norm = nn.LayerNorm(hidden) if spelling == "norm" else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.spelling == "halves":
            y, z = y.chunk(2, -1)
            y = F.silu(y) * z
        if self.gate is not None:
            y = y * F.gelu(self.gate(x))
        return self.two(F.relu(self.norm(y)))

    def forward(self, x: Tensor) -> Tensor:
        return x + channels_last(self.branch, x)


@block
class GroupedLinear(Block):
    """One matrix for each group of channels."""

    family = "einsum"
    takes = (TOKENS,)
    spellings = ("einsum", "attribute", "matmul")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(divisors(shapes[0][1])) > 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"groups": pick(*divisors(shapes[0][1])), "out": pick(3, 4), **super().options(pick)}

    def __init__(self, shape: Shape, groups: int, out: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.weight = nn.Parameter(torch.randn(groups, shape[1] // groups, out) / 3)
        if spelling == "attribute":
            self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups if self.spelling == "attribute" else self.weight.shape[0], -1))
        if self.spelling == "matmul":
            return (parts.transpose(1, 2) @ self.weight).transpose(1, 2).flatten(2)
        return torch.einsum("bngc,gcd->bngd", parts, self.weight).flatten(2)


@block
class Experts(Block):
    """A few layers side by side, weighted by a gate."""

    family = "stack"
    takes = (TOKENS,)
    spellings = ("all", "best")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"out": pick(*WIDTHS), **super().options(pick)}

    def __init__(self, shape: Shape, out: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.gate = nn.Linear(shape[1], 3)
        self.experts = nn.ModuleList(nn.Linear(shape[1], out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, made = self.gate(x).softmax(-1), torch.stack([expert(x) for expert in self.experts], -1)
        if self.spelling == "best":
            weights, best = weights.topk(2, -1)
            made = made.gather(-1, best.unsqueeze(-2).expand(*made.shape[:-1], 2))
        return (made * weights.unsqueeze(-2)).sum(-1)


@block
class MadeWeight(Block):
    """A matrix that is worked out from others."""

    family = "made weights"
    spellings = ("product", "adapter", "joined", "stacked", "scaled rows", "repeated", "sliced")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"out": pick(4, 6, 8), **super().options(pick)}

    def __init__(self, shape: Shape, out: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        width = width_of(shape)
        sizes = {
            "product": [(out, 5), (5, width)],
            "adapter": [(out, 3), (3, width)],
            "joined": [(out, width), (4, width)],
            "stacked": [(out, width), (out, width)],
            "scaled rows": [(out, width), (out, 1)],
            "repeated": [(out // 2, width), (out,)],
            "sliced": [(out + 3, width), (out + 3,)],
        }[spelling]
        self.one, self.two = (nn.Parameter(torch.randn(size) / 2) for size in sizes)
        self.layer = nn.Linear(width, out) if spelling == "adapter" else None
        self.scale = 1.5

    def apply_to_last(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "product":
                return F.linear(x, self.one @ self.two)
            case "adapter":
                return self.layer(x) + F.linear(F.linear(x, self.two), self.one) * (self.scale / self.two.shape[0])
            case "joined":
                return F.linear(x, torch.cat([self.one, self.two]))
            case "stacked":
                return torch.einsum("...c,soc->s...o", x, torch.stack([self.one, self.two])).sum(0)
            case "scaled rows":
                return F.linear(x, self.one / (self.one.norm(dim=1, keepdim=True) + 0.1) * self.two)
            case "repeated":
                return F.linear(x, self.one.repeat(2, 1), self.two)
        return F.linear(x, self.one[:-3], self.two[:-3])

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.apply_to_last, x)


@block
class Tied(Block):
    """There and back through one weight, or two layers that hold the same one."""

    family = "tied"
    spellings = ("transposed", "same")

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"hidden": pick(*WIDTHS), **super().options(pick)}

    def __init__(self, shape: Shape, hidden: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.one = nn.Linear(width_of(shape), hidden)
        if spelling == "same":
            self.two = nn.Linear(width_of(shape), hidden)
            self.two.weight = self.one.weight

    def apply_to_last(self, x: Tensor) -> Tensor:
        if self.spelling == "same":
            return self.one(x) + F.relu(self.two(x))
        return F.linear(F.relu(self.one(x)), self.one.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.apply_to_last, x)


@block
class Again(Block):
    """The block of an earlier node once more, on other values of the same shapes."""

    family = "shared"
    takes = ()

    def __init__(self, *shapes: Shape, again: Block) -> None:
        super().__init__()
        self.again = again

    def forward(self, *inputs: Tensor) -> Any:
        return self.again(*inputs)
