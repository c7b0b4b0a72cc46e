"""A copy of all that pruning and training change, and the way back to it: for a guard."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_prune.callback.ranks import agree
from lightning_prune.callback.shapes import averages_of, forget_compiled, grow_all_, made_for, shrink_all_
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops
from lightning_prune.ops.structure import named_tensors
from lightning_prune.plan import KeepPlan

__all__ = ["kept_copy", "restore_"]


def kept_copy(trainer: Trainer, pl_module: LightningModule, mutator: ChannelMutator) -> dict[str, Any]:
    """Return masks, tensors and optimizer state as plain data in the memory of the host.

    Args:
        trainer: Its optimizers, and the averages that its callbacks hold, are copied too.
        pl_module: Masked or small.
        mutator: Its units have the masks.
    """
    models = [pl_module, *averages_of(trainer)]
    return {
        "kept": {unit.name: unit.mutable.current_mask.nonzero().flatten() for unit in mutator.units},
        "is_small": not dynamic_ops(pl_module),
        "tensors": [{name: _copied(tensor) for name, _, _, tensor in named_tensors(model)} for model in models],
        "optimizers": [_state_of(optimizer) for optimizer in trainer.optimizers],
    }


def restore_(
    trainer: Trainer,
    pl_module: LightningModule,
    mutator: ChannelMutator,
    copy: dict[str, Any],
    home: tuple[torch.device, torch.dtype | str],
) -> None:
    """Make everything what it was, bit for bit; learning rates and the progress of the training stay.

    Args:
        trainer: As for `kept_copy`.
        pl_module: Of the same dense model.
        mutator: Of it.
        copy: What `kept_copy` returned.
        home: Device and dtype of the module at its trace.
    """
    if not dynamic_ops(pl_module):
        grow_all_(trainer, pl_module, mutator)
    plan = KeepPlan({name: tuple(copy["kept"][name].tolist()) for name in mutator.current_plan().kept})
    with made_for(pl_module, *home):
        agree(trainer, mutator, plan)
    if copy["is_small"]:
        shrink_all_(trainer, pl_module)
    for model, tensors in zip([pl_module, *averages_of(trainer)], copy["tensors"], strict=False):
        _write_(model, tensors)
    for optimizer, state in zip(trainer.optimizers, copy["optimizers"], strict=True):
        _write_state_(optimizer, state)
    forget_compiled(pl_module)


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


@torch.no_grad()
def _write_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, _, _, tensor in named_tensors(model):
        tensor.copy_(tensors[name])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_of(optimizer: Optimizer) -> dict[int, Any]:
    """Return position of a parameter -> its state."""
    found = {}
    for position, parameter in enumerate(_parameters(optimizer)):
        if parameter in optimizer.state:
            found[position] = tree_map(_copied, dict(optimizer.state[parameter]))
    return found


def _write_state_(optimizer: Optimizer, saved: dict[int, Any]) -> None:
    """Write states into the dict of the optimizer: wrappers hold on to it."""
    for position, parameter in enumerate(_parameters(optimizer)):
        now = optimizer.state.pop(parameter, {})
        if position in saved:
            devices = {name: value.device for name, value in now.items() if isinstance(value, Tensor)}
            optimizer.state[parameter] = {
                name: _placed(value, devices.get(name, parameter.device)) for name, value in saved[position].items()
            }


def _placed(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, value)
