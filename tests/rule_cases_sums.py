"""Calls that cover the rule table, continued: ops that sum, pool or normalise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from tests.rule_cases import A, aten, case, in_place, quiet, words

product = partial(case, product=True)
PLAIN, TRANSPOSED = ([1], [0], [1], False, [0], 1), ([1], [0], [1], True, [0], 1)

CONTRACTION = {
    "linear": product(F.linear, (2, 5, 6), (7, 6), (7,)),
    "linear, one row": product(F.linear, (5, 6), (6,)),
    "mm": product(torch.mm, (5, 6), (6, 7)),
    "bmm": product(torch.bmm, (4, 5, 6), (4, 6, 7)),
    "matmul": product(torch.matmul, (3, 4, 5, 6), (4, 6, 7)),
    "matmul, vector on the left": product(torch.matmul, (6,), (4, 6, 7)),
    "matmul, vector on the right": product(torch.matmul, (4, 7, 6), (6,)),
    "mv": product(A.mv, (5, 6), (6,)),
    "dot": product(A.dot, (6,), (6,)),
    "vdot": product(A.vdot, (6,), (6,)),
    "addmm": product(torch.addmm, (7,), (5, 6), (6, 7)),
    "addmv": product(torch.addmv, (5,), (5, 6), (6,)),
    "baddbmm": product(torch.baddbmm, (4, 1, 7), (4, 5, 6), (4, 6, 7)),
    "addbmm": product(torch.addbmm, (5, 7), (4, 5, 6), (4, 6, 7), pooled="1.0 2.0"),
    "addr": case(torch.addr, (1, 6), (4,), (6,)),
    "_addmm_activation": product(A._addmm_activation, (7,), (5, 6), (6, 7)),
    "_int_mm": product(lambda a, b: A._int_mm(a.to(torch.int8), b.to(torch.int8)), (32, 8), (8, 16)),
    "_grouped_mm": product(
        lambda a, b: F.grouped_mm(a.round().float(), b.round().float(), offs=torch.tensor([2, 5, 7]).int()),
        (7, 16),
        (3, 16, 12),
        frozen="0.0 1.0",
        literal=True,
    ),
    "sparse mm": product(
        lambda a, b: torch.sparse.mm(a.detach().to_sparse(), b), torch.eye(5).double(), (5, 7), frozen="0.0 0.1 1.0"
    ),
    "bilinear": product(F.bilinear, (5, 6), (5, 4), (7, 6, 4), (7,)),
    "tensordot": product(lambda a, b: torch.tensordot(a, b, ([2, 1], [0, 1])), (3, 4, 6), (6, 4, 5)),
    "inner": product(torch.inner, (5, 6), (7, 6)),
    "outer": product(torch.outer, (5,), (6,)),
    "multi_dot": product(lambda *m: torch.linalg.multi_dot(m), (3, 4), (4, 6), (6, 5)),
    "einsum": product(lambda a, b: torch.einsum("bik,bkj->bji", a, b), (4, 5, 6), (4, 6, 7)),
    "einsum, ellipsis": product(lambda a, b: torch.einsum("...i,ji", a, b), (4, 5, 6), (7, 6)),
    "einsum, three": product(lambda a, b, c: torch.einsum("ik,kj,jl->li", a, b, c), (5, 6), (6, 7), (7, 4)),
    "einsum, a letter of one operand": product(lambda a, b: torch.einsum("bij,bjk->bi", a, b), (3, 4, 5), (3, 5, 6)),
    "einsum, one entry summed over": product(lambda a, b: torch.einsum("bid,bjd->bij", a, b), (4, 5, 1), (4, 6, 1)),
    "einsum, diagonal": product(lambda a: torch.einsum("bii->bi", a), (4, 5, 5), frozen="0.1 0.2"),
    "attention": product(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        (2, 4, 5, 6),
        (2, 4, 7, 6),
        (2, 4, 7, 3),
        frozen="0.2 1.2 2.2",
    ),
    "attention, masked": product(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3),
        (2, 4, 5, 6),
        (2, 4, 7, 6),
        (2, 4, 7, 3),
        (5, 7),
        frozen="0.2 1.2 2.2 3.0 3.1",
    ),
    "attention, grouped queries": product(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True),
        (2, 12, 5, 6),
        (2, 4, 7, 6),
        (2, 4, 7, 3),
        frozen="0.2 1.2 2.2",
    ),
    "attention, one key for all": product(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True),
        (2, 12, 5, 6),
        (2, 1, 7, 6),
        (2, 1, 7, 3),
        frozen="0.2 1.2 2.2",
    ),
    "_scaled_dot_product_flash_attention_for_cpu": product(
        lambda q, k, v: A._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.3),
        (2, 4, 5, 6),
        (2, 4, 7, 6),
        (2, 4, 7, 6),
        frozen="0.2 1.2 2.2",
    ),
    "flex_attention": product(
        quiet(lambda q, k, v: flex_attention(q, k, v, scale=0.3)),
        (2, 4, 5, 16),
        (2, 4, 5, 16),
        (2, 4, 5, 16),
        frozen="0.0 0.1 0.2 1.0 1.1 1.2 2.0 2.1 2.2",
    ),
    "conv1d": product(F.conv1d, (2, 6, 7), (5, 6, 3), (5,), frozen="0.2 1.2"),
    "conv2d": product(F.conv2d, (2, 6, 7, 7), (5, 6, 3, 3), frozen="0.2 0.3 1.2 1.3"),
    "conv2d, no batch": product(F.conv2d, (6, 7, 7), (5, 6, 3, 3), frozen="0.1 0.2 1.2 1.3"),
    "conv2d, grouped": product(
        lambda n, x, w: F.conv2d(x, w, groups=n.along(0, 1, 0, 12) // n.along(1, 1, 0, 3)),
        (2, 12, 5, 5),
        (20, 3, 3, 3),
        frozen="0.2 0.3 1.2 1.3",
        sized=True,
    ),
    "conv2d, depthwise": product(
        lambda x, w: F.conv2d(x, w, groups=x.shape[1]), (2, 9, 5, 5), (9, 1, 3, 3), frozen="0.2 0.3 1.2 1.3"
    ),
    "conv2d, a kernel of one along an axis": product(
        lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 0)), (2, 6, 7, 5), (5, 6, 3, 1), frozen="0.2 1.2"
    ),
    "conv2d, text for its padding": product(
        lambda x, w: F.conv2d(x, w, padding="same"), (2, 6, 7, 5), (5, 6, 3, 1), frozen="0.2 1.2"
    ),
    "conv2d, a kernel of one that leaves some out, or pads": product(
        lambda x, w: F.conv2d(x, w, None, (2, 1), (0, 1)), (2, 6, 8, 5), (5, 6, 1, 1), frozen="0.2 0.3"
    ),
    "conv_transpose2d, a kernel of one along an axis": product(
        lambda x, w: F.conv_transpose2d(x, w, None, (2, 1), (1, 0), (1, 0)),
        (2, 6, 7, 5),
        (6, 5, 3, 1),
        frozen="0.2 1.2",
    ),
    "conv3d": product(F.conv3d, (2, 4, 5, 5, 5), (5, 4, 3, 3, 3), frozen="0.2 0.3 0.4 1.2 1.3 1.4"),
    "conv_transpose1d": product(F.conv_transpose1d, (2, 6, 7), (6, 5, 3), (5,), frozen="0.2 1.2"),
    "conv_transpose2d": product(F.conv_transpose2d, (2, 6, 7, 7), (6, 5, 3, 3), frozen="0.2 0.3 1.2 1.3"),
    "conv_transpose2d, grouped": product(
        lambda n, x, w: F.conv_transpose2d(x, w, groups=n.result(1, 20) // n.along(1, 1, 0, 5)),
        (2, 12, 5, 5),
        (12, 5, 3, 3),
        frozen="0.2 0.3 1.2 1.3",
        sized=True,
    ),
    "conv_transpose3d": product(F.conv_transpose3d, (2, 4, 3, 3, 3), (4, 5, 2, 2, 2), frozen="0.2 0.3 0.4 1.2 1.3 1.4"),
    "convolution": product(lambda x, w: A.convolution(x, w, None, *PLAIN), (2, 6, 7), (5, 6, 3), frozen="0.2 1.2"),
    "_convolution": product(
        lambda x, w: A._convolution(x, w, None, *PLAIN, False, False, True, True),
        (2, 6, 7),
        (5, 6, 3),
        frozen="0.2 1.2",
    ),
    "convolution, transposed": product(
        lambda x, w: A.convolution(x, w, None, *TRANSPOSED), (2, 6, 7), (6, 5, 3), frozen="0.2 1.2"
    ),
}

NORM = ((3, 6, 5), (6,), (6,), (6,), (6,))
INFERENCE = (False, 0.1, 1e-5)
ALONG = words("softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin")


def positive(norm: Callable[..., Any]) -> Callable[..., Any]:
    """Return the norm with variances that are."""
    return lambda x, w, b, mean, variance: norm(x, w, b, mean, variance.abs() + 0.5)


NORMALIZATION = {
    **{name: case(aten(name, 1), (4, 6, 5), frozen="0.1") for name in ALONG},
    "diff": case(aten("diff", 1, 1), (4, 6, 5), frozen="0.1"),
    "batch_norm": case(positive(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b)), *NORM),
    "batch_norm, batch statistics": case(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), *NORM[:3], pooled="0.0 0.2"
    ),
    "native_batch_norm": case(positive(lambda *t: A.native_batch_norm(*t, *INFERENCE)[0]), *NORM),
    "_native_batch_norm_legit": case(positive(lambda *t: A._native_batch_norm_legit(*t, *INFERENCE)[0]), *NORM),
    "_native_batch_norm_legit_no_training": case(
        positive(lambda *t: A._native_batch_norm_legit_no_training(*t, 0.1, 1e-5)[0]), *NORM
    ),
    "_batch_norm_no_update": case(positive(lambda *t: A._batch_norm_no_update(*t, 0.1, 1e-5)[0]), *NORM),
    "_batch_norm_with_update": case(
        positive(lambda *t: A._batch_norm_with_update(*t, 0.1, 1e-5)[0]), *NORM, pooled="0.0 0.2"
    ),
    "_batch_norm_impl_index": case(positive(lambda *t: A._batch_norm_impl_index(*t, *INFERENCE, False)[0]), *NORM),
    "instance_norm": case(lambda x, w, b: F.instance_norm(x, None, None, w, b), *NORM[:3], frozen="0.2"),
    "layer_norm": case(lambda x, w, b: F.layer_norm(x, w.shape, w, b), (4, 5, 6), (6,), (6,), pooled="0.2 1.0 2.0"),
    "native_layer_norm": case(
        lambda x, w: A.native_layer_norm(x, w.shape, w, None, 1e-5)[0], (4, 5, 6), (6,), pooled="0.2 1.0"
    ),
    "rms_norm": case(lambda x, w: F.rms_norm(x, w.shape, w), (4, 5, 6), (6,), pooled="0.2 1.0"),
    "_fused_rms_norm": case(lambda x, w: A._fused_rms_norm(x, w.shape, w, 1e-5)[0], (4, 5, 6), (6,), pooled="0.2 1.0"),
    "group_norm": case(lambda x, w, b: F.group_norm(x, 3, w, b), (4, 12, 5), (12,), (12,), pooled="0.1 0.2 1.0 2.0"),
    "group_norm, one channel each": case(lambda x, w: F.group_norm(x, x.shape[1], w), (2, 12, 5), (12,), pooled="0.2"),
    "native_group_norm": case(
        lambda x, w: A.native_group_norm(x, w, None, x.shape[0], x.shape[1], x.shape[2], 3, 1e-5)[0],
        (4, 12, 5),
        (12,),
        pooled="0.1 0.2 1.0",
    ),
    "_softmax": case(lambda x: A._softmax(x, 1, False), (4, 6, 5), frozen="0.1"),
    "_log_softmax": case(lambda x: A._log_softmax(x, 1, False), (4, 6, 5), frozen="0.1"),
    "cumsum_": case(in_place("cumsum_", 1), (4, 6, 5), frozen="0.1"),
    "sort": case(lambda x: torch.sort(x, 1), (4, 6, 5), frozen="0.1"),
    "argsort": case(lambda x: A.argsort(x, 1), (4, 6, 5), frozen="0.1"),
    "topk": case(lambda x: torch.topk(x, 2, 1), (4, 6, 5), frozen="0.1"),
    "kthvalue": case(lambda x: torch.kthvalue(x, 2, 1), (4, 6, 5), frozen="0.1"),
    "mode": case(lambda x: torch.mode(x, 1), (4, 6, 5), frozen="0.1"),
    "median": case(lambda x: torch.median(x, 1), (4, 6, 5), frozen="0.1"),
    "nanmedian": case(lambda x: torch.nanmedian(x, 1), (4, 6, 5), frozen="0.1"),
    "median of all": case(torch.median, (4, 6), frozen="0.0 0.1"),
    "quantile": case(lambda x: torch.quantile(x, 0.3, 1), (4, 6, 5), frozen="0.1"),
    "nanquantile": case(lambda x: torch.nanquantile(x, 0.3, 2), (4, 6, 5), frozen="0.2"),
    "cumprod_": case(in_place("cumprod_", 1), (4, 6, 5), frozen="0.1"),
    "msort": case(A.msort, (4, 6, 5), frozen="0.0"),
    "_weight_norm": case(lambda v, g: torch._weight_norm(v, g, 0), (5, 6, 4), (5, 1, 1), pooled="0.1 0.2"),
    "_weight_norm, inner axis": case(lambda v, g: torch._weight_norm(v, g, 1), (5, 6, 4), (1, 6, 1), pooled="0.0 0.2"),
    "_weight_norm, all axes": case(lambda v, g: torch._weight_norm(v, g, -1), (5, 6), (), pooled="0.0 0.1"),
    "renorm": case(lambda x: torch.renorm(x, 2, 1, 1.0), (4, 6, 5), pooled="0.0 0.2"),
}

OVER_LIST = words("mean sum nansum nanmean amax amin var std logsumexp var_mean std_mean")
OVER_ONE = words("prod all any count_nonzero")

REDUCTION = {
    **{name: case(aten(name, [1]), (4, 6, 5), pooled="0.1") for name in OVER_LIST},
    **{name: case(aten(name, 1), (4, 6, 5), pooled="0.1") for name in OVER_ONE},
    "mean, axis kept": case(lambda x: x.mean((1, 2), keepdim=True), (4, 6, 5), pooled="0.1 0.2"),
    "sum of all": case(torch.sum, (4, 6), pooled="0.0 0.1"),
    "norm": case(lambda x: A.norm(x, 2, [1]), (4, 6, 5), pooled="0.1"),
    "linalg_vector_norm": case(lambda x: A.linalg_vector_norm(x, 2, [1]), (4, 6, 5), pooled="0.1"),
    "linalg_norm": case(lambda x: A.linalg_norm(x, None, [1]), (4, 6, 5), pooled="0.1"),
    "max": case(lambda x: torch.max(x, 1)[0], (4, 6, 5), pooled="0.1"),
    "min": case(lambda x: torch.min(x, 1, keepdim=True).values, (4, 6, 5), pooled="0.1"),
    "max with its index": case(lambda x: torch.max(x, 1).indices + 1, (4, 6, 5), frozen="0.1", pooled="0.1"),
    "min with its index": case(lambda x: sum(torch.min(x, 1)), (4, 6, 5), frozen="0.1", pooled="0.1"),
    "aminmax": case(lambda x: A.aminmax(x, dim=1), (4, 6, 5), pooled="0.1"),
    "argmax": case(lambda x: x.argmax(1), (4, 6, 5), frozen="0.1"),
    "argmin": case(lambda x: x.argmin(1, keepdim=True), (4, 6, 5), frozen="0.1"),
}
