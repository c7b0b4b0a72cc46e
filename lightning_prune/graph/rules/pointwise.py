"""Ops that act on each element alone: broadcast axes bind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_prune.graph.call import Call, is_weight, mark_weight
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.table import rule

CASTS = frozenset(
    f"aten::{name}"
    for name in (
        "clone",
        "contiguous",
        "alias",
        "detach",
        "detach_",
        "to",
        "_to_copy",
        "lift_fresh",
        "positive",
    )
)


def broadcast_axes(call: Call, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Axis]:
    """Bind the axes of tensors that broadcast against one another to `shape`."""
    rank = len(shape)
    result: list[Axis] = [ANY] * rank
    for tensor in tensors:
        for d, axis in enumerate(call.axes(tensor), start=rank - tensor.dim()):
            if tensor.shape[d - rank] == shape[d]:
                result[d] = call.bind(result[d], axis)
            else:
                call.freeze(axis, "one channel broadcast")
    return result


@rule(
    """
    dropout dropout_ alpha_dropout feature_dropout feature_alpha_dropout native_dropout hardswish hardswish_
    hardsigmoid hardsigmoid_ hardtanh hardtanh_ relu6 relu6_ selu celu celu_ rrelu rrelu_ rrelu_with_noise
    masked_fill masked_fill_ clone contiguous alias detach detach_ to _to_copy lift_fresh lift
    requires_grad_ zeros_like ones_like empty_like full_like rand_like randn_like bernoulli bernoulli_ uniform_
    normal_ exponential_ random_ fill_ fill zero_ copy_ copy gelu gelu_ silu silu_ mish mish_ relu relu_
    log_sigmoid log_sigmoid_forward softplus clip clip_ clamp clamp_ square square_
    divide multiply subtract true_divide floor_divide remainder fmod addcmul addcdiv lerp nan_to_num nan_to_num_
    positive _conj resolve_conj resolve_neg real imag abs bitwise_not logical_not isnan isinf isfinite float_power
    ldexp absolute negative arctan2 complex polar rsub _neg_view _lazy_clone _pin_memory zero
    __irshift__ randint_like random uniform exponential cauchy geometric log_normal _standard_gamma
    _add_relu fake_quantize_per_tensor_affine_cachemask quantize_per_tensor dequantize int_repr
    """
)
def pointwise(call: Call) -> None:
    """Bind the broadcast axes of all tensor arguments."""
    inputs = call.inputs
    parameters_first = sorted(inputs, key=lambda t: not isinstance(t, nn.Parameter))  # not the mask of a weight
    for out in call.outputs:
        axes = broadcast_axes(call, parameters_first, out.shape)
        call.put(out, axes)
        if call.name in CASTS and inputs and is_weight(inputs[0]):
            mark_weight(out)


@rule("prelu _prelu_kernel")
def prelu(call: Call) -> None:
    """The weight is one value, or one per channel (axis 1)."""
    x, w = call["self"], call["weight"]
    axes = call.axes(x)
    if w.numel() > 1 and w.dim() == 1 and x.dim() > 1:
        axes[1] = call.bind(axes[1], call.axes(w)[0])
    elif w.numel() > 1:
        axes = broadcast_axes(call, [x, w], x.shape)
    call.put(call.out, axes)


@rule("glu")
def glu(call: Call) -> None:
    """`a * sigmoid(b)` of the two halves of an axis: they must lose equally."""
    x = call["self"]
    d = call["dim"] % x.dim()
    axes = call.axes(x)
    if is_labelled(axes[d]):
        half = len(axes[d]) // 2
        axes[d] = call.bind(axes[d][:half], axes[d][half:])
    call.put(call.out, axes)


@rule("tril triu tril_ triu_")
def triangle(call: Call) -> None:
    """What is zeroed depends on the position along the last two axes."""
    axes = call.axes(call["self"])
    for d in (-2, -1):
        call.freeze(axes[d], "a triangle of channels")
        axes[d] = FIXED
    call.put(call.out, axes)


@rule("fake_quantize_per_channel_affine_cachemask quantize_per_channel")
def quantize_channels(call: Call) -> None:
    """Scale and zero point of each channel along `axis`."""
    axes, d = call.axes(call["self"]), call["axis"]
    for name in ("scale", "scales", "zero_point", "zero_points"):
        if call[name] is not None:
            axes[d] = call.bind(axes[d], call.axes(call[name])[0])
    for out in call.outputs:
        call.put(out, axes)
