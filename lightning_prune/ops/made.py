"""Layers whose weight is made anew by somebody else, out of parameters of other names.

Parametrised layers make it whenever it is read. The older weight norm, spectral norm and masks of `nn.utils.prune` are
hooks that make it before each forward, and leave it behind as a plain attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_prune.ops.present import Presented

__all__ = ["is_made", "make_again_"]


def is_made(module: nn.Module, op: Any) -> bool:
    """Whether a tensor that the dynamic op `op` presents is no parameter or buffer of `module`, or has no entry.

    Such a layer needs a generic op, which presents what there is under the names that it has.
    """
    held = {**module._parameters, **module._buffers}
    names = {*_presented(op), *getattr(module, "_flat_weights_names", ())}  # those of a recurrent layer vary
    absent = any(name not in held for name in names)
    return absent or any(tensor is not None and not tensor.numel() for tensor in held.values())


@cache
def _presented(op: Any) -> frozenset[str]:
    """Return the names of the tensors that a dynamic op presents."""
    attributes = (item for cls in op.__mro__ for item in vars(cls).items())
    return frozenset(name for name, value in attributes if isinstance(value, Presented) and value.is_tensor)


def make_again_(module: nn.Module) -> None:
    """Let the hooks of a module make its weight now: what the last forward left behind has another size."""
    with torch.no_grad():
        for name, make in _makers(module):
            setattr(module, name, make().detach())


def _makers(module: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each tensor that a hook makes, and what makes it."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, partial(hook.apply_mask, module)
        elif isinstance(hook, WeightNorm):
            yield hook.name, partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            yield hook.name, partial(hook.compute_weight, module, do_power_iteration=False)
