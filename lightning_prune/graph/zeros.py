"""Which tensors are zero where channels are removed, when the weights of removed channels are zero.

A sum over removed channels adds nothing only if its terms are zero there. Weights are, and a linear layer hands that
on; `sigmoid` does not. Where two activations are summed over channels and neither is zero, removing is not zeroing:
the unit renormalises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.graph.call import Call, axes_of
from lightning_prune.graph.equation import spell_equation
from lightning_prune.graph.labels import is_labelled

__all__ = ["copy_zeroed", "is_zeroed", "mark_zeroed", "spread_zeros"]

_ZERO = "_lightning_prune_zero"


class _Flag:
    """One for all views of some memory: what one of them is told to hold, the others hold."""

    def __init__(self, holds: bool) -> None:
        self.holds = holds


def is_zeroed(tensor: Tensor) -> bool:
    """Return whether every entry of a removed channel is zero, along every axis that has channels."""
    flag = getattr(tensor, _ZERO, None)
    return flag is not None and flag.holds


def mark_zeroed(tensor: Tensor) -> None:
    """Note that every entry of a removed channel is zero: the tensor is a parameter."""
    setattr(tensor, _ZERO, _Flag(True))


def copy_zeroed(source: Tensor, out: Tensor) -> None:
    """Let a copy be what its source is."""
    setattr(out, _ZERO, _Flag(is_zeroed(source)))


def _ops(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# f(0) = 0, of one tensor, or of several that are all zero
_KEEPS = _ops(
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh abs absolute neg negative hardswish square sqrt sin asin
    atan sinh tan asinh atanh expm1 log1p erf erfinv sign sgn floor ceil round trunc fix frac hardshrink softshrink
    nan_to_num real imag conj _conj positive prelu _prelu_kernel glu rrelu dropout native_dropout feature_dropout
    to _to_copy _conj_physical resolve_conj resolve_neg zeros_like empty_like zero
    view _unsafe_view reshape flatten unflatten squeeze unsqueeze permute transpose t expand expand_as broadcast_to
    repeat repeat_interleave slice select unbind split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk
    roll flip rot90 unfold diagonal diag_embed as_strided tril triu index_select index gather embedding
    embedding_bag pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d grid_sampler_2d grid_sampler_3d mean sum amax amin max min prod var std norm linalg_vector_norm
    cumsum _fft_r2c _fft_c2c _fft_c2r view_as_complex view_as_real _weight_norm
    """
)
_VIEWS = _ops("view reshape flatten unflatten squeeze unsqueeze permute transpose t expand slice select unbind split")
_SUMS = _ops("add sub subtract rsub lerp addcmul addcdiv maximum minimum fmax fmin cat stack where copy complex")
_PRODUCTS = _ops("mul multiply")
_QUOTIENTS = _ops("div divide true_divide pow floor_divide")
_LIMITS = _ops("clamp clip hardtanh clamp_min clamp_max")
_MATRICES = _ops("mm bmm matmul mv")
# zero weights make a candidate of zero: the state that was zero stays so
_RECURRENT = _ops("lstm gru rnn_tanh lstm_cell gru_cell rnn_tanh_cell rnn_relu rnn_relu_cell")
_NORMS = _ops("batch_norm layer_norm group_norm rms_norm instance_norm native_batch_norm native_layer_norm")
_CONVOLUTIONS = _ops("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")


def spread_zeros(call: Call) -> None:
    """Note which results of an op are zero where channels are removed."""
    name = call.name.removesuffix("_")
    for out in call.outputs:
        if any(map(is_labelled, axes_of(out))):
            _note(call, name, out)


def _note(call: Call, name: str, out: Tensor) -> None:
    source = call["self"]
    flag = getattr(source, _ZERO, None)
    if name in _VIEWS and flag is not None:
        setattr(out, _ZERO, flag)
        return
    holds = _holds(call, name, out)
    if any(out is t for t in call.inputs):
        own = getattr(out, _ZERO, None)
        if own is not None:
            own.holds = own.holds and holds
        return
    setattr(out, _ZERO, _Flag(holds))


def _holds(call: Call, name: str, out: Tensor) -> bool:
    if name in _SUMS or (isinstance(call["other"], Tensor) and name in _ops("max min")):
        return _is_sum_zero(call, name, out)
    if name in _KEEPS:
        return all(is_zeroed(t) for t in call.inputs if any(map(is_labelled, axes_of(t))))
    if name in _PRODUCTS:
        return _covers(call, out, [(t, range(out.dim() - t.dim(), out.dim())) for t in call.inputs])
    if name in _QUOTIENTS:
        return isinstance(call["self"], Tensor) and _is_at_least(call["exponent"], 1) and _is_all_zero(call, out)
    if name in ("aten::masked_fill", "aten::constant_pad_nd", "aten::fill"):
        number = call["value"]
        return (number is None or _is_number(number, 0)) and (name == "aten::fill" or is_zeroed(call["self"]))
    if name in _LIMITS:
        low, high = call["min" if "min" in call else "min_val"], call["max" if "max" in call else "max_val"]
        return is_zeroed(call["self"]) and _is_at_least(high, 0) and (low is None or (_is_number(low) and low <= 0))
    return _is_layer_zero(call, name, out)


