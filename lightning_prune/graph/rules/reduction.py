"""Reductions and pooling: the reduced axes go, the others stay."""

from __future__ import annotations

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
            call.hold_if_read(call.outputs[1], x, d, "the index of a channel")
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
        call.hold(x, d, "the index of a channel")
    keep = call.out.dim() == x.dim()
    call.put(call.out, [FIXED if d in dims else a for d, a in enumerate(axes) if keep or d not in dims])
