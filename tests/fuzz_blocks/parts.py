"""Blocks that take channels apart, put them together, and change their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_blocks.block import (
    IMAGE,
    VECTOR,
    Block,
    Pick,
    Shape,
    block,
    channel_dim,
    channels_last,
    divisors,
    literal,
    width_of,
)


def cut_at(x: Tensor, dim: int, at: int) -> tuple[Tensor, ...]:
    y = x.movedim(dim, 1)
    return y[:, :at].movedim(1, dim), y[:, at:].movedim(1, dim)


def every_second(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    y = x.movedim(dim, 1)
    return y[:, ::2].movedim(1, dim), y[:, 1::2].movedim(1, dim)


CUTS: dict[str, Callable[[Any, Tensor, int], tuple[Tensor, ...]]] = {
    "chunk": lambda self, x, dim: x.chunk(2, dim),
    "sizes": lambda self, x, dim: x.split(self.sizes, dim),
    "cut": lambda self, x, dim: cut_at(x, dim, self.cut),
    "half": lambda self, x, dim: x.split(x.shape[dim] // 2, dim),
    "literal": lambda self, x, dim: cut_at(x, dim, self.at()),
    "narrow": lambda self, x, dim: (x.narrow(dim, 0, self.cut), x.narrow(dim, self.cut, x.shape[dim] - self.cut)),
    "tensor_split": lambda self, x, dim: x.tensor_split(2, dim),
    "unbind": lambda self, x, dim: x.unflatten(dim, (2, -1)).unbind(dim),
    "every second": lambda self, x, dim: every_second(x, dim),
}
ANYWHERE = ("sizes", "cut", "literal", "narrow")


@block
class Split(Block):
    """Cut the channels in two; the parts are values of their own."""

    family = "split"
    spellings = tuple(CUTS)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return width_of(shapes[0]) >= 4 and width_of(shapes[0]) % 2 == 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        width = width_of(shapes[0])
        return {"at": pick(width // 2, *range(2, width - 1)), **super().options(pick)}

    def __init__(self, shape: Shape, at: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.at = literal(at)
        if spelling == "sizes":
            self.sizes = [at, width_of(shape) - at]
        if spelling in ("cut", "narrow"):
            self.cut = at

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return CUTS[self.spelling](self, x, channel_dim(x))


@block
class SplitAndMerge(Split):
    """Cut the channels, treat one part, put them together again: partial convolutions, rotations, CSP blocks."""

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {**super().options(pick, *shapes), "treat": pick("layer", "relu", "scale"), "swap": pick(False, True)}

    def __init__(self, shape: Shape, at: int, spelling: str, treat: str, swap: bool) -> None:
        super().__init__(shape, at, spelling)
        self.treat, self.swap = treat, swap
        width = at if spelling in ANYWHERE else width_of(shape) // 2
        self.layer = nn.Linear(width, width) if treat == "layer" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        one, two = super().forward(x)
        one = channels_last(self.layer, one)
        one = one * 2 if self.treat == "scale" else F.relu(one)
        return torch.cat([two, one] if self.swap else [one, two], channel_dim(x))


@block
class Concat(Block):
    family = "concat"
    takes = (0, 0)
    spellings = ("once", "twice", "zeros")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        one, two = shapes
        places = slice(1, None) if len(one) == IMAGE else slice(0, -1)
        return len(one) == len(two) and one[places] == two[places] and width_of(one) + width_of(two) <= 16

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dim = channel_dim(x)
        parts = {"once": [x, y], "twice": [x, y, x], "zeros": [x, torch.zeros_like(x), y]}[self.spelling]
        return torch.cat(parts, dim)


@block
class Shuffle(Block):
    family = "shuffle"
    spellings = ("views", "literal", "attribute", "layer")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(divisors(width_of(shapes[0]))) > 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        spellings = cls.spellings if len(shapes[0]) > VECTOR else cls.spellings[:-1]  # torch shuffles no vectors
        return {"groups": pick(*divisors(width_of(shapes[0]))), "spelling": pick(*spellings)}

    def __init__(self, shape: Shape, groups: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.literal = literal(groups)
        if spelling == "attribute":
            self.groups = groups
        self.layer = nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        groups, dim = (self.groups if self.spelling == "attribute" else self.literal()), channel_dim(x)
        if self.spelling == "layer":
            return self.layer(x.movedim(dim, 1)).movedim(1, dim)
        if self.spelling == "literal":
            return x.unflatten(dim, (groups, x.shape[dim] // groups)).transpose(dim, dim + 1).flatten(dim, dim + 1)
        return x.unflatten(dim, (groups, -1)).transpose(dim, dim + 1).reshape(x.shape)


@block
class Glu(Block):
    family = "glu"
    spellings = ("glu", "chunk", "slices", "pairs", "attribute")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return width_of(shapes[0]) >= 4 and width_of(shapes[0]) % 2 == 0

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        if spelling == "attribute":
            self.half = width_of(shape) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, channel_dim(x)) if self.spelling == "glu" else channels_last(self.halves, x)

    def halves(self, x: Tensor) -> Tensor:
        if self.spelling == "chunk":
            one, two = x.chunk(2, -1)
        elif self.spelling == "pairs":
            one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            one, two = cut_at(x, x.dim() - 1, self.half if self.spelling == "attribute" else x.shape[-1] // 2)
        return one * torch.tanh(two)


@block
class Regroup(Block):
    """Channels as a grid, of which one side is reduced."""

    family = "regroup"
    spellings = ("largest of neighbours", "largest of groups", "mean of groups", "attribute", "softmax in groups")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return width_of(shapes[0]) in (8, 12)

    def __init__(self, shape: Shape, spelling: str) -> None:
        super().__init__(spelling=spelling)
        if spelling == "attribute":
            self.parts = 2

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.regroup, x)

    def regroup(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "largest of neighbours":
                return x.unflatten(-1, (-1, 2)).amax(-1)
            case "largest of groups":
                return x.unflatten(-1, (2, -1)).amax(-2)
            case "mean of groups":
                return x.unflatten(-1, (2, -1)).mean(-2)
            case "attribute":
                return x.unflatten(-1, (self.parts, -1)).amax(-2)
        return x.unflatten(-1, (2, -1)).softmax(-2).flatten(-2)


@block
class Write(Block):
    """Parts of the channels are written, in place, into a tensor."""

    family = "written parts"
    spellings = ("half swapped", "pairs swapped", "first doubled", "attribute", "zeros", "shifted")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return width_of(shapes[0]) >= 4 and width_of(shapes[0]) % 2 == 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"at": pick(*range(1, width_of(shapes[0]) - 1)), **super().options(pick)}

    def __init__(self, shape: Shape, at: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.at = literal(at)
        if spelling == "attribute":
            self.first = at

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.write, x)

    def write(self, x: Tensor) -> Tensor:
        y, half, at = torch.zeros_like(x), x.shape[-1] // 2, self.at()
        match self.spelling:
            case "half swapped":
                y[..., :half], y[..., half:] = x[..., half:], x[..., :half]
            case "pairs swapped":
                y[..., ::2], y[..., 1::2] = x[..., 1::2], x[..., ::2]
            case "first doubled":
                y = x.clone()
                y[..., :at] *= 2
            case "attribute":
                y = x * 1.0
                y[..., self.first :].add_(0.5)
            case "zeros":
                y = x.clone()
                y[..., :at] = 0
            case "shifted":
                y[..., at:] = x[..., at:]
                y[..., :at] = x[..., -at:]
        return y


@block
class Reorder(Block):
    """Channels change their order, come twice, or get neighbours that no layer makes."""

    family = "reorder"
    spellings = ("flip", "roll", "pad", "repeat", "index", "round trip", "twice")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return 4 <= width_of(shapes[0]) <= 12

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"by": pick(1, 2, -1, 3), **super().options(pick)}

    def __init__(self, shape: Shape, by: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.by, self.order = literal(by), literal(torch.randperm(width_of(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.reorder, x)

    def reorder(self, x: Tensor) -> Tensor:
        by = self.by()
        changes: dict[str, Callable[[], Tensor]] = {
            "flip": lambda: x.flip(-1),
            "roll": lambda: x.roll(by, -1),
            "pad": lambda: F.pad(x, (max(by, 0), 1)),
            "repeat": lambda: x.repeat_interleave(2, -1),
            "index": lambda: x[..., self.order()],
            "round trip": lambda: x.reshape(-1, x.shape[-1]).t().contiguous().t().view(x.shape),
            "twice": lambda: torch.cat([x, x * 0.5], -1),
        }
        return changes[self.spelling]()
