"""Look-ups by index, positions and factories."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import ANY, FIXED, Axis
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
    """Sums of rows of a table."""
    rows, width = call.axes(call["weight"])
    call.freeze(rows, "the rows of an embedding")
    call.space.mark("out", width)
    out = call.outputs[0]
    call.put(out, [FIXED] * (out.dim() - 1) + [width])


@rule("index _unsafe_index")
def index(call: Call) -> None:
    """Advanced indexing: the indexed axes are fixed, the others survive."""
    x, indices = call["self"], call["indices"]
    axes = call.axes(x)
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        call.freeze(axes[d], "taken by index")
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in used):
        for axis in axes:
            call.freeze(axis, "taken by a mask")
        call.put(call.out, [FIXED] * call.out.dim())
        return
    lookups = [indices[d] for d in used]
    shape = torch.broadcast_shapes(*(i.shape for i in lookups)) if lookups else ()
    front = broadcast_axes(call, lookups, shape)
    adjacent = used == list(range(used[0], used[-1] + 1)) if used else True
    first = used[0] if used and adjacent else 0
    rest = [axis for d, axis in enumerate(axes) if d not in used]
    call.put(call.out, [*rest[:first], *front, *rest[first:]])


@rule("index_select")
def index_select(call: Call) -> None:
    """Positions of one axis."""
    axes = call.axes(call["self"])
    d = call["dim"]
    call.freeze(axes[d], "taken by index")
    axes[d] = FIXED
    call.put(call.out, axes)


@rule("gather take_along_dim")
def gather(call: Call) -> None:
    """`out[i][j] = x[index[i][j]][j]`: the indexed axis is fixed, the others bind."""
    x, positions = call["self"], call["index"] if "index" in call else call["indices"]
    d = call["dim"] % max(x.dim(), 1)
    axes = call.axes(x)
    result = []
    for k, axis in enumerate(call.axes(positions)):
        if k == d:
            call.freeze(axes[k], "taken by index")
        result.append(axis if k == d else _narrowed(call, axes[k], axis, x.shape[k] == positions.shape[k]))
    call.put(call.out, result)


def _narrowed(call: Call, axis: Axis, other: Axis, same_size: bool) -> Axis:
    if same_size:
        return call.bind(axis, other)
    call.freeze(axis, "only a part is gathered")
    return other


@rule(
    """
    scatter scatter_ scatter_add scatter_add_ scatter_reduce index_add index_add_ index_copy index_copy_
    index_fill index_fill_ index_put index_put_ _index_put_impl_ masked_scatter masked_scatter_ masked_select take
    nonzero _unique2 bincount one_hot multinomial searchsorted bucketize histc im2col col2im unfold
    as_strided as_strided_ diagonal diag_embed diag trace cdist _cdist_forward cross linalg_cross kron fft_fft
    fft_ifft _fft_r2c _fft_c2r _fft_c2c view_as_complex view_as_real complex polar resize_ set_ histogram
    tensordot quantile nanquantile
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
    for axis in call.axes(tensor):
        call.freeze(axis, why)


@rule(
    """
    zeros ones empty full rand randn new_zeros new_ones new_empty new_full empty_strided empty_permuted
    new_empty_strided scalar_tensor
    """,
    sizes=("size",),
)
def constant(call: Call) -> None:
    """Equal or identically distributed everywhere: it follows what it meets."""
    call.put(call.out, [ANY] * call.out.dim())


@rule(
    """
    arange linspace logspace eye randint randperm tril_indices triu_indices hann_window hamming_window
    blackman_window bartlett_window kaiser_window cartesian_prod meshgrid
    """
)
def positional(call: Call) -> None:
    """What differs by position has a fixed size."""
    for out in call.outputs:
        call.put(out, [FIXED] * out.dim())


@rule(
    """
    _local_scalar_dense item is_nonzero _assert_async _assert_tensor_metadata sym_size equal allclose is_same_size
    _has_same_storage_numel _version
    """
)
def no_result(call: Call) -> None:
    """Ops that return no tensor."""


def unknown(call: Call) -> None:
    """An op without a rule: freeze what it touches, and say so."""
    for tensor in call.inputs:
        freeze_all(call, tensor, f"no rule for {call.name}")
    for out in call.outputs:
        call.put(out, [FIXED] * out.dim())
