"""Whether a channel whose weights are zero is zero itself: where it is not, removing it is not the same as zeroing it.

A weight reads nothing from a channel whose own weights are zero, whatever the channel holds. Where two activations are
multiplied and summed, what the channel holds does count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_prune.graph.call import axes_of, tensors_in
from lightning_prune.graph.labels import is_labelled

__all__ = ["is_lifted", "note_lifted"]

_LIFTED = "_lightning_prune_lifted"


def _ops(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


_LIFTS = _ops(
    """
    exp exp2 exp_ sigmoid sigmoid_ softplus log_sigmoid log_sigmoid_forward hardsigmoid hardsigmoid_ cos cosh acos
    softmax _softmax _safe_softmax log_softmax _log_softmax log log2 log10 rsqrt reciprocal erfc logit lgamma digamma
    rsub logical_not bitwise_not eq ge le ones_like rand_like randn_like full_like bernoulli where masked_fill
    masked_fill_ fill fill_ normal_ uniform_ clamp_min clamp clip pow constant_pad_nd copy_ isfinite
    """
)
_SUMS = _ops("add add_ sub sub_ addcmul addcdiv lerp maximum minimum")
_PRODUCTS = _ops("mul mul_ multiply")
_FROM_WEIGHTS = _ops(
    """
    linear conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d mm bmm
    matmul einsum addmm baddbmm embedding embedding_bag scaled_dot_product_attention
    """
)
_NORMS = _ops("batch_norm layer_norm group_norm instance_norm rms_norm native_layer_norm native_group_norm")


def is_lifted(tensor: Tensor) -> bool:
    """Return whether a channel of the tensor may differ from zero though all its weights are zero."""
    return bool(getattr(tensor, _LIFTED, False))


def note_lifted(name: str, args: Mapping[str, Any], outputs: list[Tensor]) -> None:
    """Note on the results of an op whether they are lifted.

    Args:
        name: Schema name.
        args: Arguments by schema name.
        outputs: Its results, labelled.
    """
    inputs = tensors_in(args)
    if name in _LIFTS:
        lifted = True
    elif name in _FROM_WEIGHTS or (name in _NORMS and args.get("weight") is not None):
        lifted = False
    elif name in _SUMS:
        others = [v for k, v in args.items() if k in ("other", "weight") and isinstance(v, (int, float))]
        lifted = any(map(_may_differ, inputs)) or any(others)
    elif name in _PRODUCTS:
        lifted = any(map(is_lifted, inputs)) and all(map(_may_differ, inputs))
    else:
        lifted = any(map(is_lifted, inputs))
    if lifted:
        for tensor in outputs:
            setattr(tensor, _LIFTED, True)


def _may_differ(tensor: Tensor) -> bool:
    """Return whether a tensor is lifted, or has no channels whose weights could be zero."""
    return is_lifted(tensor) or not any(map(is_labelled, axes_of(tensor)))
