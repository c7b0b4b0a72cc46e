"""A cached function in a file that defines no module: see `test_memos`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache
def positions(count: int) -> Tensor:
    return torch.arange(count) / count
