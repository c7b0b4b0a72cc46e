"""Activations that own parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import on_full, presented_integer, presented_tensor

__all__ = ["DynamicPReLU"]


class DynamicPReLU(DynamicOp, nn.PReLU):
    """`torch.nn.PReLU` with the slopes of its kept channels; a single slope serves any number of channels."""

    static_op = nn.PReLU
    aliases = {"in_channels": "num_parameters", "out_channels": "num_parameters"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    num_parameters: Any = presented_integer("num_parameters")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        self._add_axis("num_parameters", self.__dict__["num_parameters"])
        self._add_axes(weight=("num_parameters",))
