"""Layers that the trace does not see: one that meets a narrower input says so, by name, instead of failing in a kernel.

Only layers whose input axis no unit cuts are watched: outside `submodule`, or never called by `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import ConfigError
from lightning_prune.ops import DynamicOp, GenericDynamic, dynamic_ops

__all__ = ["watch_widths"]


@dataclass(frozen=True)
class _WidthCheck:
    """A forward pre-hook; at module level, so that it pickles and deepcopies.

    Args:
        name: Qualified name of the layer.
        axis: Axis of the input that must have `width` entries.
        width: Dense width.
    """

    name: str
    axis: int
    width: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and -args[0].dim() <= self.axis < args[0].dim():
            found = args[0].shape[self.axis]
            if found < self.width:
                raise ConfigError(
                    f"Got an input of {found} channels for layer {self.name!r}, which expects {self.width}: what it "
                    "reads was pruned, and the trace did not see it read. Call it in forward, prune a submodule= that "
                    "ends before it, or ignore= the layer that makes its input."
                )


def watch_widths(pl_module: LightningModule) -> list[RemovableHandle]:
    """Watch the input of every layer that keeps all its input channels.

    Args:
        pl_module: Converted; in one that is small for good nothing can become narrower, and nothing is watched.

    Returns:
        Handles that end the watch.
    """
    handles: list[RemovableHandle] = []
    if not dynamic_ops(pl_module):
        return handles
    for name, module in pl_module.named_modules():
        place = _input_axis(module)
        if place is not None and not _follows(module):
            handles.append(module.register_forward_pre_hook(_WidthCheck(name, *place)))
    return handles


def _input_axis(module: nn.Module) -> tuple[int, int] | None:
    """Return the channel axis of a layer's input and its dense width; None for other modules."""
    fields = module.__dict__
    if isinstance(module, nn.Linear):
        return -1, fields["in_features"]
    if isinstance(module, _ConvNd):
        return -1 - len(fields["kernel_size"]), fields["in_channels"]
    if isinstance(module, _NormBase):
        return 1, fields["num_features"]
    if isinstance(module, nn.LayerNorm):
        return -1, fields["normalized_shape"][-1]
    return None


def _follows(module: nn.Module) -> bool:
    """Whether a unit may cut the input of a layer."""
    if not isinstance(module, DynamicOp):
        return False
    if isinstance(module, GenericDynamic):  # its weight is made of others, whose axes do not say which is the input
        return True
    names = {"in_channels", "in_features", "num_features"}
    return any(bool(c.spans) for attr, c in module.mutable_attrs.items() if attr in names or attr.startswith("norm"))
