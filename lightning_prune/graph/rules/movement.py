"""Ops that move data: they do to the labels what they do to the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

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
    x, dtype = call["self"], call["dtype"]
    if dtype is not None:
        call.put(call.out, _reinterpreted(call, x))
        return
    # `squeeze_` has already changed `self`: its axes are then the longer list that the trace kept
    call.put(call.out, reshape_axes(call, call.shape_before(x), call.axes_before(x), call.out.shape))


def _reinterpreted(call: Call, x: Tensor) -> list[Axis]:
    """Return the axes of the same bytes read as another type: the last axis is longer where that one is smaller."""
    axes = call.axes(x)
    if call.out.shape != x.shape:
        call.freeze(axes[-1], "read as another type")
        axes[-1] = FIXED
    return axes


@rule("permute")
def permute(call: Call) -> None:
    """Reorder the axes."""
    axes = call.axes(call["self"])
    call.put(call.out, [axes[d] for d in normalize_dims(call["dims"], len(axes))])


@rule("transpose t transpose_ t_")
def transpose(call: Call) -> None:
    """Swap two axes."""
    axes = call.axes_before(call["self"])
    if len(axes) > 1:
        i, j = (call["dim0"], call["dim1"]) if "dim0" in call else (0, 1)
        axes[i], axes[j] = axes[j], axes[i]
    call.put(call.out, axes)


@rule("unfold")
def windows(call: Call) -> None:
    """Windows along one axis, of a fixed size: `[..., windows, ..., size]`."""
    axes = call.axes(call["self"])
    d = call["dimension"] % max(len(axes), 1)
    for k in range(len(axes))[d : d + 1]:
        call.freeze(axes[k], "windows over channels")
        axes[k] = FIXED
    call.put(call.out, [*axes, FIXED])


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


@rule("repeat", sizes=("repeats",), index=True)
def repeat(call: Call) -> None:
    """Tile the labels; how often shows in the size of the result."""
    x, times = call["self"], call["repeats"]
    axes = [ANY] * (len(times) - x.dim()) + call.axes(x)
    call.put(call.out, [np.tile(a, n) if is_labelled(a) else a for a, n in zip(axes, times, strict=True)])


@rule("repeat_interleave", sizes=("repeats", "output_size"), index=True)
def repeat_interleave(call: Call) -> None:
    """Repeat each label in place; how often is a number, or one for each position."""
    x, times, dim = call["self"], call["repeats"], call["dim"]
    if x is None:  # the positions themselves
        call.freeze(call.axes(times)[0], "repeated as data says")
        call.put(call.out, [FIXED])
        return
    axes = call.axes(x) if dim is not None else reshape_axes(call, x.shape, call.axes(x), [x.numel()])
    d = dim % x.dim() if dim is not None else 0
    if isinstance(times, Tensor):
        for axis in (axes[d], *call.axes(times)):
            call.freeze(axis, "repeated as data says")
        axes[d] = FIXED
    elif is_labelled(axes[d]):
        axes[d] = np.repeat(axes[d], times)
    call.put(call.out, axes)


def _part(args: Mapping[str, Any]) -> slice:
    return slice(args["start"], args["end"], args["step"])


def _fixed_part(args: Mapping[str, Any], axes: Sequence[Axis]) -> Any:
    """Return which part of a fixed axis a slice takes."""
    d = args["dim"] % len(axes)
    fixed = not is_labelled(axes[d]) and axes[d] == FIXED
    return _part(args).indices(args["self"].shape[d]) if fixed else None


@rule("slice", sizes=("start", "end"), index=True, stays=_fixed_part)
def slice_(call: Call) -> None:
    """Slice the labels."""
    axes = call.axes(call["self"])
    d = call["dim"] % len(axes)
    if is_labelled(axes[d]):
        _keep_stride(call, axes[d], call["step"])
        axes[d] = axes[d][_part(call.args)]
    call.put(call.out, axes)


def _keep_stride(call: Call, axis: Axis, step: int) -> None:
    """Channels that a stride takes by turns live and die together."""
    if step > 1 and len(axis) % step == 0 and len(axis) > step:
        _, turns = call.space.split(axis, (len(axis) // step, step))
        call.freeze(turns, "taken by turns")
    elif step > 1:
        call.freeze(axis, "taken by turns")


@rule("select unbind")
def select(call: Call) -> None:
    """Take constant positions: that axis may not change, unless nobody reads what was taken."""
    axes = call.axes(call["self"])
    taken = axes.pop(call["dim"])
    for out in call.outputs:
        call.freeze_if_read(out, taken, "positions are taken one by one")
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
    """Concatenate the labels; parts without labels are frozen, but the constant one: what made it may make less."""
    parts = [t for t in call["tensors"] if not (t.dim() == 1 and t.shape[0] == 0)]
    out = call.out
    d = call["dim"] % out.dim()
    result = [_bound(call, [call.axes(t)[k] for t in parts]) if k != d else FIXED for k in range(out.dim())]
    pieces = [call.axes(t)[d] for t in parts]
    constant = [k for k, t in enumerate(parts) if not is_labelled(pieces[k]) and pieces[k] == ANY and t.shape[d] > 1]
    if len(constant) == 1:  # how much is left of it is what is left of the result; of two of them nothing would tell
        pieces[constant[0]] = call.space.fresh(parts[constant[0]].shape[d])
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


@rule("stack _stack")
def stack(call: Call) -> None:
    """Bind the parts and add a fixed axis."""
    parts = call["tensors"]
    axes = [_bound(call, [call.axes(t)[k] for t in parts]) for k in range(parts[0].dim())]
    axes.insert(call["dim"] % call.out.dim(), FIXED)
    call.put(call.out, axes)


def _fixed_padding(args: Mapping[str, Any], axes: Sequence[Axis]) -> Any:
    """Return by how much each axis without labels is padded."""
    pairs = zip(args["pad"][::2], args["pad"][1::2], strict=True)
    return [None if is_labelled(axes[-1 - k]) else pair for k, pair in enumerate(pairs)]


@rule("constant_pad_nd", sizes=("pad",), index=True, stays=_fixed_padding)
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


@rule("block_diag", index=True)
def block_diagonal(call: Call) -> None:
    """Rows after rows and columns after columns, zero elsewhere."""
    matrices = [([ANY] * (2 - t.dim()) + call.axes(t), (1, 1, *t.shape)[-2:]) for t in call["tensors"]]
    result = []
    for d in range(2):
        pieces = [(axes[d], shape[d]) for axes, shape in matrices]
        labelled = any(is_labelled(axis) for axis, _ in pieces)
        result.append(np.concatenate([_frozen(call, *piece) for piece in pieces]) if labelled else FIXED)
    call.put(call.out, result)


@rule("rot90", index=True)
def rotate(call: Call) -> None:
    """Turn a plane by quarters: transpose and reverse."""
    axes, turns = call.axes(call["self"]), call["k"] % 4
    i, j = normalize_dims(call["dims"], len(axes))
    if turns % 2:
        axes[i], axes[j] = axes[j], axes[i]
    for d in {0: (), 1: (i,), 2: (i, j), 3: (j,)}[turns]:
        axes[d] = axes[d][::-1] if is_labelled(axes[d]) else axes[d]
    call.put(call.out, axes)


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
