"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import on_full, presented_integer, presented_tensor

__all__ = [
    "DynamicBatchNorm1d",
    "DynamicBatchNorm2d",
    "DynamicBatchNorm3d",
    "DynamicGroupNorm",
    "DynamicInstanceNorm1d",
    "DynamicInstanceNorm2d",
    "DynamicInstanceNorm3d",
    "DynamicLayerNorm",
    "DynamicRMSNorm",
    "DynamicSyncBatchNorm",
]


class _DynamicStatistics(DynamicOp):
    """What batch and instance norm share: running statistics, of which the kept ones move."""

    aliases = {"in_channels": "num_features", "out_channels": "num_features"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    bias: Any = presented_tensor("bias")
    running_mean: Any = presented_tensor("running_mean")
    running_var: Any = presented_tensor("running_var")
    num_features: Any = presented_integer("num_features")
    reset_parameters: Any = on_full("reset_parameters")
    reset_running_stats: Any = on_full("reset_running_stats")

    def _describe(self) -> None:
        self._add_axis("num_features", self.__dict__["num_features"])
        axis = ("num_features",)
        self._add_axes(weight=axis, bias=axis, running_mean=axis, running_var=axis)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise the kept channels, and write their running statistics back."""
        state = self._dynamic
        output: Tensor  # a subclass may take more than an input
        if not (state.has_loans or state.cuts(self, "running_mean") or state.cuts(self, "running_var")):
            output = super().forward(input, *args, **kwargs)
            return output
        state.enter_forward()
        try:
            output = super().forward(input, *args, **kwargs)
        finally:
            state.leave_forward(written=self.training)
        return output


class DynamicBatchNorm1d(_DynamicStatistics, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that runs on its kept channels."""

    static_op = nn.BatchNorm1d


class DynamicBatchNorm2d(_DynamicStatistics, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that runs on its kept channels."""

    static_op = nn.BatchNorm2d


class DynamicBatchNorm3d(_DynamicStatistics, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that runs on its kept channels."""

    static_op = nn.BatchNorm3d


class DynamicSyncBatchNorm(_DynamicStatistics, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that runs on its kept channels."""

    static_op = nn.SyncBatchNorm


class DynamicInstanceNorm1d(_DynamicStatistics, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` that runs on its kept channels."""

    static_op = nn.InstanceNorm1d


class DynamicInstanceNorm2d(_DynamicStatistics, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` that runs on its kept channels."""

    static_op = nn.InstanceNorm2d


class DynamicInstanceNorm3d(_DynamicStatistics, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` that runs on its kept channels."""

    static_op = nn.InstanceNorm3d


class _DynamicShapeNorm(DynamicOp):
    """What layer norm and RMS norm share: one mask for each axis of `normalized_shape`."""

    aliases = {"in_channels": "num_features", "out_channels": "num_features"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    normalized_shape: Any = presented_integer("normalized_shape")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        shape = self.__dict__["normalized_shape"]
        names = ["num_features"] if len(shape) == 1 else [f"normalized_shape.{dim}" for dim in range(len(shape))]
        axes = [self._add_axis(name, size, follow=False) for name, size in zip(names, shape, strict=True)]
        self._dynamic.follows["normalized_shape"] = dict(enumerate(axes))
        self._add_axes(weight=tuple(names), bias=tuple(names))


class DynamicLayerNorm(_DynamicShapeNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm` that runs on its kept features; mean and variance are those of the kept ones."""

    static_op = nn.LayerNorm
    bias: Any = presented_tensor("bias")


class DynamicRMSNorm(_DynamicShapeNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm` that runs on its kept features; the mean square is that of the kept ones."""

    static_op = nn.RMSNorm


class DynamicGroupNorm(DynamicOp, nn.GroupNorm):
    """`torch.nn.GroupNorm` that runs on its kept channels.

    Seen as `[num_groups, channels / num_groups]`, the mask must keep the same columns in every group that lives;
    `num_groups` is the number of those.
    """

    static_op = nn.GroupNorm
    aliases = {"in_channels": "num_channels", "out_channels": "num_channels"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    bias: Any = presented_tensor("bias")
    num_channels: Any = presented_integer("num_channels")
    num_groups: Any = presented_integer("num_groups")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        self._add_axis("num_channels", self.__dict__["num_channels"])
        self._add_axes(weight=("num_channels",), bias=("num_channels",))

    def _integer_names(self) -> list[str]:
        return [*super()._integer_names(), "num_groups"]

    def _live_integer(self, name: str) -> Any:
        if name != "num_groups":
            return super()._live_integer(name)
        groups, container = self.__dict__["num_groups"], self._dynamic.containers["num_channels"]
        if not container.is_cut:
            return groups
        rows = container.current_mask.view(groups, -1)
        alive, columns = rows.any(1), rows.any(0)
        if not torch.equal(rows, alive[:, None] & columns):
            raise ConfigError(
                f"Got groups that keep {rows.sum(1).tolist()} channels for DynamicGroupNorm(num_groups={groups}, "
                f"num_channels={container.num_channels}); expected the same channels in every group that remains."
            )
        return int(alive.sum())