def _is_number(value: object, equal_to: float | None = None) -> bool:
    return isinstance(value, (int, float)) and (equal_to is None or value == equal_to)


def _is_at_least(value: Any, least: float) -> bool:
    return value is None or (_is_number(value) and value >= least)


def _is_all_zero(call: Call, out: Tensor) -> bool:
    x = call["self"]
    return _covers(call, out, [(x, range(out.dim() - x.dim(), out.dim()))])


def _is_sum_zero(call: Call, name: str, out: Tensor) -> bool:
    terms = call.inputs
    if name == "aten::where":
        terms = [t for t in (call["self"], call["other"]) if isinstance(t, Tensor)]
    elif name == "aten::copy":
        terms = [call["src"]]
    elif name == "aten::stack":
        return all(map(is_zeroed, terms))
    if _is_number(call["other"]) and call["other"]:
        return False
    return all(_covers(call, out, [(t, range(out.dim() - t.dim(), out.dim()))]) for t in terms)


def _is_layer_zero(call: Call, name: str, out: Tensor) -> bool:
    last = out.dim() - 1
    if name == "aten::linear":
        x, w = call["input"], call["weight"]
        rows = [*range(x.dim() - 1), -1]
        return _covers(call, out, [(x, rows), (w, [last, -1][2 - w.dim() :])], call["bias"], last)
    if name in _CONVOLUTIONS:
        w, space = call["weight"], call["weight"].dim() - 2
        channel = last - space
        transposed = bool(call["transposed"]) if "transposed" in call else "transpose" in name
        sides = ([-1, channel] if call["groups"] == 1 else [-1, -1]) if transposed else [channel, -1]
        x = (call["input"], [*[-1] * (channel + 1), *range(channel + 1, out.dim())])
        return _covers(call, out, [x, (w, [*sides, *[-1] * space])], call["bias"], channel)
    if name in _MATRICES:
        a = call["self"]
        b = next(call[n] for n in ("other", "mat2", "vec") if n in call)
        lead = last - 1 if b.dim() > 1 and a.dim() > 1 else last
        rows = [*range(lead - a.dim() + 2, lead + 1), -1] if a.dim() > 1 else [-1]
        columns = [*range(lead - b.dim() + 2, lead), -1, last] if b.dim() > 1 else [-1]
        return _covers(call, out, [(a, rows), (b, columns)])
    if name == "aten::_grouped_mm":
        return call["bias"] is None and _covers(call, out, [(call["mat2"], [-1] * (call["mat2"].dim() - 1) + [last])])
    if name == "aten::einsum":
        terms, letters = spell_equation(call["equation"], [t.dim() for t in call["tensors"]], out.dim())
        return _covers(
            call, out, [(t, [letters.find(c) for c in term]) for t, term in zip(call["tensors"], terms, strict=True)]
        )
    if name.endswith("scaled_dot_product_attention"):
        v = call["value"]
        return _covers(call, out, [(v, [*range(v.dim() - 2), -1, last])])
    if name in _RECURRENT:
        weights = call["params"] or [call[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh") if call[n] is not None]
        return all(map(is_zeroed, weights))
    if name in _NORMS:
        w, b = call["weight"], call["bias"]
        channel = [1] if name in _ops("batch_norm group_norm instance_norm native_batch_norm") else range(out.dim())
        return w is not None and _covers(call, out, [(w, list(channel)[-w.dim() :])], b, None)
    return False


def _covers(
    call: Call,
    out: Tensor,
    factors: Iterable[tuple[Tensor, Sequence[int]]],
    bias: Tensor | None = None,
    along: int | None = None,
) -> bool:
    """Return whether, for every axis of the result that has channels, some factor is zero where they are removed.

    Args:
        call: The op.
        out: The result.
        factors: Tensors, and for each of their axes the axis of the result that it is, -1 for none.
        bias: What is added along one axis.
        along: That axis; any, when the factors have it too.
    """
    needed = {d for d, axis in enumerate(axes_of(out)) if is_labelled(axis) and not call.space.stays(axis)}
    if bias is not None and (not is_zeroed(bias) or (along is not None and needed - {along})):
        return False
    for tensor, dims in factors:
        if is_zeroed(tensor):
            needed -= {d for d, axis in zip(dims, axes_of(tensor), strict=True) if is_labelled(axis)}
    return not needed
