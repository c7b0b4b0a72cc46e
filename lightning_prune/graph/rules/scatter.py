"""Writes into positions: the axes that are written by position are fixed, the others bind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_prune.graph.call import Call, normalize_dims
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.indexing import freeze_all, indexed_axes
from lightning_prune.graph.rules.table import rule

_POSITION = "written by position"


def fix(call: Call, axes: list[Axis], dims: Sequence[int], why: str = _POSITION) -> None:
    """Freeze some of the axes; what carried no labels differs by position from here on."""
    for d in dims:
        call.freeze(axes[d], why)
        axes[d] = axes[d] if is_labelled(axes[d]) else FIXED


@rule("scatter scatter_add scatter_reduce")
def scatter(call: Call) -> None:
    """`out[index[i, j], j] = source[i, j]`: along the other axes a part may be written, then they are fixed too."""
    x = call["self"]
    axes = call.axes(x)
    dim = call["dim"] % max(x.dim(), 1)
    fix(call, axes, range(x.dim())[dim : dim + 1])
    for tensor in (call["index"], call["src"]):
        for d, axis in enumerate(call.axes(tensor) if isinstance(tensor, Tensor) and x.dim() else ()):
            if d == dim:
                call.hold(tensor, d, _POSITION)
            elif tensor.shape[d] == x.shape[d] == call["index"].shape[d]:
                axes[d] = call.bind(axes[d], axis)
            else:
                call.freeze(axis, "only a part is written")
                fix(call, axes, [d], "only a part is written")
    call.put(call.out, axes)


@rule("index_add index_copy index_fill index_reduce")
def write_rows(call: Call) -> None:
    """Rows along `dim` are written, whole ones."""
    x, source = call["self"], call["source"]
    axes = call.axes(x)
    dim = call["dim"] % max(x.dim(), 1)
    fix(call, axes, range(x.dim())[dim : dim + 1])
    rows = call.axes(source) if isinstance(source, Tensor) else []
    for d, axis in enumerate(rows if len(rows) == len(axes) else ()):
        if d == dim:
            call.hold(source, d, _POSITION)
        else:
            axes[d] = call.bind(axes[d], axis)
    freeze_all(call, call["index"], _POSITION)
    call.put(call.out, axes)


@rule("index_put _index_put_impl _unsafe_index_put")
def write_by_index(call: Call) -> None:
    """`x[indices] = values`: the indexed axes are fixed, the values bind to the others."""
    x, values = call["self"], call["values"]
    axes = call.axes(x)
    taken, places = indexed_axes(call, x, call["indices"], _POSITION)
    fix(call, axes, taken)
    own = call.axes(values)
    for k in range(1, min(len(own), len(places)) + 1):
        source = places[-k]
        if values.shape[-k] == 1:
            call.freeze(own[-k], "one channel broadcast")
        elif isinstance(source, int):
            axes[source] = call.bind(axes[source], own[-k])
        else:
            call.hold(values, values.dim() - k, _POSITION)
    for index in call["indices"]:
        if index is not None:  # how many there are is how often is written
            freeze_all(call, index, _POSITION)
    call.put(call.out, axes)


@rule("masked_scatter")
def write_by_mask(call: Call) -> None:
    """Values in a row replace where the mask holds: whole last axes where the mask is constant along them."""
    x, mask, source = call["self"], call["mask"], call["source"]
    axes, masks = call.axes(x), call.axes(mask)
    whole = x.dim() and mask.dim() and source.dim() and source.shape[-1] == x.shape[-1]
    along = masks[-1] if mask.dim() else FIXED
    if whole and isinstance(along, str) and (along == ANY or mask.shape[-1] == 1):
        axes[-1] = call.bind(axes[-1], call.axes(source)[-1])
        read = [(mask, range(mask.dim() - 1)), (source, range(source.dim() - 1))]
    else:
        fix(call, axes, [-1] if axes else [])
        read = [(mask, range(mask.dim())), (source, range(source.dim()))]
    fix(call, axes, range(len(axes) - 1))
    for tensor, dims in read:
        for d in dims:
            call.hold(tensor, d, "positions are mixed")
    call.put(call.out, axes)


@rule("select_scatter slice_scatter")
def write_part(call: Call) -> None:
    """A constant part of one axis is written."""
    x, source = call["self"], call["src"]
    axes, own = call.axes(x), call.axes(source)
    dim = call["dim"] % x.dim()
    if len(own) == len(axes):
        call.freeze(own.pop(dim), _POSITION)
    fix(call, axes, [dim])
    for d, axis in zip([d for d in range(len(axes)) if d != dim], own, strict=True):
        axes[d] = call.bind(axes[d], axis)
    call.put(call.out, axes)


@rule("diagonal_scatter")
def write_diagonal(call: Call) -> None:
    """The diagonal of two axes is written."""
    axes, own = call.axes(call["self"]), call.axes(call["src"])
    dims = normalize_dims([call["dim1"], call["dim2"]], len(axes))
    fix(call, axes, dims)
    call.freeze(own.pop(), _POSITION)
    for d, axis in zip([d for d in range(len(axes)) if d not in dims], own, strict=True):
        axes[d] = call.bind(axes[d], axis)
    call.put(call.out, axes)
