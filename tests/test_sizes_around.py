"""Sizes that a module keeps of channels that it has no layer for: those around it tell them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.test_learned_sizes import assert_cut_as_certified, prepared


class First(nn.Module):
    """Convolves the first quarter of the channels and hands on the rest (as in FasterNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.taken, self.rest = width // 4, width - width // 4
        self.conv = nn.Conv2d(self.taken, self.taken, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        taken, rest = x.split([self.taken, self.rest], 1)
        return torch.cat([self.conv(taken), rest], 1)


class Block(nn.Module):
    """A mixer and two layers around which the channels pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = First(width)
        self.layers = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(self.mixer(x))
        return y


def test_what_is_handed_on_is_as_wide_as_the_layers_around_say() -> None:
    layers = [nn.Conv2d(3, 24, 3), *(Block(24) for _ in range(2)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, mutator, x = prepared(nn.Sequential(*layers, nn.Linear(24, 5)), 2, 3, 8, 8)
    assert sorted(u.num_channels for u in mutator.units) == [6, 6, 6, 18, 48, 48]
    assert_cut_as_certified(model, mutator, x)


class Paths(nn.Module):
    """Two convolutions, each of one half of the channels (as in selective kernels)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.number = width, 2
        self.paths = nn.ModuleList(nn.Conv2d(width // 2, width, k, 1, k // 2) for k in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.width // self.number, 1)
        return torch.stack([path(part) for path, part in zip(self.paths, parts, strict=True)], 1).sum(1)


class Selective(nn.Module):
    """Paths and a layer that lead back to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.paths, self.leave = Paths(width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.leave(self.paths(x).relu())
        return y


def test_halves_are_of_the_width_of_what_comes_in_and_not_of_what_goes_out() -> None:
    layers = [nn.Conv2d(3, 16, 3), *(Selective(16) for _ in range(2)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, mutator, x = prepared(nn.Sequential(*layers, nn.Linear(16, 5)), 2, 3, 8, 8)
    assert sorted(u.num_channels for u in mutator.units) == [8, 16, 16]
    assert_cut_as_certified(model, mutator, x)
