"""Parametrisations that the tests put on layers, and sizes of what they make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Sinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sinh()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.asinh()


class LowRank(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (left @ right).unflatten(1, (-1, 3, 3))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return left[:, :4] * sizes[:4], right[:4]


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.transpose(0, 1)


def parametrized(layer: nn.Module, parametrization: nn.Module, name: str = "weight") -> nn.Module:
    parametrize.register_parametrization(layer, name, parametrization)
    return layer


def sizes(model: Any) -> tuple[int, int]:
    return model.stem.weight.shape[0], model.head.weight.shape[1]
