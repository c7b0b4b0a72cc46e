"""Any other module that owns a pruned tensor, or an integer that follows a pruned axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_prune.errors import ConfigError
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.made import make_again_
from lightning_prune.ops.slicing import put_

__all__ = ["DynamicParametrizationList", "GenericDynamic"]


class GenericDynamic(DynamicOp):
    """A module of any class whose tensors are cut, and whose integers follow, as asked for one by one.

    It presents nothing at first: `axis_container` and `follow_integer` add what the class has to present. Its axes are
    named after the tensor, such as ``cls_token.2``.
    """

    static_op = nn.Module

    def _describe(self) -> None:
        """Add nothing: no axis of an unknown module is known."""

    def to_static(self) -> nn.Module:
        """Become a module of the original class again; what hooks make of its tensors is made anew."""
        module = super().to_static()
        make_again_(module)
        return module


class DynamicParametrizationList(GenericDynamic, ParametrizationList):
    """`torch.nn.utils.parametrize.ParametrizationList` whose originals are cut."""

    static_op = ParametrizationList

    @torch.no_grad()
    def right_inverse(self, value: Any) -> None:
        """Take an assignment to the parametrised tensor over into the kept entries of the originals.

        Args:
            value: What is assigned, of the kept size.

        Raises:
            ConfigError: It has another size, or a parametrisation has no inverse.
        """
        modules: list[Any] = [*self]
        for module in reversed(modules):
            if not hasattr(module, "right_inverse"):
                name = getattr(module, "static_type", type(module)).__name__
                raise ConfigError(f"Got a value for a tensor that {name} makes, which has no inverse.")
            value = module.right_inverse(value)
        names = ["original"] if self.is_tensor else [f"original{k}" for k in range(self.ntensors)]
        parts = [value] if self.is_tensor else list(value)
        for name, part in zip(names, parts, strict=True):
            expected = getattr(self, name).shape
            if part.shape != expected:
                raise ConfigError(f"Got {name} of size {list(part.shape)}; expected the kept size {list(expected)}.")
        for name, part in zip(names, parts, strict=True):
            full = self._parameters.get(name, self._buffers.get(name))
            assert full is not None, "its shape was just read"
            put_(full, part, self._dynamic.cuts(self, name))
