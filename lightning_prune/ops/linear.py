"""Linear and bilinear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import on_full, presented_integer, presented_tensor

__all__ = ["DynamicBilinear", "DynamicLinear"]


class DynamicLinear(DynamicOp, nn.Linear):
    """`torch.nn.Linear` that runs on its kept features."""

    static_op = nn.Linear
    aliases = {"in_channels": "in_features", "out_channels": "out_features"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    bias: Any = presented_tensor("bias")
    in_features: Any = presented_integer("in_features")
    out_features: Any = presented_integer("out_features")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        self._add_axis("in_features", self.__dict__["in_features"])
        self._add_axis("out_features", self.__dict__["out_features"])
        self._add_axes(weight=("out_features", "in_features"), bias=("out_features",))


class DynamicBilinear(DynamicOp, nn.Bilinear):
    """`torch.nn.Bilinear` that runs on its kept features."""

    static_op = nn.Bilinear
    aliases = {"in_channels": "in1_features", "out_channels": "out_features"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    bias: Any = presented_tensor("bias")
    in1_features: Any = presented_integer("in1_features")
    in2_features: Any = presented_integer("in2_features")
    out_features: Any = presented_integer("out_features")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        for attr in ("in1_features", "in2_features", "out_features"):
            self._add_axis(attr, self.__dict__[attr])
        self._add_axes(weight=("out_features", "in1_features", "in2_features"), bias=("out_features",))
