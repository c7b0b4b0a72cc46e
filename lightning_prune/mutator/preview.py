"""What a model would be under a plan: a small copy, made without touching the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.snapshot import reset_caches
from lightning_prune.mutator.arguments import check_plan
from lightning_prune.mutator.mutator import ChannelMutator
from lightning_prune.ops import to_static_
from lightning_prune.plan import KeepPlan

__all__ = ["detached", "preview"]


def preview(mutator: ChannelMutator, plan: KeepPlan) -> nn.Module:
    """Return the plain small model that a plan would give; the mutator's model, its masks and choices stay.

    Args:
        mutator: With a model.
        plan: Need not be certified; units that it does not name keep what they keep now.

    Returns:
        A deep copy, as from `export_pruned`; it does not remember its structure.

    Raises:
        PlanError: The plan names an unknown unit or channel.
        ConfigError: The masks describe no plain layer.
    """
    check_plan(plan, {unit.name: unit.num_channels for unit in mutator.units})
    model = mutator.model
    small, mutables = copy.deepcopy((model, {u.name: u.mutable for u in mutator.units}), detached(model))
    for name, kept in plan.kept.items():
        mask = torch.zeros(mutables[name].num_channels, dtype=torch.bool)
        mask[list(kept)] = True
        mutables[name].current_choice = mask
    reset_caches(small, mutator.graph.caches)
    return to_static_(small)


def detached(model: nn.Module) -> dict[int, Any]:
    """Return copies for what torch refuses to copy: activations with a history that modules keep as attributes."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for value in tree_leaves(module.__dict__):
            if isinstance(value, Tensor) and not value.is_leaf:
                copies[id(value)] = value.detach().clone()
    return copies
