"""Multi-head attention with a head count and an inner width of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import presented_integer, presented_tensor

__all__ = ["DynamicMultiheadAttention", "SlimMultiheadAttention", "see_through", "settle_"]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `nn.MultiheadAttention` from the sizes of the weights, `num_heads`, `head_dim` and `scale`.

    Arguments and results are those of `torch.nn.MultiheadAttention.forward`.
    """
    if query.is_nested:
        return _attend_nested(module, query, need_weights, average_attn_weights)
    batched = query.dim() == 3
    if batched and module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    elif not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q, k, v = _project(module, query, key, value)
    mask = _mask(query, key_padding_mask, attn_mask, is_causal, module.num_heads)
    q, k, v, mask = _with_extra_keys(module, q, k, v, mask)
    q, k, v = (t.unflatten(-1, (module.num_heads, module.head_dim)).permute(1, 2, 0, 3) for t in (q, k, v))
    dropout = module.dropout if module.dropout and module.training else 0.0
    weights = None
    if need_weights:
        scores = torch.matmul(q * module.scale, k.transpose(-2, -1))
        weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
        mixed = torch.matmul(weights, v)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=module.scale)
    output = module.out_proj(mixed.permute(2, 0, 1, 3).flatten(2))
    if not batched:
        return output.squeeze(1), weights
    return (output.transpose(0, 1) if module.batch_first else output), weights


def _attend_nested(module: Any, tokens: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
    """Attend within sequences of several lengths, which `nn.TransformerEncoder` makes of a padding mask in eval."""
    lengths = torch.tensor([len(sequence) for sequence in tokens.unbind()], device=tokens.device)
    padded = tokens.to_padded_tensor(0.0)
    padding = torch.arange(padded.shape[1], device=tokens.device) >= lengths[:, None]
    output, found = attend(module, padded, padded, padded, padding, need_weights, average_attn_weights=average)
    return torch._nested_tensor_from_mask(output, ~padding), found


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each `[tokens, batch, heads x head_dim]`."""
    bias = module.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _mask(
    query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool, heads: int
) -> Tensor | None:
    """Return what is added to the scores, broadcast against `[batch, heads, tokens, keys]`; None for nothing."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Got is_causal=True without attn_mask; torch's attention wants the mask beside the hint.")
    total = None
    if attn_mask is not None:
        total = _additive(attn_mask, query.dtype)
        total = total if total.dim() == 2 else total.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query.dtype)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _with_extra_keys(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Append the learned key and value, and the key of zeros, where the module has them."""
    extra = []
    if module.bias_k is not None:
        extra.append((module.bias_k.expand(1, k.shape[1], -1), module.bias_v.expand(1, v.shape[1], -1)))
    if module.add_zero_attn:
        extra.append((torch.zeros_like(k[:1]), torch.zeros_like(v[:1])))
    for more_k, more_v in extra:
        k, v = torch.cat([k, more_k]), torch.cat([v, more_v])
        mask = None if mask is None else F.pad(mask, (0, 1))
    return q, k, v, mask


class SlimMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads need not fill its embedding: what a pruned one becomes.

    Plain torch: the parameters have the names of `nn.MultiheadAttention`; `num_heads` and `head_dim` say what they hold
    (`in_proj_weight` is `[3 x num_heads x head_dim, embed_dim]`), and `scale` multiplies the scores.
    """

    scale: float

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Compute attention; arguments and results are those of `nn.MultiheadAttention`."""
        return attend(self, *args, **kwargs)

    @property
    def _qkv_same_embed_dim(self) -> bool:  # what torch's fused encoder layers ask before they go around forward
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value


class DynamicMultiheadAttention(DynamicOp, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that runs on its kept heads, head_dim and embedding.

    Uncut it is torch's own forward; cut, and when exported cut, that of `SlimMultiheadAttention`.
    """

    static_op = nn.MultiheadAttention
    in_proj_weight: Any = presented_tensor("in_proj_weight")
    in_proj_bias: Any = presented_tensor("in_proj_bias")
    q_proj_weight: Any = presented_tensor("q_proj_weight")
    k_proj_weight: Any = presented_tensor("k_proj_weight")
    v_proj_weight: Any = presented_tensor("v_proj_weight")
    embed_dim: Any = presented_integer("embed_dim")
    num_heads: Any = presented_integer("num_heads")
    head_dim: Any = presented_integer("head_dim")

    def _describe(self) -> None:
        self._add_axis("embed_dim", self.__dict__["embed_dim"])
        inner = self.__dict__["num_heads"] * self.__dict__["head_dim"]
        packed = self._parameters.get("in_proj_weight") is not None
        rows = ("in_proj",) * 3 if packed else ("q_proj", "k_proj", "v_proj")
        for name in dict.fromkeys(rows):
            self._add_axis(name, 3 * inner if packed else inner, follow=False)
        self._add_axes(in_proj_weight=("in_proj", "embed_dim"), q_proj_weight=("q_proj", "embed_dim"))
        self._add_axes(in_proj_bias=("in_proj",) if packed else (None,))
        self._add_axes(k_proj_weight=("k_proj", None), v_proj_weight=("v_proj", None))

    @property
    def scale(self) -> float:
        """The factor of the scores: that of the dense head_dim."""
        return 1.0 / math.sqrt(self.__dict__["head_dim"])

    @property
    def is_cut(self) -> bool:
        """Whether anything is cut."""
        return any(container.is_cut for container in self._dynamic.containers.values())

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return bool(self.__dict__["_qkv_same_embed_dim"]) and not self.is_cut

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute attention on what is kept."""
        return attend(self, *args, **kwargs) if self.is_cut else super().forward(*args, **kwargs)

    def to_static(self) -> nn.Module:
        """Become `nn.MultiheadAttention` again, or `SlimMultiheadAttention` where heads or widths went."""
        dense = int(self.__dict__["num_heads"]), int(self.__dict__["head_dim"])
        module = super().to_static()
        settle_(module, *dense)
        return module


def settle_(module: nn.Module, dense_heads: int, dense_head_dim: int) -> None:
    """Give an attention the class that its sizes ask for, in place.

    Args:
        module: An `nn.MultiheadAttention` or `SlimMultiheadAttention`; anything else is left alone.
        dense_heads: Heads of the dense module: torch's encoder gives nested tensors to one that had an even number,
            and torch's attention takes them with an even number only.
        dense_head_dim: Head_dim of the dense module: it settles the scale.
    """
    if type(module) not in (nn.MultiheadAttention, SlimMultiheadAttention):
        return
    fields = module.__dict__
    fills = fields["num_heads"] * fields["head_dim"] == fields["embed_dim"] and fields["head_dim"] == dense_head_dim
    fills &= fields["num_heads"] % 2 == 0 or dense_heads % 2 == 1
    module.__class__ = nn.MultiheadAttention if fills else SlimMultiheadAttention
    fields.pop("scale", None)
    if not fills:
        fields["scale"] = 1.0 / math.sqrt(dense_head_dim)


@contextmanager
def see_through(model: nn.Module) -> Iterator[None]:
    """Show every plain `nn.MultiheadAttention` as a slim one for a while: its heads then appear as axes in a trace."""
    swapped = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    try:
        for module in swapped:
            module.__dict__["scale"] = 1.0 / math.sqrt(module.head_dim)
            module.__class__ = SlimMultiheadAttention
        yield
    finally:
        for module in swapped:
            module.__class__ = nn.MultiheadAttention
            module.__dict__.pop("scale", None)
