"""Structured pruning inside PyTorch Lightning's fit."""

from __future__ import annotations

from lightning_prune.callback import PruningCallback
from lightning_prune.checkpoint import PrunableMixin, describe, load_pruned, save_pruned
from lightning_prune.export import export_onnx, export_program, export_pruned
from lightning_prune.graph import register_attributes
from lightning_prune.mutator import ChannelMutator
from lightning_prune.schedule import Schedule
from lightning_prune.sensitivity import sensitivity
from lightning_prune.units import L1MutableChannelUnit, MutableChannelUnit, SequentialMutableChannelUnit

__all__ = [
    "ChannelMutator",
    "L1MutableChannelUnit",
    "MutableChannelUnit",
    "PrunableMixin",
    "PruningCallback",
    "Schedule",
    "SequentialMutableChannelUnit",
    "describe",
    "export_onnx",
    "export_program",
    "export_pruned",
    "load_pruned",
    "register_attributes",
    "save_pruned",
    "sensitivity",
]
