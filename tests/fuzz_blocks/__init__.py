"""The blocks that random networks are drawn from."""

from __future__ import annotations

from tests.fuzz_blocks import attention, channels, layers, parts, space, state
from tests.fuzz_blocks.block import BLOCKS, IMAGE, TOKENS, VECTOR, VOCABULARY, Block, Pick, Shape, width_of

__all__ = [
    "BLOCKS",
    "IMAGE",
    "TOKENS",
    "VECTOR",
    "VOCABULARY",
    "Block",
    "Pick",
    "Shape",
    "attention",
    "channels",
    "layers",
    "parts",
    "space",
    "state",
    "width_of",
]
