"""Models that the tests save and load, and ways to do so."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn

from lightning_prune import PrunableMixin
from lightning_prune.checkpoint import register_structure_hooks
from lightning_prune.compact import compact_
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import convert_

SUFFIXES = pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
TOKENS = torch.arange(7)


class Tied(nn.Module):
    """An embedding that is the classifier too, and a norm with statistics."""

    def __init__(self, width: int = 6, *, scale: float = 1.0) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, width), nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = scale

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)) * self.scale)


class Arguments(LightningModule):
    """Takes its arguments one by one."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Tied(width, scale=scale)


class Settings(LightningModule):
    """Takes its arguments as one object."""

    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__()
        self.save_hyperparameters(settings)
        self.net = Tied(settings.width)


class Parts(LightningModule):
    """Takes modules, so that only LightningCLI can save what it was made with."""

    def __init__(self, net: nn.Module, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.rate = rate


class Mixed(PrunableMixin, Arguments):
    """Loads itself."""

    def on_load_checkpoint(self, checkpoint):  # without super(), as people do
        self.loaded = True


def dynamic_(net: Tied) -> None:
    unit = MutableChannel(6)
    convert_(net.embed).get_mutable_attr("out_channels").register_mutable(unit, 0, 6)
    convert_(net.norm).get_mutable_attr("in_channels").register_mutable(unit, 0, 6)
    convert_(net.head).get_mutable_attr("in_channels").register_mutable(unit, 0, 6)
    unit.current_choice = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)


def small(seed: int = 0, **kwargs) -> Tied:
    torch.manual_seed(seed)
    net = Tied(**kwargs)
    net(TOKENS)  # statistics
    dynamic_(net)
    compact_(net)
    return net.eval()


def with_small(make):
    module = make()
    dynamic_(module.net)
    compact_(module)
    return module


def save_by_trainer(module: LightningModule, path: Path) -> None:
    register_structure_hooks(module)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
