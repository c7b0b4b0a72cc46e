"""Blocks that work on places, turn channels into places and back, and one kind of value into another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_blocks.block import IMAGE, TOKENS, VECTOR, VOCABULARY, WIDTHS, Block, Pick, Shape, block, literal


@block
class Space(Block):
    """Places move or merge; channels stay."""

    family = "space"
    takes = (IMAGE,)
    spellings = ("max pool", "average pool", "adaptive", "roll", "flip", "cumulate", "pyramid")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0][1] >= 2

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {
            "spelling": pick(*cls.spellings, *(("nearest", "bilinear", "pad", "reflect") if shapes[0][1] <= 4 else ()))
        }

    def forward(self, x: Tensor) -> Tensor:
        ways: dict[str, Callable[[], Tensor]] = {
            "max pool": lambda: F.max_pool2d(x, 2),
            "average pool": lambda: F.avg_pool2d(x, 3, 1, 1),
            "adaptive": lambda: F.adaptive_avg_pool2d(x, 2),
            "roll": lambda: x.roll((1, -1), (2, 3)),
            "flip": lambda: x.flip(3),
            "cumulate": lambda: x.cumsum(2),
            "pyramid": lambda: torch.cat([x, F.max_pool2d(x, 3, 1, 1), x.mean((2, 3), keepdim=True).expand_as(x)], 1),
            "nearest": lambda: F.interpolate(x, scale_factor=2),
            "bilinear": lambda: F.interpolate(x, scale_factor=2, mode="bilinear"),
            "pad": lambda: F.pad(x, (1, 1, 0, 2)),
            "reflect": lambda: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        }
        return ways[self.spelling]()


@block
class Pixels(Block):
    """Channels become places, or places become channels."""

    family = "pixels"
    takes = (IMAGE,)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        width, height, _ = shapes[0]
        return (width % 4 == 0 and height <= 4) or (width <= 5 and height % 2 == 0)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        up = shapes[0][0] % 4 == 0 and shapes[0][1] <= 4
        return {"spelling": pick("shuffle", "views") if up else pick("unshuffle", "patches", "views down")}

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        match self.spelling:
            case "shuffle":
                return F.pixel_shuffle(x, 2)
            case "unshuffle":
                return F.pixel_unshuffle(x, 2)
            case "views":
                parts = x.view(batch, 2, 2, width // 4, height, columns).permute(0, 3, 4, 1, 5, 2)
                return parts.reshape(batch, width // 4, 2 * height, 2 * columns)
            case "patches":
                return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        parts = x.reshape(batch, width, height // 2, 2, columns // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(batch, 4 * width, height // 2, columns // 2)


@block
class ToTokens(Block):
    family = "reshape"
    takes = (IMAGE,)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0][1] <= 4 and shapes[0][1] % 2 == 0 and shapes[0][2] % 2 == 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"spelling": pick("flatten", "reshape", "permute", *(("patches",) if shapes[0][0] <= 5 else ()))}

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        match self.spelling:
            case "flatten":
                return x.flatten(2).transpose(1, 2)
            case "reshape":
                return x.reshape(batch, -1, height * columns).mT
            case "permute":
                return x.permute(0, 2, 3, 1).reshape(batch, height * columns, width)
        patches = x.reshape(batch, width, height // 2, 2, columns // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(batch, -1, 4 * width)


@block
class ToImage(Block):
    family = "reshape"
    takes = (TOKENS,)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0][0] in (4, 16)

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.side = literal(int(shape[0] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.side(), self.side())


@block
class ToVector(Block):
    family = "reshape"

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(shapes[0]) > VECTOR

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        whole = ("flatten", "view") if torch.Size(shapes[0]).numel() <= 80 else ()
        return {"spelling": pick("mean", "amax", "first", *whole)}

    def forward(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "flatten":
                return x.flatten(1)
            case "view":
                return x.reshape(x.shape[0], -1)
            case "first":
                return x[:, 0] if x.dim() == 1 + TOKENS else x[:, :, 0, 0]
        dims = 1 if x.dim() == 1 + TOKENS else (2, 3)
        return x.mean(dims) if self.spelling == "mean" else x.amax(dims)


@block
class Positions(Block):
    """Learned vectors for the tokens, or one more token."""

    family = "embedding"
    takes = (TOKENS,)
    spellings = ("added", "table", "class token", "longer")

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        tokens, width = shape
        if spelling == "table":
            self.table = nn.Embedding(tokens, width)
        else:
            self.vectors = nn.Parameter(
                torch.randn(1, {"class token": 1, "longer": tokens + 4}.get(spelling, tokens), width)
            )

    def forward(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "table":
                return x + self.table(torch.arange(x.shape[1]))
            case "class token":
                return torch.cat([self.vectors.expand(x.shape[0], -1, -1), x], 1)
            case "longer":
                return x + self.vectors[:, : x.shape[1]]
        return x + self.vectors


@block
class Lookup(Block):
    """Token ids to tokens."""

    family = "embedding"
    takes = (VECTOR,)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return False  # only of an input of ids, with which a network begins

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"out": pick(*WIDTHS)}

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)
