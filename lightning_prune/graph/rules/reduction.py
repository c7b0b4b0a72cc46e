"""Reductions and pooling: the reduced axes go, the others stay."""

from __future__ import annotations

import re

from lightning_prune.graph.call import Call, normalize_dims
from lightning_prune.graph.labels import ANY, FIXED, is_labelled
from lightning_prune.graph.rules.normalization import renormalize
from lightning_prune.graph.rules.pointwise import pointwise
from lightning_prune.graph.rules.table import rule

# of equal values: their result depends on how many there are, unlike that of a mean or a maximum
LENGTH_COUNTS = frozenset(
    f"aten::{n}"
    for n in (
        "sum",
        "nansum",
        "linalg_vector_norm",
        "linalg_norm",
        "norm",
        "logsumexp",
        "prod",
        "count_nonzero",
        "var",
        "std",
        "var_mean",
        "std_mean",
    )
)


@rule(
    """
    mean sum nansum nanmean prod amax amin max min aminmax var std var_mean std_mean norm linalg_vector_norm
    linalg_norm logsumexp all any count_nonzero
    """
)
def reduce(call: Call) -> None:
    """Reduce over `dim`, all axes when it is absent; with two tensors `max` and `min` act on each element."""
    if call["other"] is not None:
        pointwise(call)
        return
    x = call["self"]
    axes = call.axes(x)
    dims = set(normalize_dims(call["dim"], x.dim()))
    for d in dims:
        renormalize(call, axes[d])
        if call.name in LENGTH_COUNTS and not is_labelled(axes[d]) and axes[d] == ANY:
            call.pin(x, d)
        if len(call.outputs) > 1 and call.name in ("aten::max", "aten::min"):
            call.freeze(axes[d], "the index of a channel")
    for out in call.outputs:
        if out.dim() == x.dim():
            call.put(out, [ANY if d in dims else a for d, a in enumerate(axes)])
        else:
            call.put(out, [a for d, a in enumerate(axes) if d not in dims])


@rule("argmax argmin")
def arg_reduce(call: Call) -> None:
    """The result is a position: the axis may not change."""
    x = call["self"]
    axes = call.axes(x)
    dims = set(normalize_dims(call["dim"], x.dim()))
    for d in dims:
        call.freeze(axes[d], "the index of a channel")
    keep = call.out.dim() == x.dim()
    call.put(call.out, [FIXED if d in dims else a for d, a in enumerate(axes) if keep or d not in dims])


@rule(
    """
    avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d
    _upsample_nearest_exact1d reflection_pad1d replication_pad1d avg_pool2d max_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d upsample_nearest2d _upsample_nearest_exact2d
    reflection_pad2d replication_pad2d avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d
    _adaptive_avg_pool3d upsample_nearest3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d
    grid_sampler_3d fractional_max_pool2d
    """
)
def spatial(call: Call) -> None:
    """Batch and channels stay; the last n axes are space, whose size is fixed."""
    x = call.inputs[0]
    match = re.search(r"(\d)d", call.name) or re.search(r"_(\d)d", call.name)
    assert match is not None
    lead = x.dim() - int(match[1])
    axes = call.axes(x)
    for axis in axes[lead:]:
        call.freeze(axis, "a spatial axis")
    for out in call.outputs:
        call.put(out, [*axes[:lead], *[FIXED] * (out.dim() - lead)])
