"""Everything that holds the shapes of the model changes together: parameters, optimizer state, averages, wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.optim.swa_utils import AveragedModel

from lightning_prune.callback.ranks import rewrap_
from lightning_prune.checkpoint import reshape_, structure_of
from lightning_prune.compact import compact_, grow_
from lightning_prune.mutator import ChannelMutator

__all__ = ["averages_of", "forget_compiled", "grow_all_", "is_compiled", "made_for", "shrink_all_"]


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """Return the averaged copies of the module that other callbacks hold."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, nn.Module):
            found.append(copy.module if isinstance(copy, AveragedModel) else copy)
    return found


def shrink_all_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Make the module plain and small, its optimizer state and its averages too, and wrap it anew."""
    structure = structure_of(pl_module)
    compact_(pl_module, trainer.optimizers)
    for copy in averages_of(trainer):
        reshape_(copy, structure)
    rewrap_(trainer, pl_module)
    forget_compiled(pl_module)


def grow_all_(trainer: Trainer, pl_module: LightningModule, mutator: ChannelMutator) -> None:
    """Make a small module dense and dynamic again, with the masks of the mutator, so that it can be pruned further."""
    grow_(pl_module, trainer.optimizers)
    for copy in averages_of(trainer):
        grow_(copy)
    mutator.rewire()
    rewrap_(trainer, pl_module)
    forget_compiled(pl_module)


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether the module, or a part of it, is compiled."""
    in_part = (isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in pl_module.modules())
    return pl_module._compiler_ctx is not None or any(in_part)


def forget_compiled(pl_module: LightningModule) -> None:
    """Drop compiled code: it is for another structure, and a few recompilations are the limit."""
    if is_compiled(pl_module):
        torch.compiler.reset()


@contextmanager
def made_for(pl_module: LightningModule, device: torch.device, dtype: torch.dtype | str) -> Iterator[None]:
    """Let the module say that it lives where it was traced: `forward` may make tensors on `self.device`.

    Args:
        pl_module: Lightning announces another device before the weights move there.
        device: Of the weights at the trace.
        dtype: Of the module at the trace.
    """
    saved = [(m, m._device, m._dtype) for m in pl_module.modules() if isinstance(m, _DeviceDtypeModuleMixin)]
    try:
        for module, _, _ in saved:
            module._device, module._dtype = device, dtype
        yield
    finally:
        for module, old_device, old_dtype in saved:
            module._device, module._dtype = old_device, old_dtype
