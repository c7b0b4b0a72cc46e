"""Matrices as a whole: factorisations, inverses, diagonals, distances."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.call import Call, normalize_dims
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.normalization import renormalize
from lightning_prune.graph.rules.pointwise import broadcast_axes
from lightning_prune.graph.rules.table import rule


@rule(
    """
    linalg_inv_ex _linalg_det _linalg_slogdet _linalg_solve_ex _linalg_svd _linalg_eigh linalg_eig _linalg_eigvals
    linalg_qr linalg_cholesky_ex cholesky cholesky_inverse cholesky_solve linalg_lu linalg_lu_factor_ex linalg_lu_solve
    linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_pinv linalg_matrix_exp linalg_solve_triangular
    triangular_solve linalg_householder_product lu_unpack geqrf ormqr
    """
)
def matrix(call: Call) -> None:
    """Each entry of the result depends on all of the matrix; batch axes survive."""
    shape = call.inputs[0].shape[:-2]
    lead = len(shape)
    batch: list[Axis] = [ANY] * lead
    fits = all(t.shape[:lead] == shape for t in call.inputs)
    for tensor in call.inputs:
        for d in range(lead if fits else 0, tensor.dim()):
            call.hold(tensor, d, "a matrix as a whole")
        own = zip(batch, call.axes(tensor), strict=False)
        batch = [call.bind(a, b) for a, b in own] if fits else [FIXED] * lead
    for out in call.outputs:
        kept = batch if out.shape[:lead] == shape else []
        call.put(out, [*kept, *[FIXED] * (out.dim() - len(kept))])


@rule("linalg_cross")
def cross(call: Call) -> None:
    """The product of vectors of three entries along one axis."""
    axes = broadcast_axes(call, call.inputs[:2], call.out.shape)
    d = call["dim"] % len(axes)
    call.freeze(axes[d], "a cross product")
    axes[d] = FIXED
    call.put(call.out, axes)


def _same_channels(call: Call, axes: list[Axis], i: int, j: int, why: str) -> Axis:
    """Bind the rows of a square matrix to its columns; freeze both where only one of them has labels."""
    if is_labelled(axes[i]) and is_labelled(axes[j]) and len(axes[i]) == len(axes[j]) and not call["offset"]:
        return call.bind(axes[i], axes[j])
    for d in (i, j):
        call.freeze(axes[d], why)
    return FIXED


@rule("diagonal")
def diagonal(call: Call) -> None:
    """The entries `[i, i]` of two axes: both lose the same."""
    axes = call.axes(call["self"])
    i, j = normalize_dims([call["dim1"], call["dim2"]], len(axes))
    both = _same_channels(call, axes, i, j, "a diagonal")
    call.put(call.out, [*[a for d, a in enumerate(axes) if d not in (i, j)], both])


@rule("trace")
def trace(call: Call) -> None:
    """The sum of the entries `[i, i]`."""
    axes = call.axes(call["self"])
    renormalize(call, _same_channels(call, axes, 0, 1, "a diagonal"))
    for d in range(2):
        call.pin_unlabelled(call["self"], d)
    call.put(call.out, [])


@rule("diag_embed")
def diagonal_matrix(call: Call) -> None:
    """Entries become a diagonal, with zeros elsewhere: rows and columns are the same channels."""
    *axes, entries = call.axes(call["self"])
    if call["offset"]:
        call.freeze(entries, "a diagonal beside the main one")
    both = FIXED if call["offset"] or not is_labelled(entries) else entries
    for d in sorted(normalize_dims([call["dim1"], call["dim2"]], call.out.dim())):
        axes.insert(d, both)
    call.put(call.out, axes)


@rule("cdist _cdist_forward")
def distances(call: Call) -> None:
    """`[..., n, features] x [..., m, features] -> [..., n, m]`."""
    a, b = call["x1"], call["x2"]
    _features(call, a, b)
    batch = [t.shape[:-2] for t in (a, b)]
    left, right = call.axes(a), call.axes(b)
    lead = _broadcast_batch(call, left[:-2], right[:-2], *batch)
    call.put(call.out, [*lead, left[-2], right[-2]])


def _features(call: Call, a: Tensor, b: Tensor) -> None:
    renormalize(call, call.bind(call.axes(a)[-1], call.axes(b)[-1]))
    call.pin_unlabelled(a, a.dim() - 1)
    call.pin_unlabelled(b, b.dim() - 1)


def _broadcast_batch(
    call: Call, left: list[Axis], right: list[Axis], shape: tuple[int, ...], other: tuple[int, ...]
) -> list[Axis]:
    rank = max(len(left), len(right))
    result: list[Axis] = []
    for k in range(rank, 0, -1):
        axis: Axis = ANY
        for axes, sizes in ((left, shape), (right, other)):
            if len(axes) >= k and sizes[-k] != 1:
                axis = call.bind(axis, axes[-k])
        result.append(axis)
    return result


@rule("_pdist_forward")
def distances_within(call: Call) -> None:
    """`[n, features] -> [n (n - 1) / 2]`."""
    x = call["self"]
    rows, features = call.axes(x)
    call.freeze(rows, "compared pair by pair")
    renormalize(call, features)
    call.pin_unlabelled(x, 1)
    call.put(call.out, [FIXED])


@rule("dist")
def distance(call: Call) -> None:
    """The norm of a difference, over all axes."""
    a, b = call["self"], call["other"]
    for axis in broadcast_axes(call, [a, b], [max(p, q) for p, q in zip(_ranked(a, b), _ranked(b, a), strict=True)]):
        renormalize(call, axis)
    for tensor in (a, b):
        for d in range(tensor.dim()):
            call.pin_unlabelled(tensor, d)
    call.put(call.out, [])


def _ranked(tensor: Tensor, other: Tensor) -> list[int]:
    return [1] * (max(tensor.dim(), other.dim()) - tensor.dim()) + list(tensor.shape)
