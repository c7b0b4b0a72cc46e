"""What the blocks of a random network share.

A block is a small module made for the shapes of its inputs (without the batch): `(C, H, W)` is an image, `(N, C)` are
tokens, `(C,)` is a vector. Its options are plain data, and most say how one thing is spelled: the analysis sees the
spelling, so that is what must vary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

Shape = tuple[int, ...]
Pick = Callable[..., Any]  # returns one of its arguments; the first is the simplest
VECTOR, TOKENS, IMAGE = 1, 2, 3  # axes of a shape
WIDTHS = (4, 6, 8, 12, 5, 10)
VOCABULARY = 11


class Block(nn.Module):
    """One operation of a network.

    Args:
        shapes: Of the inputs.
        spelling: One of `spellings`.

    Attributes:
        family: What it is an example of; every family is equally likely.
        takes: How many axes the shape of each input has; 0 for any.
        spellings: What `spelling` may be.
    """

    family: ClassVar[str]
    takes: ClassVar[tuple[int, ...]] = (0,)
    spellings: ClassVar[tuple[str, ...]] = ("",)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        """Return whether the block takes inputs of these shapes."""
        return all(shape == shapes[0] for shape in shapes)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        """Draw the arguments of the constructor beside the shapes."""
        return {"spelling": pick(*cls.spellings)} if len(cls.spellings) > 1 else {}

    def __init__(self, *shapes: Shape, spelling: str = "") -> None:
        super().__init__()
        self.spelling = spelling


BLOCKS: dict[str, type[Block]] = {}
BlockT = TypeVar("BlockT", bound=type[Block])


def block(cls: BlockT) -> BlockT:
    """Put a block among those that networks are drawn from."""
    BLOCKS[cls.__name__] = cls
    return cls


def width_of(shape: Shape) -> int:
    return shape[0] if len(shape) == IMAGE else shape[-1]


def divisors(number: int) -> list[int]:
    """Return those but 1 and the number itself."""
    return [d for d in range(2, number) if number % d == 0]


def literal(value: Any) -> Callable[[], Any]:
    """Return a value as the source text would hold it: no rewrite of attributes reaches it."""
    return lambda: value


def channel_dim(x: Tensor) -> int:
    return 1 if x.dim() == 1 + IMAGE else x.dim() - 1


def channels_last(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of the last axis to the channels."""
    return function(x.movedim(1, -1)).movedim(-1, 1) if x.dim() == 1 + IMAGE else function(x)
