"""Normalisation layers: weight, bias and statistics bind to the channel axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.graph.call import Call, normalize_dims
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.movement import reshape_axes
from lightning_prune.graph.rules.table import rule


def per_channel(call: Call) -> list[Axis]:
    """Bind weight, bias and statistics to axis 1; return the axes of the result."""
    axes = call.axes(call["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            axes[1] = call.bind(axes[1], call.axes(call[name])[0])
    return axes


@rule(
    """
    batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    _batch_norm_impl_index _batch_norm_no_update _batch_norm_with_update instance_norm
    """
)
def batch_norm(call: Call) -> None:
    """Each channel is normalised alone, over all other axes where the statistics are those of the batch."""
    axes = per_channel(call)
    if call.name == "aten::instance_norm":
        for axis in axes[2:]:
            call.freeze(axis, "a spatial axis")
    elif call["training"] or call.name == "aten::_batch_norm_with_update":
        for axis in (axes[0], *axes[2:]):
            renormalize(call, axis)
    call.put(call.outputs[0], axes)
    for statistic in call.outputs[1:]:
        per_axis = statistic.dim() == 1 and statistic.shape[0] == call["input"].shape[1]
        call.put(statistic, [axes[1]] if per_axis else [FIXED] * statistic.dim())


@rule("layer_norm native_layer_norm rms_norm _fused_rms_norm", sizes=("normalized_shape",))
def layer_norm(call: Call) -> None:
    """The last axes are normalised together."""
    axes = call.axes(call["input"])
    rank = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            for d in range(1, rank + 1):
                axes[-d] = call.bind(axes[-d], call.axes(call[name])[-d])
    for axis in axes[-rank:]:
        renormalize(call, axis)
    call.put(call.outputs[0], axes)
    for statistic in call.outputs[1:]:
        call.put(statistic, [*axes[:-rank], *[ANY] * rank])


@dataclass(frozen=True, eq=False)
class _Groups:
    """As many groups as another call, or one for each channel in both."""

    number: int
    each: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Groups) and (self.number == other.number or (self.each and other.each))

    __hash__ = None  # type: ignore[assignment]  # equal ones may differ


def _groups(args: Mapping[str, Any], _: Sequence[Axis]) -> _Groups:
    groups = args["num_groups"] if "num_groups" in args else args["group"]
    return _Groups(groups, groups == args["input"].shape[1])


@rule("group_norm native_group_norm", sizes=("num_groups", "group", "N", "C", "HxW"), stays=_groups)
def group_norm(call: Call) -> None:
    """The channels of a group and all of space are normalised together; groups stay, but for those of one channel."""
    axes = per_channel(call)
    groups = call["num_groups"] if "num_groups" in call else call["group"]
    size = call["input"].shape[1]
    outer, inner = reshape_axes(call, [size], [axes[1]], [groups, size // groups])
    if groups < size:
        call.freeze(outer, "the groups of a group norm")
        renormalize(call, inner)
    for axis in axes[2:]:
        renormalize(call, axis)
    call.put(call.outputs[0], axes)
    for statistic in call.outputs[1:]:
        call.put(statistic, [axes[0], outer])


def renormalize(call: Call, axis: Axis) -> None:
    """Note that the result depends on how many channels are left."""
    if is_labelled(axis):
        call.space.renormalized.append(axis)


@rule(
    """
    softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumsum_ cumprod logcumsumexp cummax
    cummin sort argsort topk diff msort median kthvalue mode nanmedian
    """
)
def along_one_axis(call: Call) -> None:
    """One channel's result depends on the others: the axis may not change."""
    x = call["self"]
    axes = call.axes(x)
    dim = 0 if call.name == "aten::msort" else call["dim"]  # a median of all has no `dim`
    dims = normalize_dims(dim, x.dim()) if x.dim() else []
    for d in dims:
        call.hold(x, d, f"{call.name.removeprefix('aten::')} over channels")
        axes[d] = FIXED
    for out in call.outputs:
        call.put(out, axes if out.dim() == x.dim() else [a for d, a in enumerate(axes) if d not in dims])


@rule("renorm")
def renorm(call: Call) -> None:
    """Each slice along `dim` is normalised by the norm over all other axes."""
    axes = call.axes(call["self"])
    for d, axis in enumerate(axes):
        if d != call["dim"] % len(axes):
            renormalize(call, axis)
            call.pin_unlabelled(call["self"], d)
    call.put(call.out, axes)


@rule("_weight_norm")
def weight_norm(call: Call) -> None:
    """`g * v / |v|`, the norm over all axes but `dim`; over all of them where that is -1."""
    v, g, dim = call["v"], call["g"], call["dim"]
    axes = call.axes(v)
    for d, axis in enumerate(axes):
        if dim != -1 and d == dim % v.dim():
            axes[d] = call.bind(call.axes(g)[d], axis)  # it is `g` that says how much a channel weighs
            continue
        renormalize(call, axis)
        if isinstance(axis, str) and axis == ANY:
            call.pin(v, d)
    call.put(call.out, axes)
