"""A network with all that a structure can hold: dense, dynamic and small."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune.checkpoint import (
    register_structure_hooks,
)
from lightning_prune.compact import compact_
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import DynamicOp, convert_


class Net(nn.Module):
    """A convolution, a norm, an attention-like block with sizes in Python ints, and a tied pair."""

    def __init__(self, width: int = 6, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.mix = Mix(width)
        self.embed = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(7, classes)

    def forward(self, x):
        y = self.mix(self.norm(self.conv(x)).relu().mean((2, 3)))
        return self.out(self.head(y))


class DoubleNet(Net):
    def __init__(self, width: int = 6):
        super().__init__(width)
        self.double()


class Mix(nn.Module):
    """Owns a raw parameter, a buffer that is not saved, and its size, twice."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.register_buffer("offset", torch.arange(width) / 8.0, persistent=False)
        self.width = width
        self.shape = (1, width)

    def forward(self, x):
        return x.view(-1, *self.shape[1:]) * self.scale / self.width + self.offset


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)


KEPT = (1, 0, 1, 1, 0, 1)
BATCH = torch.linspace(-1, 1, 100, dtype=torch.float64).view(2, 2, 5, 5)


def dense(seed: int = 0, **kwargs) -> Net:
    torch.manual_seed(seed)
    model = Net(**kwargs).double()
    register_structure_hooks(model)
    return model


def dynamic(seed: int = 0, kept: tuple[int, ...] | None = KEPT) -> tuple[Net, MutableChannel]:
    model = dense(seed)
    for module in (model.conv, model.norm, model.mix, model.embed, model.head, model.out):
        convert_(module, generic=True)
    unit = MutableChannel(6, "width")
    axes = [model.conv.get_mutable_attr("out_channels"), model.norm.get_mutable_attr("in_channels")]
    axes += [model.mix.axis_container("scale", 0), model.mix.axis_container("offset", 0)]
    axes += [model.embed.get_mutable_attr("out_channels"), model.head.get_mutable_attr("in_channels")]
    for axis in axes:
        axis.register_mutable(unit, 0, 6)
    model.mix.follow_integer("width", axes[2])
    model.mix.follow_integer("shape", axes[2], element=1)
    if kept is not None:
        unit.current_choice = torch.tensor(kept, dtype=torch.bool)
    return model, unit


def compacted(seed: int = 0) -> Net:
    model, _ = dynamic(seed)
    compact_(model)
    return model


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(module, DynamicOp) for module in model.modules())


def saved(model: nn.Module, path) -> str:
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"width": 6, "unused": "x"}}, path)
    return str(path)


def through_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)
