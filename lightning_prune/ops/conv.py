"""Convolutions and transposed convolutions, grouped ones too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ConfigError
from lightning_prune.mutables import KeptIndices, MutableChannelContainer
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import on_full, presented_integer, presented_tensor

__all__ = [
    "DynamicConv1d",
    "DynamicConv2d",
    "DynamicConv3d",
    "DynamicConvTranspose1d",
    "DynamicConvTranspose2d",
    "DynamicConvTranspose3d",
]


class _DynamicConv(DynamicOp):
    """What the convolutions share.

    With G groups the weight has one axis whose channels are counted inside a group (the input axis of a convolution,
    the output axis of a transposed one). What remains of it, and `groups` itself, follow from the masks of the two
    sides: seen as `[G, channels / G]`, that side must keep the same columns in every group that lives, and the other
    side the same number of channels in each of those groups and none in the others.
    """

    weight: Any = presented_tensor("weight")
    bias: Any = presented_tensor("bias")
    in_channels: Any = presented_integer("in_channels")
    out_channels: Any = presented_integer("out_channels")
    groups: Any = presented_integer("groups")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        fields = self.__dict__
        self._add_axis("in_channels", fields["in_channels"])
        self._add_axis("out_channels", fields["out_channels"])
        inner = "out_channels" if fields["transposed"] else "in_channels"
        outer = "in_channels" if fields["transposed"] else "out_channels"
        if fields["groups"] > 1:
            inner += "_per_group"
        self._add_axes(weight=(outer, inner, *[None] * len(fields["kernel_size"])), bias=("out_channels",))

    def _axis_kept(self, attr: str) -> KeptIndices | None:
        return self._group_layout()[1] if attr.endswith("_per_group") else super()._axis_kept(attr)

    def _integer_names(self) -> list[str]:
        return [*super()._integer_names(), "groups"]

    def _live_integer(self, name: str) -> Any:
        return self._group_layout()[0] if name == "groups" else super()._live_integer(name)

    def _group_layout(self) -> tuple[int, KeptIndices | None]:
        """Return the number of living groups, and what remains of the channels inside each."""
        groups = self.__dict__["groups"]
        sides = [self._dynamic.containers[attr] for attr in ("in_channels", "out_channels")]
        if groups == 1 or not any(side.is_cut for side in sides):
            return groups, None
        try:
            inner, outer = reversed(sides) if self.__dict__["transposed"] else sides
            return _group_layout(inner, outer, groups)
        except ConfigError as error:
            raise ConfigError(f"{type(self).__name__}({self._dense_sizes()}): {error}") from error

    def _dense_sizes(self) -> str:
        """Return the dense sizes, for messages."""
        return ", ".join(f"{attr}={self.__dict__[attr]}" for attr in ("in_channels", "out_channels", "groups"))


def _group_layout(
    inner: MutableChannelContainer, outer: MutableChannelContainer, groups: int
) -> tuple[int, KeptIndices | None]:
    """Return the number of living groups and what remains of each, for the side that the weight counts per group.

    Raises:
        ConfigError: The masks do not describe a convolution with fewer, equal groups.
    """
    rows = inner.current_mask.view(groups, -1)
    alive, columns = rows.any(1), rows.any(0)
    if not torch.equal(rows, alive[:, None] & columns):
        raise ConfigError(
            f"Got groups that keep {rows.sum(1).tolist()} channels in different places; expected the same ones in "
            "every group that remains."
        )
    counts = outer.current_mask.view(groups, -1).sum(1)
    if not torch.equal(counts > 0, alive) or len(set(counts[alive].tolist())) != 1:
        raise ConfigError(
            f"Got {rows.sum(1).tolist()} channels per group on one side and {counts.tolist()} on the other; expected "
            "the same groups to remain on both, with the same number of channels in each."
        )
    return int(alive.sum()), None if bool(columns.all()) else KeptIndices(columns)


class DynamicConv1d(_DynamicConv, nn.Conv1d):
    """`torch.nn.Conv1d` that runs on its kept channels."""

    static_op = nn.Conv1d


class DynamicConv2d(_DynamicConv, nn.Conv2d):
    """`torch.nn.Conv2d` that runs on its kept channels.

    Example:
        >>> conv = DynamicConv2d.convert_from(nn.Conv2d(3, 8, 3, padding=1))
        >>> conv
        DynamicConv2d(
          3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)
          (mutable_attrs): ModuleDict(
            (in_channels): MutableChannelContainer(name=, num_channels=3, activated_channels: 3)
            (out_channels): MutableChannelContainer(name=, num_channels=8, activated_channels: 8)
          )
        )
    """

    static_op = nn.Conv2d


class DynamicConv3d(_DynamicConv, nn.Conv3d):
    """`torch.nn.Conv3d` that runs on its kept channels."""

    static_op = nn.Conv3d


class DynamicConvTranspose1d(_DynamicConv, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that runs on its kept channels."""

    static_op = nn.ConvTranspose1d


class DynamicConvTranspose2d(_DynamicConv, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that runs on its kept channels."""

    static_op = nn.ConvTranspose2d


class DynamicConvTranspose3d(_DynamicConv, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that runs on its kept channels."""

    static_op = nn.ConvTranspose3d
