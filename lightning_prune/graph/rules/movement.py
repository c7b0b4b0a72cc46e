"""Ops that move data: they do to the labels what they do to the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_prune.graph.call import Call, normalize_dims
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.table import rule


def view_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the smallest runs of old and new axes (sizes other than 1) that hold the same number of elements."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i], [j]
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


def reshape_axes(call: Call, shape: Sequence[int], axes: Sequence[Axis], new_shape: Sequence[int]) -> list[Axis]:
    """Return the axes of a row-major view: labelled axes are split and merged as products."""
    if 0 in shape:
        return [FIXED] * len(new_shape)
    for size, axis in zip(shape, axes, strict=True):
        if size == 1:
            call.freeze(axis, "one channel taken apart")
    result: list[Axis] = [ANY] * len(new_shape)
    old = [d for d, n in enumerate(shape) if n != 1]
    new = [d for d, n in enumerate(new_shape) if n != 1]
    for left, right in view_groups([shape[d] for d in old], [new_shape[d] for d in new]):
        sources = [(shape[old[k]], axes[old[k]]) for k in left]
        targets = [new[k] for k in right]
        for d, axis in zip(targets, _regroup(call, sources, [new_shape[d] for d in targets]), strict=True):
            result[d] = axis
    return result


def _regroup(call: Call, sources: Sequence[tuple[int, Axis]], sizes: Sequence[int]) -> list[Axis]:
    """Map one run of old axes to one run of new axes that holds the same elements."""
    if len(sources) == 1 and len(sizes) == 1:
        return [sources[0][1]]
    labelled = [k for k, (_, axis) in enumerate(sources) if is_labelled(axis)]
    plain = FIXED if any(isinstance(axis, str) and axis == FIXED for _, axis in sources) else ANY
    if not labelled:
        return [plain] * len(sizes)
    flat = call.space.merge([sources[k][1] for k in labelled])
    # the labels as a grid over all old axes, repeated along those that carry none
    grid = flat.reshape([n if k in labelled else 1 for k, (n, _) in enumerate(sources)])
    grid = np.broadcast_to(grid, [n for n, _ in sources]).reshape(sizes)
    varies = [bool((grid != np.take(grid, [0], axis=k)).any()) for k in range(grid.ndim)]
    core = np.ascontiguousarray(grid[tuple(slice(None) if v else 0 for v in varies)])
    factors = iter(call.space.split(core.reshape(-1), core.shape) if core.ndim > 1 else [core])
    return [next(factors) if v else plain for v in varies]


@rule(
    """
    view _unsafe_view reshape _reshape_alias flatten unflatten view_as reshape_as squeeze squeeze_ unsqueeze
    unsqueeze_ view_copy _reshape_copy
    """,
    sizes=("size", "shape", "sizes"),
)
def view(call: Call) -> None:
    """Split and merge axes as products."""
    x = call["self"]
    # `squeeze_` has already changed `self`: its axes are then the longer list that the trace kept
    call.put(call.out, reshape_axes(call, call.shape_before(x), call.axes_before(x), call.out.shape))


@rule("permute")
def permute(call: Call) -> None:
    """Reorder the axes."""
    axes = call.axes(call["self"])
    call.put(call.out, [axes[d] for d in normalize_dims(call["dims"], len(axes))])


@rule("transpose swapaxes swapdims t transpose_ t_")
def transpose(call: Call) -> None:
    """Swap two axes."""
    axes = call.axes_before(call["self"])
    if len(axes) > 1:
        i, j = next(((call[a], call[b]) for a, b in (("dim0", "dim1"), ("axis0", "axis1")) if a in call), (0, 1))
        axes[i], axes[j] = axes[j], axes[i]
    call.put(call.out, axes)


@rule("expand expand_as broadcast_to", sizes=("size",))
def expand(call: Call) -> None:
    """Repeat axes of size 1: the new axes follow whatever they meet."""
    x, out = call["self"], call.out
    axes = call.axes(x)
    lead = out.dim() - x.dim()
    grown: list[Axis] = [ANY] * lead
    for d, axis in enumerate(axes):
        if x.shape[d] != out.shape[d + lead]:
            call.freeze(axis, "one channel broadcast")
        grown.append(axis if x.shape[d] == out.shape[d + lead] else ANY)
    call.put(out, grown)


@rule("repeat", index=True)
def repeat(call: Call) -> None:
    """Tile the labels."""
    x, times = call["self"], call["repeats"]
    axes = [ANY] * (len(times) - x.dim()) + call.axes(x)
    call.put(call.out, [np.tile(a, n) if is_labelled(a) else a for a, n in zip(axes, times, strict=True)])


@rule("repeat_interleave", index=True)
def repeat_interleave(call: Call) -> None:
    """Repeat each label in place."""
    x = call["self"]
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        for axis in call.axes(x) if x is not None else []:
            call.freeze(axis, "indices computed from data")
        call.put(call.out, [FIXED] * call.out.dim())
        return
    axes = call.axes(x)
    d = call["dim"] % x.dim()
    axes[d] = np.repeat(axes[d], call["repeats"]) if is_labelled(axes[d]) else FIXED
    call.put(call.out, axes)


@rule("slice narrow", sizes=("start", "end", "length"), index=True)
def slice_(call: Call) -> None:
    """Slice the labels."""
    x = call["self"]
    axes = call.axes(x)
    d = call["dim"] % x.dim()
    start = call["start"]
    if "length" in call:
        stop, step = int(start) + call["length"], 1
    else:
        stop, step = call["end"], call["step"]
    if is_labelled(axes[d]):
        axes[d] = axes[d][slice(start, stop, step)]
    call.put(call.out, axes)


@rule("select unbind")
def select(call: Call) -> None:
    """Take constant positions: that axis may not change."""
    axes = call.axes(call["self"])
    call.freeze(axes.pop(call["dim"]), "positions are taken one by one")
    for out in call.outputs:
        call.put(out, axes)


@rule(
    """
    split split_with_sizes chunk unsafe_split unsafe_chunk unsafe_split_with_sizes tensor_split
    """,
    sizes=("split_size", "split_sizes"),
    index=True,
)
def split(call: Call) -> None:
    """Cut the labels into consecutive parts; a chunk cuts into equal ones, which must lose equally."""
    x = call["self"]
    d = call["dim"] % x.dim()
    if "chunk" in call.name and is_labelled(labels := call.axes(x)[d]):
        size = call.outputs[0].shape[d]
        for begin in range(size, len(labels), size):
            if begin + size > len(labels):
                call.freeze(labels, "chunks of unequal size")
            else:
                call.bind(labels[:size], labels[begin : begin + size])
    begin = 0
    for out in call.outputs:
        axes = call.axes(x)
        end = begin + out.shape[d]
        if is_labelled(axes[d]):
            axes[d] = axes[d][begin:end]
        call.put(out, axes)
        begin = end


@rule("cat concat concatenate", index=True)
def cat(call: Call) -> None:
    """Concatenate the labels; parts without labels are frozen."""
    parts = [t for t in call["tensors"] if not (t.dim() == 1 and t.shape[0] == 0)]
    out = call.out
    d = call["dim"] % out.dim()
    result = [_bound(call, [call.axes(t)[k] for t in parts]) if k != d else FIXED for k in range(out.dim())]
    pieces = [call.axes(t)[d] for t in parts]
    if any(is_labelled(p) for p in pieces):
        result[d] = np.concatenate([_frozen(call, p, t.shape[d]) for p, t in zip(pieces, parts, strict=True)])
    call.put(out, result)


def _bound(call: Call, axes: Sequence[Axis]) -> Axis:
    result: Axis = ANY
    for axis in axes:
        result = call.bind(result, axis)
    return result


def _frozen(call: Call, axis: Axis, size: int) -> Axis:
    """Return the axis, or fresh frozen labels where it has none."""
    if is_labelled(axis):
        return axis
    labels = call.space.fresh(size)
    call.freeze(labels, "concatenated with channels that may not change")
    return labels


@rule("stack")
def stack(call: Call) -> None:
    """Bind the parts and add a fixed axis."""
    parts = call["tensors"]
    axes = [_bound(call, [call.axes(t)[k] for t in parts]) for k in range(parts[0].dim())]
    axes.insert(call["dim"] % call.out.dim(), FIXED)
    call.put(call.out, axes)


@rule("constant_pad_nd", sizes=("pad",), index=True)
def constant_pad(call: Call) -> None:
    """Pad: along a labelled axis a concatenation with frozen labels."""
    x, pad = call["self"], call["pad"]
    axes = call.axes(x)
    for k in range(len(pad) // 2):
        d = x.dim() - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        if before == after == 0:
            continue
        if not is_labelled(axes[d]):
            axes[d] = FIXED
            continue
        kept = axes[d][max(-before, 0) : len(axes[d]) - max(-after, 0)]
        axes[d] = np.concatenate([_padding(call, before), kept, _padding(call, after)])
    call.put(call.out, axes)


def _padding(call: Call, count: int) -> Axis:
    return _frozen(call, FIXED, max(count, 0))


@rule("roll", index=True)
def roll(call: Call) -> None:
    """Roll the labels."""
    x, shifts, dims = call["self"], call["shifts"], call["dims"]
    axes = call.axes(x)
    if not len(dims):
        for axis in axes:
            call.freeze(axis, "rolled over all axes")
        dims, shifts = [], []
    for shift, d in zip(shifts, normalize_dims(list(dims) or None, x.dim()) if len(dims) else [], strict=True):
        if is_labelled(axes[d]):
            # the number of those that come round is a constant: they stay
            call.freeze(axes[d][-shift:] if shift > 0 else axes[d][:-shift], "rolled by a constant number")
            axes[d] = np.roll(axes[d], shift)
    call.put(call.out, axes)


@rule("flip", index=True)
def flip(call: Call) -> None:
    """Reverse the labels."""
    x = call["self"]
    axes = call.axes(x)
    for d in normalize_dims(call["dims"], x.dim()):
        if is_labelled(axes[d]):
            axes[d] = axes[d][::-1]
    call.put(call.out, axes)


@rule("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")
def shuffle(call: Call) -> None:
    """Move channels into space and back, or between groups: views and a permutation."""
    x, out = call["self"], call.out
    axes = call.axes(x)
    d = x.dim() - 3 if "pixel" in call.name else 1
    channels, labels = x.shape[d], axes[d]
    for axis in axes[d + 1 :] if "pixel" in call.name else ():
        call.freeze(axis, "a spatial axis")
    if "channel_shuffle" in call.name:
        groups = call["groups"]
        outer, inner = reshape_axes(call, [channels], [labels], [groups, channels // groups])
        call.freeze(outer, "the groups of a shuffle")
        merged = reshape_axes(call, [channels // groups, groups], [inner, outer], [channels])
        axes[d] = merged[0]
    elif "unshuffle" in call.name:
        factor = math.prod([call["downscale_factor"]] * 2)
        axes[d] = reshape_axes(call, [channels, factor], [labels, FIXED], [channels * factor])[0]
        axes[-2:] = [FIXED, FIXED]
    else:
        factor = call["upscale_factor"] ** 2
        kept, offsets = reshape_axes(call, [channels], [labels], [channels // factor, factor])
        call.freeze(offsets, "the channels of one upscaled pixel")
        axes[d] = kept
        axes[-2:] = [FIXED, FIXED]
    call.put(out, axes)
