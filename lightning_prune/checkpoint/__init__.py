"""Checkpoints of pruned models: the structure travels with the weights, and models are reshaped before they load.

A checkpoint is Lightning's, any dict with a ``state_dict``, a bare state dict, or ``.safetensors``. The structure
(plain data, see `structure_of`) is found in its entry ``lightning_prune``, or in the metadata that
`register_structure_hooks` makes `state_dict()` write. Nothing is traced and nothing in the file is executed.
"""

from __future__ import annotations

from lightning_prune.checkpoint.check import check_structure
from lightning_prune.checkpoint.describe import Description, describe
from lightning_prune.checkpoint.hooks import KEY, register_structure_hooks
from lightning_prune.checkpoint.load import load_pruned
from lightning_prune.checkpoint.mixin import PrunableMixin
from lightning_prune.checkpoint.save import save_pruned
from lightning_prune.ops.structure import fingerprint_of, remember_structure_, reshape_, structure_of

__all__ = [
    "KEY",
    "Description",
    "PrunableMixin",
    "check_structure",
    "describe",
    "fingerprint_of",
    "load_pruned",
    "register_structure_hooks",
    "remember_structure_",
    "reshape_",
    "save_pruned",
    "structure_of",
]
