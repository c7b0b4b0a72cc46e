"""Look-ups by index, positions and factories."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import ANY, FIXED, Axis, IntArray, is_labelled
from lightning_prune.graph.rules.pointwise import broadcast_axes, pointwise
from lightning_prune.graph.rules.table import rule


@rule("embedding")
def embedding(call: Call) -> None:
    """Rows of a table: the vocabulary is fixed, the width survives."""
    rows, width = call.axes(call["weight"])
    call.freeze(rows, "the rows of an embedding")
    call.space.mark("out", width)
    call.put(call.out, [*call.axes(call["indices"]), width])


@rule("embedding_bag _embedding_bag _embedding_bag_forward_only")
def embedding_bag(call: Call) -> None:
    """Sums, means or largest values of rows of a table; the fourth result says which row was the largest."""
    rows, width = call.axes(call["weight"])
    call.freeze(rows, "the rows of an embedding")
    call.space.mark("out", width)
    out = call.outputs[0]
    for tensor in call.outputs:
        wide = tensor.dim() == 2 and tensor.shape == out.shape
        call.put(tensor, [FIXED, width] if wide else [FIXED] * tensor.dim())


def indexed_axes(
    call: Call, x: Tensor, indices: Sequence[Tensor | None], why: str
) -> tuple[list[int], list[int | Axis]]:
    """Say what `x[indices]` is made of; the indexed axes are frozen for the reason given.

    Args:
        call: The op.
        x: What is indexed.
        indices: One per axis, None for all of it; a mask of n axes stands for n of them.
        why: Why the indexed axes may not change.

    Returns:
        The indexed axes of `x`, and for each axis of the result either the axis of `x` that it is, or labels.
    """
    taken: list[int] = []
    lookups = []
    d = 0
    for index in indices:
        span = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            taken += range(d, d + span)
            lookups.append(index)
        d += span
    axes = call.axes(x)
    for k in taken:
        call.freeze(axes[k], why)
    rest: list[int | Axis] = [k for k in range(x.dim()) if k not in taken]
    adjacent = all(b == a + 1 for a, b in pairwise(taken))
    first = taken[0] if taken and adjacent else 0
    return taken, [*rest[:first], *_looked_up(call, lookups), *rest[first:]]


def _looked_up(call: Call, lookups: Sequence[Tensor]) -> list[Axis]:
    """Return the axes that the indices broadcast to; where a mask holds depends on all that it is made from."""
    for mask in lookups:
        if mask.dtype in (torch.bool, torch.uint8):
            freeze_all(call, mask, "taken by a mask")
    plain = [i for i in lookups if i.dtype not in (torch.bool, torch.uint8)]
    if len(plain) == len(lookups):
        shape = torch.broadcast_shapes(*(i.shape for i in plain)) if plain else ()
        return broadcast_axes(call, plain, shape)
    for index in plain:
        freeze_all(call, index, "taken by a mask")
    return [FIXED] * max([1, *(i.dim() for i in plain)])


@rule("index _unsafe_index", index=True)
def index(call: Call) -> None:
    """Advanced indexing: the indexed axes are fixed, the others survive; a constant index takes a part of channels."""
    axes = call.axes(call["self"])
    lookups = [(d, i) for d, i in enumerate(call["indices"]) if i is not None]
    if len(lookups) == 1 and is_labelled(axes[lookups[0][0]]) and (written := _constant(lookups[0][1])) is not None:
        d = lookups[0][0]
        axes[d] = _taken(call, axes[d], written)
        call.put(call.out, axes)
        return
    _, places = indexed_axes(call, call["self"], call["indices"], "taken by index")
    call.put(call.out, [axes[p] if isinstance(p, int) else p for p in places])


def _constant(index: Tensor) -> IntArray | None:
    """Return the position of an index that is written out in the code, `x[:, [-1]]`, None for any other."""
    known = getattr(index, "constant", None)  # fake tensors of one element have it
    if not isinstance(known, Tensor) or known.dim() != 1 or known.dtype != torch.int64:
        return None
    with _disable_current_modes():
        places: IntArray = known.numpy()
    return places


def _taken(call: Call, labels: IntArray, places: IntArray) -> IntArray:
    """Return the labels at constant places, counted from either end; what lies between them and that end stays."""
    size = len(labels)
    if ((places < -size) | (places >= size)).any():
        return np.full(len(places), -1)  # no channel: the certificate refuses it
    front, back = places[places >= 0], places[places < 0]
    call.freeze(labels[: front.max() + 1] if len(front) else labels[:0], "taken by a constant index")
    call.freeze(labels[back.min() :] if len(back) else labels[:0], "taken by a constant index")
    taken: IntArray = labels[places]
    return taken


@rule("index_select")
def index_select(call: Call) -> None:
    """Positions of one axis."""
    x, positions = call["self"], call.axes(call["index"])
    axes = call.axes(x)
    if axes:
        d = call["dim"] % len(axes)
        call.freeze(axes[d], "taken by index")
        axes[d] = positions[0] if positions else FIXED
    call.put(call.out, axes)


@rule("gather")
def gather(call: Call) -> None:
    """`out[i][j] = x[index[i][j]][j]`: the indexed axis is fixed, the others bind."""
    x, positions = call["self"], call["index"]
    d = call["dim"] % max(x.dim(), 1)
    axes = call.axes(x)
    result = []
    for k, axis in enumerate(call.axes(positions)):
        if k == d and axes:
            call.freeze(axes[k], "taken by index")
        result.append(axis if k == d else _narrowed(call, axes[k], axis, x.shape[k] == positions.shape[k]))
    call.put(call.out, result)


def _narrowed(call: Call, axis: Axis, other: Axis, same_size: bool) -> Axis:
    if same_size:
        return call.bind(axis, other)
    call.freeze(axis, "only a part is gathered")
    call.freeze(other, "only a part is gathered")
    return FIXED


@rule("one_hot")
def one_hot(call: Call) -> None:
    """The classes are a fixed axis of their own."""
    call.put(call.out, [*call.axes(call["self"]), FIXED])


@rule("bucketize")
def bucketize(call: Call) -> None:
    """Each value is compared with all boundaries."""
    _look_up_among(call, call["boundaries"])


@rule("isin")
def is_in(call: Call) -> None:
    """Each value is compared with all elements of a set."""
    _look_up_among(call, call["test_elements"] if "test_elements" in call else call["test_element"])


def _look_up_among(call: Call, others: Tensor | float) -> None:
    if isinstance(others, Tensor):
        freeze_all(call, others, "compared with every value")
    values = call["self"] if "self" in call else call["elements"] if "elements" in call else call["element"]
    call.put(call.out, call.axes(values) if isinstance(values, Tensor) else [])


@rule("searchsorted")
def searchsorted(call: Call) -> None:
    """Each value is compared with a whole row: one for all, or one of its own."""
    rows, values = call["sorted_sequence"], call["self"]
    own = call.axes(rows)[:-1]
    call.hold(rows, rows.dim() - 1, "compared with every value")
    axes = call.axes(values) if isinstance(values, Tensor) else []
    for d, axis in enumerate(own):
        axes[d] = call.bind(axes[d], axis)
    if call["sorter"] is not None:
        freeze_all(call, call["sorter"], "compared with every value")
    call.put(call.out, axes)


@rule("multinomial")
def multinomial(call: Call) -> None:
    """Draw among the last axis."""
    x = call["self"]
    call.hold(x, x.dim() - 1, "drawn from")
    call.put(call.out, [*call.axes(x)[:-1], FIXED])


@rule(
    """
    masked_select take put nonzero nonzero_static _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive
    bincount histc histogram as_strided_scatter resize resize_as set segment_reduce embedding_renorm
    _to_sparse _to_sparse_csr _to_dense _ctc_loss multi_margin_loss multilabel_margin_loss_forward
    _native_multi_head_attention _transformer_encoder_layer_fwd _masked_softmax
    """
)
def opaque(call: Call) -> None:
    """Ops whose result mixes positions: no axis they touch may change."""
    for tensor in call.inputs:
        freeze_all(call, tensor, "positions are mixed")
    for out in call.outputs:
        call.put(out, [FIXED] * out.dim())


@rule("where")
def where(call: Call) -> None:
    """Choose between two tensors; with a condition alone, the positions where it holds."""
    (pointwise if "self" in call else opaque)(call)


def freeze_all(call: Call, tensor: Tensor, why: str) -> None:
    """Forbid removal along every axis of a tensor."""
    for d in range(tensor.dim()):
        call.hold(tensor, d, why)


@rule(
    """
    zeros ones empty full rand randn randint new_zeros new_ones new_empty new_full empty_strided empty_permuted
    new_empty_strided scalar_tensor
    """,
    sizes=("size", "stride"),
)
def constant(call: Call) -> None:
    """Equal or identically distributed everywhere: it follows what it meets."""
    call.put(call.out, [ANY] * call.out.dim())


@rule("normal poisson binomial", sizes=("size",))
def random(call: Call) -> None:
    """Drawn for each element alone, from given tensors or from numbers."""
    (pointwise if call.inputs else constant)(call)


@rule(
    """
    arange range linspace logspace eye randperm tril_indices triu_indices hann_window hamming_window
    blackman_window bartlett_window kaiser_window fft_fftfreq fft_rfftfreq
    """
)
def positional(call: Call) -> None:
    """What differs by position has a fixed size."""
    for out in call.outputs:
        call.put(out, [FIXED] * out.dim())


@rule(
    """
    _local_scalar_dense item is_nonzero _assert_async _assert_tensor_metadata sym_size equal allclose is_same_size
    _has_same_storage_numel _version _linalg_check_errors is_set_to
    """
)
def no_result(call: Call) -> None:
    """Ops that return no tensor."""


def unknown(call: Call, why: str = "no rule for") -> None:
    """An op without a rule, or whose rule failed: freeze what it touches, and say so."""
    for tensor in call.inputs:
        freeze_all(call, tensor, f"{why} {call.name}")
        call.put(tensor, [ANY if n == 1 else FIXED for n in tensor.shape])  # it may have written to any of them
    for out in call.outputs:
        call.put(out, [FIXED] * out.dim())
