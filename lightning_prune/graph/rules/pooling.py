"""Pooling, padding, resampling and patches: batch and channels stay, the size of space is fixed."""

from __future__ import annotations

import math
import re

from torch import Tensor

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import FIXED, Axis
from lightning_prune.graph.rules.contraction import at
from lightning_prune.graph.rules.movement import reshape_axes
from lightning_prune.graph.rules.table import rule


def hold_space(call: Call, tensor: Tensor, first: int, why: str = "a spatial axis") -> None:
    """Forbid a change of size along the axes of space, the last ones."""
    for d in range(first, tensor.dim()):
        call.hold(tensor, d, why)


@rule(
    """
    avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d
    _upsample_nearest_exact1d reflection_pad1d replication_pad1d avg_pool2d max_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d upsample_nearest2d _upsample_nearest_exact2d
    reflection_pad2d replication_pad2d avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d
    _adaptive_avg_pool3d upsample_nearest3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa
    max_unpool2d max_unpool3d
    """
)
def spatial(call: Call) -> None:
    """The last n axes are space; the positions that an unpooling is given are those of its own channels."""
    match = re.search(r"(\d)d", call.name)
    assert match is not None
    x = call.inputs[0]
    lead = x.dim() - int(match[1])
    axes = call.axes(x)[:lead]
    space: list[Axis] = [FIXED] * (x.dim() - lead)
    for tensor in call.inputs:
        for d in range(lead, tensor.dim()):
            if _is_left(call, d - lead):
                space[d - lead] = call.axes(tensor)[d]
            else:
                call.hold(tensor, d, "a spatial axis")
        axes = [call.bind(a, b) for a, b in zip(axes, call.axes(tensor), strict=False)]
    for out in call.outputs:
        call.put(out, [*axes, *space])


def _is_left(call: Call, k: int) -> bool:
    """Return whether a pooling takes each place along an axis of space alone, and leaves none out."""
    kernel, stride = call["kernel_size"], call["stride"]
    if kernel is None or len(call.outputs) > 1:  # where a largest value is counts along all of space
        return False
    return at(kernel, k) == 1 == at(stride or kernel, k) and not at(call["padding"], k)


@rule("fractional_max_pool2d fractional_max_pool3d")
def fractional_pool(call: Call) -> None:
    """Each channel has random samples `[batch, channels, n]` of its own."""
    x, samples = call["self"], call["random_samples"]
    lead = x.dim() - int(call.name[-2])
    axes, own = call.axes(x), call.axes(samples)
    hold_space(call, x, lead)
    for k in range(1, lead + 1):
        axes[lead - k] = call.bind(axes[lead - k], own[-1 - k])
    for out in call.outputs:
        call.put(out, [*axes[:lead], *[FIXED] * (out.dim() - lead)])


@rule("grid_sampler_2d grid_sampler_3d")
def grid_sample(call: Call) -> None:
    """`[batch, channels, *space]` read at `[batch, *space, coordinates]`."""
    x, grid = call["input"], call["grid"]
    hold_space(call, x, 2)
    hold_space(call, grid, 1, "coordinates")
    batch, channels = call.axes(x)[:2]
    call.put(call.out, [call.bind(batch, call.axes(grid)[0]), channels, *[FIXED] * (x.dim() - 2)])


@rule("affine_grid_generator", sizes=("size",))
def affine_grid(call: Call) -> None:
    """Coordinates of every pixel from a matrix per example: the channels in `size` do not matter."""
    hold_space(call, call["theta"], 1, "coordinates")
    call.put(call.out, [call.axes(call["theta"])[0], *[FIXED] * (call.out.dim() - 1)])


@rule("im2col")
def patches(call: Call) -> None:
    """`[C, H, W] -> [C x kernel, positions]`: each channel comes once per place of the kernel."""
    x, kernel = call["self"], math.prod(call["kernel_size"])
    *lead, channels, _, _ = call.axes(x)
    hold_space(call, x, x.dim() - 2)
    call.put(call.out, [*lead, _repeated(call, x, channels, kernel), FIXED])


def _repeated(call: Call, x: Tensor, channels: Axis, times: int) -> Axis:
    size = x.shape[-3]
    return reshape_axes(call, [size, times], [channels, FIXED], [size * times])[0]


@rule("col2im")
def fold(call: Call) -> None:
    """`[C x kernel, positions] -> [C, H, W]`: the inverse, overlaps summed."""
    x, kernel = call["self"], math.prod(call["kernel_size"])
    *lead, rows, _ = call.axes(x)
    hold_space(call, x, x.dim() - 1)
    channels, offsets = reshape_axes(call, [x.shape[-2]], [rows], [x.shape[-2] // kernel, kernel])
    call.freeze(offsets, "the places of a kernel")
    call.put(call.out, [*lead, channels, FIXED, FIXED])


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> None:
    """`[C x r^2, H, W] -> [C, H x r, W x r]`."""
    x, factor = call["self"], call["upscale_factor"] ** 2
    *lead, channels, _, _ = call.axes(x)
    hold_space(call, x, x.dim() - 2)
    kept, offsets = reshape_axes(call, [x.shape[-3]], [channels], [x.shape[-3] // factor, factor])
    call.freeze(offsets, "the channels of one upscaled pixel")
    call.put(call.out, [*lead, kept, FIXED, FIXED])


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> None:
    """`[C, H x r, W x r] -> [C x r^2, H, W]`."""
    x = call["self"]
    *lead, channels, _, _ = call.axes(x)
    hold_space(call, x, x.dim() - 2)
    call.put(call.out, [*lead, _repeated(call, x, channels, call["downscale_factor"] ** 2), FIXED, FIXED])


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(call: Call) -> None:
    """Transpose `groups x channels`: the groups stay, channel i of each goes together."""
    x, groups = call["self"], call["groups"]
    axes, size = call.axes(x), x.shape[1]
    outer, inner = reshape_axes(call, [size], [axes[1]], [groups, size // groups])
    call.freeze(outer, "the groups of a shuffle")
    axes[1] = reshape_axes(call, [size // groups, groups], [inner, outer], [size])[0]
    call.put(call.out, axes)
