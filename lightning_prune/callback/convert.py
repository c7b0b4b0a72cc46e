"""The way of a module from dense to dynamic, and back where training never began."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callback.example import find_example
from lightning_prune.callback.gone import alive_now
from lightning_prune.callback.shapes import made_for
from lightning_prune.callback.waiting import waiting
from lightning_prune.checkpoint import reshape_
from lightning_prune.compact import grow_
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops
from lightning_prune.ops.structure import named_tensors, remembered_structure, set_masks_

__all__ = ["Conversion"]


class Conversion:
    """Remembers what a module was before it was converted, and where.

    Args:
        verbose: Whether a bar is shown on rank 0 while a long analysis runs.

    Attributes:
        home: Device and dtype of the module at the trace.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self.home: tuple[torch.device, torch.dtype | str] = (torch.device("cpu"), torch.float32)
        self._before: dict[str, Any] | None = None

    def convert_(
        self, trainer: Trainer, pl_module: LightningModule, root: nn.Module, mutator: ChannelMutator, example: Any
    ) -> dict[str, Tensor]:
        """Trace and convert the dense module; a small one grows first, and goes on from what it is.

        Args:
            trainer: Knows the training data.
            pl_module: Of the Trainer.
            root: What is pruned of it.
            mutator: Without a model, or with `root`.
            example: What the user gave to trace `root` with, or None.

        Returns:
            Unit name -> bool `[C]`, False where a channel has no values: those that left the small module.
        """
        small = remembered_structure(pl_module)
        first = next(pl_module.parameters(), None)
        self.home = (torch.device("cpu") if first is None else first.device, pl_module._dtype)
        self._before = None if dynamic_ops(pl_module) else small
        with made_for(pl_module, *self.home):
            grow_(pl_module)
            if mutator.example_input is None:
                mutator.example_input = find_example(trainer, pl_module, root, example)
            if mutator._model is not root:
                with waiting("Analyzing the model", shown=self.verbose and trainer.is_global_zero):
                    mutator.prepare_from_supernet(root)
        if not small["tensors"]:
            return {}
        set_masks_(pl_module, small)  # a checkpoint may bring the rest back
        return alive_now(mutator)

    def settle(self) -> None:
        """Forget what the module was: training begins."""
        self._before = None

    def take_back_(self, pl_module: LightningModule) -> bool:
        """Make the module what it was before, unless training began; return whether it did so."""
        if self._before is None:
            return False
        reshape_(pl_module, self._before, loaded=[name for name, _, _, _ in named_tensors(pl_module)])
        self._before = None
        return True
