"""Attention in one op."""

from __future__ import annotations

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import FIXED, Axis, is_labelled
from lightning_prune.graph.rules.contraction import broadcast, contract, mark_attention
from lightning_prune.graph.rules.indexing import freeze_all
from lightning_prune.graph.rules.movement import reshape_axes
from lightning_prune.graph.rules.table import rule

Sized = list[tuple[int, Axis]]


@rule(
    """
    scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable
    """
)
def attention(call: Call) -> None:
    """`softmax(q k^T * scale + mask) v`; without `scale` it derives from the live head_dim."""
    q, k, v = call["query"], call["key"], call["value"]
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    head_dim = contract(call, q, -1, k, -1)
    if call.name.startswith("aten::_"):  # fused kernels know one head_dim
        call.bind(head_dim, call.axes(v)[-1])
    if call["scale"] is None and is_labelled(head_dim):
        call.space.mark("rescaled", head_dim)
    batch_q, batch_k, batch_v = (call.sized(t, *range(t.dim() - 2)) if t.dim() > 2 else [] for t in (q, k, v))
    if call["enable_gqa"]:
        batch_k, batch_v = (_shared(call, batch_q, batch) for batch in (batch_k, batch_v))
    batch = broadcast(call, [batch_q, batch_k, batch_v])
    tokens = [call.sized(q, -2)[0], call.sized(k, -2)[0]]
    call.bind(tokens[1][1], call.axes(v)[-2])
    if mask is not None:
        broadcast(call, [[*batch, *tokens], call.sized(mask)])
    for _, axis in tokens:
        call.freeze(axis, "softmax over channels")
    inner, outer = (q.shape[-1], head_dim), call.sized(v, -1)[0]
    mark_attention(call, [axis for _, axis in batch], [head_dim, outer[1]])
    call.count(*batch, *tokens, inner)
    call.count(*batch, *tokens, outer)
    first, *others = call.outputs
    call.put(first, [*(axis for _, axis in batch), tokens[0][1], outer[1]])
    for out in others:  # sums of exponentials for the backward pass
        like = out.shape[: len(batch)] == first.shape[: len(batch)] and out.dim() == len(batch) + 1
        call.put(out, [*(axis for _, axis in batch), FIXED] if like else [FIXED] * out.dim())


def _shared(call: Call, queries: Sized, batch: Sized) -> Sized:
    """Bind key-value heads to the runs of query heads that share them; return the batch axes of the queries."""
    (many, heads), (few, own) = queries[-1], batch[-1]
    if many == few:
        return batch
    if few == 1:  # one for all, however many these are
        return queries
    owner, each = reshape_axes(call, [many], [heads], [few, many // few])
    call.freeze(each, "query heads of one key-value head")
    call.bind(owner, own)
    return [*batch[:-1], queries[-1]]


@rule("higher_order::flex_attention")
def flex_attention(call: Call) -> None:
    """Attention whose scores a function of batch, head and positions changes: these stay, and head_dim may go."""
    q, k, v = call["query"], call["key"], call["value"]
    for tensor in (q, k, v):
        for d in range(3):
            call.hold(tensor, d, "scores are a function of their place")
    for tensor in call["others"]:
        freeze_all(call, tensor, "read by a function of scores")
    head_dim, outer = contract(call, q, -1, k, -1), call.axes(v)[-1]
    mark_attention(call, [], [head_dim, outer])
    places = [*call.sized(q, 0, 1, 2), call.sized(k, 2)[0]]
    call.count(*places, (q.shape[-1], head_dim))
    call.count(*places, (v.shape[-1], outer))
    first, *sums = call.outputs
    call.put(first, [FIXED, FIXED, FIXED, outer])
    for out in sums:
        call.put(out, [FIXED] * out.dim())
