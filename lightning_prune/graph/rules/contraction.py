"""Ops that sum products: the contracted axes bind, the outer axes survive, and multiply-adds are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.graph.call import Call, is_weight
from lightning_prune.graph.equation import spell_equation
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.movement import reshape_axes
from lightning_prune.graph.rules.normalization import renormalize
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.zeros import is_zeroed


def contract(call: Call, a: Tensor, i: int, b: Tensor, j: int) -> Axis:
    """Bind the two axes that are summed over, and note which of them is the input side of a weight.

    Where neither factor is zero for removed channels, these would count in the sum: the unit renormalises.
    """
    x, y = call.axes(a)[i], call.axes(b)[j]
    for tensor, k, axis in ((a, i % a.dim(), x), (b, j % b.dim(), y)):
        if is_weight(tensor):
            call.space.mark("in", axis)
            for other in (o for d, o in enumerate(call.axes(tensor)) if d != k):
                call.space.mark("out", other)
    if all(isinstance(axis, str) and axis == ANY for axis in (x, y)):
        call.pin(a, i)
    both = call.bind(x, y)
    if not (is_zeroed(a) or is_zeroed(b)):
        renormalize(call, both)
    return both


def add_bias(call: Call, axis: Axis, bias: Tensor | None) -> Axis:
    """Bind a bias of one axis to the output channels."""
    return axis if bias is None else call.bind(axis, call.axes(bias)[-1])


@rule("linear")
def linear(call: Call) -> None:
    """`[..., in] x [out, in] -> [..., out]`."""
    x, w = call["input"], call["weight"]
    rows, inner = call.sized(x)[:-1], (x.shape[-1], contract(call, x, -1, w, -1))
    if w.dim() == 1:
        call.put(call.out, call.axes(x)[:-1])
        call.count(*rows, inner)
        return
    out_axis = add_bias(call, call.axes(w)[0], call["bias"])
    call.put(call.out, [*call.axes(x)[:-1], out_axis])
    call.count(*rows, inner, (w.shape[0], out_axis))


@rule("mm bmm matmul mv dot vdot _int_mm")
def matmul(call: Call) -> None:
    """`[..., n, k] x [..., k, m] -> [..., n, m]`, vectors and broadcast batch axes included."""
    a = call["self"]
    b = next(call[n] for n in ("other", "mat2", "vec", "tensor") if n in call)
    call.put(call.out, _matmul(call, a, b))


def _matmul(call: Call, a: Tensor, b: Tensor) -> list[Axis]:
    row, column = (-1 if b.dim() == 1 else -2), -1
    contracted = contract(call, a, column, b, row)
    left = call.sized(a, *range(a.dim() - 1)) if a.dim() > 1 else []
    right = call.sized(b, *range(b.dim() - 1)) if b.dim() > 1 else []
    if b.dim() > 1:
        right = [*right[:-1], call.sized(b, -1)[0]]
    batch_left, rows = left[:-1], left[-1:]
    batch_right, columns = right[:-1], right[-1:]
    batch = broadcast(call, [batch_left, batch_right])
    if not (is_weight(a) or is_weight(b)):
        mark_attention(call, [axis for _, axis in batch], [contracted, *(axis for _, axis in columns)])
    call.count(*batch, *rows, *columns, (a.shape[-1], contracted))
    return [axis for _, axis in (*batch, *rows, *columns)]


def mark_attention(call: Call, batch: Sequence[Axis], inner: Sequence[Axis]) -> None:
    """Note the axes that two activations multiply over: batch axes are heads, the others head_dim."""
    for axis in batch:
        call.space.mark("heads", axis)
    for axis in inner:
        call.space.mark("head_dim", axis)


def broadcast(call: Call, runs: Sequence[Sequence[tuple[int, Axis]]]) -> list[tuple[int, Axis]]:
    """Bind runs of batch axes aligned at their ends; size 1 broadcasts."""
    rank = max(len(run) for run in runs)
    result: list[tuple[int, Axis]] = []
    for k in range(rank, 0, -1):
        size, axis = 1, ANY
        for run in runs:
            if len(run) >= k and run[-k][0] != 1:
                size, axis = run[-k][0], call.bind(axis, run[-k][1])
        result.append((size, axis))
    return result


def _misalignment(args: Mapping[str, Any], _: Sequence[Axis]) -> tuple[tuple[str, int], ...]:
    """Return by how much each width of grouped matrices misses the next 16 bytes: the kernel takes no stride that does.

    Which of the widths are strides is not seen on fake tensors, so that none may change.
    """
    a, b, step = args["self"], args["mat2"], _aligned(args["self"])
    return tuple((f"of each {step}", size % step) for size in (a.shape[-1], b.shape[-2], b.shape[-1]))


def _aligned(tensor: Tensor) -> int:
    """Return how many elements are 16 bytes."""
    return max(1, 16 // tensor.element_size())


@rule("_grouped_mm", stays=_misalignment)
def grouped_matmul(call: Call) -> None:
    """`[rows, k] x [groups, k, m] -> [rows, m]`: rows up to each offset meet the matrix of their group."""
    a, b, bounds, bias = call["self"], call["mat2"], call["offs"], call["bias"]
    if bounds is None:
        call.put(call.out, _matmul(call, a, b))
        return
    if (a.dim(), b.dim()) == (2, 3):
        axes = [*call.axes(a)[:1], call.axes(b)[2]]
        cut = [(a, 0), (b, 0), (bounds, 0)]
    else:  # columns, or what is summed over, are cut by the offsets
        axes = [FIXED] * call.out.dim()
        cut = [(t, d) for t in (a, b, bounds) for d in range(t.dim())]
    for tensor, d in cut:
        call.hold(tensor, d, "taken apart by offsets")
    inner = contract(call, a, -1, b, -2)
    for axis in (inner, axes[-1]):
        if is_labelled(axis):
            call.space.steps.append((axis, _aligned(a)))
    if bias is not None:
        axes[-1] = call.bind(axes[-1], call.axes(bias)[-1])
        call.hold(bias, 0, "taken apart by offsets")
    call.count((a.shape[-2], call.axes(a)[-2]), (a.shape[-1], inner), (b.shape[-1], call.axes(b)[-1]))
    call.put(call.out, axes)


_FACTORS = (("mat", "vec"), ("mat1", "mat2"), ("batch1", "batch2"), ("sparse", "dense"))


@rule("addmm addmv baddbmm addbmm _addmm_activation _sparse_addmm")
def addmm(call: Call) -> None:
    """`bias + a @ b`."""
    bias = call["self"]
    a, b = next((call[m], call[n]) for m, n in _FACTORS if n in call)
    axes = _matmul(call, a, b)
    for axis in axes[: -call.out.dim()]:  # addbmm sums over the batch
        renormalize(call, axis)
        call.pin_unlabelled(a, 0)
    axes = axes[-call.out.dim() :]
    for k in range(1, bias.dim() + 1):
        if bias.shape[-k] != 1:
            axes[-k] = call.bind(axes[-k], call.axes(bias)[-k])
    call.put(call.out, axes)


@rule("addr")
def add_outer(call: Call) -> None:
    """`x + a b^T`: a sum of products of one each."""
    x = call["self"]
    rows, columns = call.axes(call["vec1"])[0], call.axes(call["vec2"])[0]
    axes = [rows, columns]
    for k in range(1, x.dim() + 1):
        if x.shape[-k] == call.out.shape[-k]:
            axes[-k] = call.bind(axes[-k], call.axes(x)[-k])
        else:
            call.freeze(call.axes(x)[-k], "one channel broadcast")
    call.put(call.out, axes)


@rule("_trilinear")
def trilinear(call: Call) -> None:
    """The sum over some axes of a product of three tensors, each of which lacks some of the axes."""
    tensors = (call["i1"], call["i2"], call["i3"])
    lacks = [{d % (t.dim() + len(given)) for d in given} for t, given in zip(tensors, _lacking(call), strict=True)]
    rank = tensors[0].dim() + len(lacks[0])
    sizes: list[tuple[int, Axis]] = [(1, ANY)] * rank
    summed = {d % rank for d in call["sumdim"]}
    for tensor, missing in zip(tensors, lacks, strict=True):
        own = [d for d in range(rank) if d not in missing]
        for d, size, axis in zip(own, tensor.shape, call.axes(tensor), strict=True):
            if is_weight(tensor):
                call.space.mark("in" if d in summed else "out", axis)
            sizes[d] = sizes[d] if size == 1 else (size, call.bind(sizes[d][1], axis))
            if d in summed:
                call.pin_unlabelled(tensor, own.index(d))
    factors = list(zip(tensors, lacks, strict=True))
    for d in summed:
        if not any(is_zeroed(t) and d not in missing for t, missing in factors):
            renormalize(call, sizes[d][1])
    call.count(*sizes)
    call.put(call.out, [axis for d, (_, axis) in enumerate(sizes) if d not in summed])


def _lacking(call: Call) -> list[Sequence[int]]:
    return [call["expand1"], call["expand2"], call["expand3"]]


@rule("einsum")
def einsum(call: Call) -> None:
    """Axes with the same letter bind; letters absent from the result are contracted."""
    tensors = call["tensors"]
    terms, letters_out = spell_equation(call["equation"], [t.dim() for t in tensors], call.out.dim())
    sizes: dict[str, tuple[int, Axis]] = {}
    for letters, tensor in zip(terms, tensors, strict=True):
        for letter, size, axis in zip(letters, tensor.shape, call.axes(tensor), strict=True):
            if is_weight(tensor):
                call.space.mark("out" if letter in letters_out else "in", axis)
            if letters.count(letter) > 1:
                call.freeze(axis, "diagonal")
            known = sizes.get(letter, (1, ANY))
            sizes[letter] = known if size == 1 else (size, call.bind(known[1], axis))
    if not any(is_weight(t) for t in tensors) and len(tensors) == 2:
        shared = [sizes[c][1] for c in letters_out if all(c in t for t in terms)]
        inner = [axis for c, (_, axis) in sizes.items() if c not in letters_out]
        mark_attention(call, shared, inner + [sizes[c][1] for c in letters_out[-1:]])
    for c, (size, axis) in sizes.items():
        if size > 1 and isinstance(axis, str) and axis == ANY and c in letters_out and len(tensors) > 1:
            sizes[c] = size, call.space.fresh(size)  # its length is a cost: what it meets later says which
    _sum_letters(call, terms, letters_out, sizes)
    _count_products(call, terms, letters_out, sizes)
    call.put(call.out, [sizes[c][1] for c in letters_out])


def _sum_letters(call: Call, terms: Sequence[str], kept: str, sizes: Mapping[str, tuple[int, Axis]]) -> None:
    """Note what the sum over the other letters depends on."""
    named = list(zip(terms, call["tensors"], strict=True))
    for letter, (_, axis) in sizes.items():
        places = [(tensor, letters.index(letter)) for letters, tensor in named if letter in letters]
        if letter in kept:
            continue
        if not any(is_zeroed(tensor) for tensor, _ in places):
            renormalize(call, axis)
        if isinstance(axis, str) and axis == ANY:
            for place in places:
                call.pin(*place)


def _count_products(call: Call, terms: Sequence[str], kept: str, sizes: Mapping[str, tuple[int, Axis]]) -> None:
    """Count what is summed over, two operands at a time; what one alone has is summed before, one entry is no sum."""
    waiting = [dict(zip(term, t.shape, strict=True)) for term, t in zip(terms, call["tensors"], strict=True)]
    path = iter(call["path"] or ())
    while len(waiting) > 1:
        first, second = sorted((next(path, 0), next(path, 1)))
        b, a = waiting.pop(second), waiting.pop(first)
        later = set(kept).union(*waiting)
        summed = {c for c in a.keys() & b.keys() if c not in later and 1 not in (a[c], b[c])}
        left = {c: max(a.get(c, 1), b.get(c, 1)) for c in a | b if c in later or c in summed}
        if summed:
            call.count(*((n, sizes[c][1] if n > 1 else ANY) for c, n in left.items()))
        waiting.append({c: n for c, n in left.items() if c in later})


@rule(
    """
    conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d
    """,
    sizes=("groups",),
)
def convolution(call: Call) -> None:
    """A convolution over G groups: input G x c, output G x k."""
    x, w = call["input"], call["weight"]
    transposed = bool(call["transposed"]) if "transposed" in call else "transpose" in call.name
    spatial = w.dim() - 2
    channel = x.dim() - spatial - 1
    axes, weight = call.axes(x), call.axes(w)
    space = [axis if _is_left(call, w, k) else FIXED for k, axis in enumerate(axes[channel + 1 :])]
    for axis in (*weight[2:], *(a for a, b in zip(axes[channel + 1 :], space, strict=True) if b is not a)):
        call.freeze(axis, "a spatial axis")
    _sum_channels(call, x, channel, w, 0 if transposed else 1)
    place = _transposed_groups if transposed else _groups
    out_axis = add_bias(call, place(call, axes[channel], x.shape[channel], w, call["groups"]), call["bias"])
    call.put(call.out, [*axes[:channel], out_axis, *space])
    positions = x if transposed else call.out
    grid = call.sized(positions, *range(channel + 1, positions.dim()))
    # a kernel that is a constant has no labels: it is as large as what it meets
    first = axes[channel] if transposed else out_axis
    second = weight[1] if call["groups"] > 1 or is_labelled(weight[1]) else out_axis if transposed else axes[channel]
    kernel = [(w.shape[0], first if not is_labelled(weight[0]) else weight[0]), (w.shape[1], second)]
    call.count(*call.sized(x, *range(channel)), *grid, *kernel, *call.sized(w, *range(2, w.dim())))


def _is_left(call: Call, w: Tensor, k: int) -> bool:
    """Return whether the convolution takes each place along an axis of space alone, and leaves none out."""
    padding = call["padding"]
    padded = not isinstance(padding, str) and at(padding, k)  # text pads a kernel of one entry by nothing
    return w.shape[2 + k] == 1 == at(call["stride"], k) and not padded and not at(call["output_padding"] or 0, k)


def at(value: int | Sequence[int], k: int) -> int:
    """Return what an op is told of its k-th axis of space: one number may stand for all."""
    return value if isinstance(value, int) else value[k] if len(value) > 1 else value[0]


def _sum_channels(call: Call, x: Tensor, channel: int, w: Tensor, inner: int) -> None:
    """Note what the sum over input channels depends on, beside their weights."""
    if not (is_labelled(call.axes(x)[channel]) or is_labelled(call.axes(w)[inner])):
        call.pin(x, channel)
    if not (is_zeroed(x) or is_zeroed(w)) and w.shape[inner] > 1:
        renormalize(call, call.axes(w)[inner])
        renormalize(call, call.axes(x)[channel])


def _groups(call: Call, channels: Axis, size: int, w: Tensor, groups: int) -> Axis:
    """Bind the input of a convolution to its weight `[G k, c, ...]`; return the output axis."""
    out_axis, inner = call.axes(w)[:2]
    call.space.mark("in", inner)
    if groups == 1:
        call.space.mark("out", out_axis)
        call.bind(channels, inner)
        return out_axis
    outer, each = reshape_axes(call, [size], [channels], [groups, size // groups])
    owner, filters = reshape_axes(call, [w.shape[0]], [out_axis], [groups, w.shape[0] // groups])
    if w.shape[1] > 1:
        call.bind(each, inner)
    both = call.bind(outer, owner)
    if size > groups or w.shape[0] > groups:
        call.space.mark("groups", both)
        call.space.mark("out", out_axis)
        call.space.mark("both", out_axis)
    return out_axis if is_labelled(out_axis) else _depthwise(both, filters)


def _depthwise(owner: Axis, filters: Axis) -> Axis:
    """Return the output axis of a grouped convolution whose weight carries no labels."""
    return owner if isinstance(filters, str) and filters == ANY else filters


def _transposed_groups(call: Call, channels: Axis, size: int, w: Tensor, groups: int) -> Axis:
    """Bind the input of a transposed convolution to its weight `[G c, k, ...]`; return the output axis."""
    inner, filters = call.axes(w)[:2]
    call.bind(channels, inner)
    if groups == 1 or w.shape[1] > 1:
        call.space.mark("in", inner)
        call.space.mark("out", filters)
    if groups == 1:
        return filters
    owner, _ = reshape_axes(call, [size], [inner], [groups, size // groups])
    if size > groups or w.shape[1] > 1:
        call.space.mark("groups", owner)
        call.space.mark("in", inner)
        call.space.mark("both", inner)
    return reshape_axes(call, [groups, w.shape[1]], [owner, filters], [groups * w.shape[1]])[0]
