"""Any other module that owns a pruned tensor, or an integer that follows a pruned axis."""

from __future__ import annotations

from torch import nn

from lightning_prune.ops.base import DynamicOp

__all__ = ["GenericDynamic"]


class GenericDynamic(DynamicOp):
    """A module of any class whose tensors are cut, and whose integers follow, as asked for one by one.

    It presents nothing at first: `axis_container` and `follow_integer` add what the class has to present. Its axes are
    named after the tensor, such as ``cls_token.2``.
    """

    static_op = nn.Module

    def _describe(self) -> None:
        """Add nothing: no axis of an unknown module is known."""
