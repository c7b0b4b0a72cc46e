"""The network that a pruned one would be had it been built narrow by hand: constructed anew, with the same weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN = (bool, int, float, str, tuple, list, torch.Size)
RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")


class Attention(nn.Module):
    """Self-attention as one writes it where `nn.MultiheadAttention` cannot have such sizes; parameters have its names.

    Args:
        like: Has `embed_dim`, `num_heads`, `head_dim`, `scale` and `batch_first`.
    """

    def __init__(self, like: Any) -> None:
        super().__init__()
        inner = like.num_heads * like.head_dim
        self.heads, self.scale, self.batch_first = like.num_heads, like.scale, like.batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, like.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner))
        self.out_proj = nn.Linear(inner, like.out_proj.out_features)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """Return what `[batch, tokens, embed_dim]` attends to in itself."""
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = self.out_proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


def build_narrow(dense: nn.Module, small: nn.Module) -> nn.Module:
    """Return a network of fresh layers in the sizes of a pruned one, with copies of its weights, in eval mode.

    Every layer of torch is made by its constructor. Modules of other classes are those of `dense`, made by theirs;
    numbers that differ are set, as one would who writes the class for these sizes. Nothing else is taken from `small`.

    Args:
        dense: Made by its constructor alone; it is changed.
        small: Made of the same network by `export_pruned`.
    """
    narrow = _narrowed(dense, small, {})
    narrow.load_state_dict(small.state_dict())
    return narrow.eval()


def _narrowed(dense: nn.Module, small: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return the narrow form of one module; shared modules stay shared."""
    if id(small) not in done:
        made = _constructed(small)
        done[id(small)] = made or _resized_(dense, small)
        if made is None:
            for name, child in small.named_children():
                setattr(dense, name, _narrowed(dense.get_submodule(name), child, done))
    return done[id(small)]


def _constructed(layer: nn.Module) -> nn.Module | None:
    """Return a layer of torch from its constructor; None for another one, and for one without tensors of its own."""
    if isinstance(layer, nn.MultiheadAttention) and type(layer) is not nn.MultiheadAttention:
        return Attention(layer)
    if not type(layer).__module__.startswith("torch.nn.modules") or not (layer._parameters or layer._buffers):
        return None
    names = list(inspect.signature(type(layer).__init__).parameters)[1:]
    if isinstance(layer, nn.RNNBase):
        names = [*RECURRENT, *(("proj_size",) if isinstance(layer, nn.LSTM) else ())]
        names += ["nonlinearity"] if isinstance(layer, nn.RNN) else []
    given = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    return type(layer)(**given | ({"bias": _has_bias(layer)} if "bias" in names else {}))


def _has_bias(layer: nn.Module) -> bool:
    held = getattr(layer, "in_proj_bias", getattr(layer, "bias", None))
    return held if isinstance(held, bool) else held is not None


def _resized_(dense: nn.Module, small: nn.Module) -> nn.Module:
    """Give a module the sizes of another one of its class: its own tensors anew, and its numbers."""
    for name, parameter in small._parameters.items():
        if isinstance(parameter, Tensor):
            dense._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
    for name, buffer in small._buffers.items():
        if isinstance(buffer, Tensor):
            dense._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype).copy_(buffer)
    for name, value in small.__dict__.items():
        if isinstance(value, PLAIN) and name in dense.__dict__ and name != "training":
            dense.__dict__[name] = value
    return dense
