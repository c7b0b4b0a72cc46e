"""Kinds of attention in the zoo: grouped queries, rotary positions, einsum, windows, torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_attention import DIM, AttentionModel

HEADS, SHARED, HEAD_DIM = 6, 2, 8


class GroupedQueries(nn.Module):
    """6 query heads share 2 key-value heads, which are repeated by `expand`, as in Llama, or by torch."""

    def __init__(self, by_torch: bool) -> None:
        super().__init__()
        self.by_torch, self.head_dim, self.repeats = by_torch, HEAD_DIM, HEADS // SHARED
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.k, self.v = (nn.Linear(DIM, SHARED * HEAD_DIM, bias=False) for _ in "kv")
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.by_torch:
            y = F.scaled_dot_product_attention(q, k, v, scale=HEAD_DIM**-0.5, enable_gqa=True)
        else:
            k, v = self.repeated(k), self.repeated(v)
            y = (q @ k.mT * HEAD_DIM**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, tokens, head_dim = x.shape
        x = x[:, :, None].expand(batch, heads, self.repeats, tokens, head_dim)
        return x.reshape(batch, heads * self.repeats, tokens, head_dim)


class Rotary(nn.Module):
    """Queries and keys are rotated by their positions: halves against halves, or as complex numbers."""

    def __init__(self, as_complex: bool) -> None:
        super().__init__()
        self.as_complex, self.num_heads = as_complex, 4
        self.q, self.k, self.v = (nn.Linear(DIM, 4 * HEAD_DIM) for _ in "qkv")
        self.out = nn.Linear(4 * HEAD_DIM, DIM)
        speeds = 10.0 ** -torch.arange(0, 1, 2 / HEAD_DIM)
        turns = torch.outer(torch.arange(16.0), speeds)
        self.register_buffer("speeds", None if as_complex else speeds)
        self.register_buffer("turns", torch.polar(torch.ones_like(turns), turns) if as_complex else None)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        rotate = self.rotated_numbers if self.as_complex else self.rotated_halves
        weights = (rotate(q) @ rotate(k).mT * HEAD_DIM**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def rotated_halves(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).to(x)[:, None] * self.speeds
        angles = torch.cat([angles, angles], -1)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def rotated_numbers(self, x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * self.turns[: x.shape[-2]]).flatten(-2)


class EinsumAttention(nn.Module):
    """Raw weights `[dim, heads, head_dim]`, every product an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(DIM, 4, 6) / 5) for _ in "qkv")
        self.out = nn.Parameter(torch.randn(4, 6, DIM) / 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w) for w in (self.q, self.k, self.v))
        weights = (torch.einsum("bthk,bshk->bhts", q, k) * 6**-0.5).softmax(-1)
        return torch.einsum("bthk,hkd->btd", torch.einsum("bhts,bshk->bthk", weights, v), self.out)


class WindowAttention(nn.Module):
    """Attention inside windows of 4 tokens, shifted by 2; a table has a bias for each distance and head."""

    def __init__(self, shift: int = 2) -> None:
        super().__init__()
        self.window, self.shift, self.num_heads = 4, shift, 3
        self.qkv, self.out = nn.Linear(DIM, 3 * 3 * 6), nn.Linear(3 * 6, DIM)
        self.table = nn.Parameter(torch.randn(2 * 4 - 1, 3))
        places = torch.arange(4)
        self.register_buffer("distances", places[:, None] - places + 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x.roll(-self.shift, 1).reshape(-1, self.window, x.shape[2])
        q, k, v = self.qkv(x).reshape(len(x), self.window, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.distances.flatten()].view(self.window, self.window, -1).permute(2, 0, 1)
        weights = (q * 6**-0.5 @ k.mT + bias[None]).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(len(x), self.window, -1))
        return y.reshape(batch, tokens, -1).roll(self.shift, 1)


class MultiScaleAttention(nn.Module):
    """Linear attention over the heads of an image and of its neighbourhoods, as in EfficientViT.

    The neighbourhoods of each part of each head are a group of a convolution; both images' heads are concatenated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.qkv = nn.Conv2d(8, 36, 1, bias=False)  # three heads of three parts
        self.near = nn.Conv2d(36, 36, 3, padding=1, groups=36, bias=False)
        self.mixed = nn.Conv2d(36, 36, 1, groups=9, bias=False)
        self.out = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        qkv = self.qkv(x)
        both = torch.cat([qkv, self.mixed(self.near(qkv))], 1).reshape(len(x), -1, 3 * self.head_dim, x[0, 0].numel())
        q, k, v = both.mT.chunk(3, -1)
        y = q.relu() @ (k.relu().mT @ v)
        return self.head(x + self.out(y.mT.reshape(len(x), -1, *x.shape[2:])))


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`, tokens first and dense in memory: else torch takes another kernel without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).contiguous()
        y: Tensor = self.inner(x, x, x, need_weights=False)[0].transpose(0, 1)
        return y


def grouped_queries() -> nn.Module:
    return AttentionModel(GroupedQueries(by_torch=False))


def grouped_by_torch() -> nn.Module:
    return AttentionModel(GroupedQueries(by_torch=True))


def rotary() -> nn.Module:
    return AttentionModel(Rotary(as_complex=False))


def rotary_complex() -> nn.Module:
    return AttentionModel(Rotary(as_complex=True))


def einsum() -> nn.Module:
    return AttentionModel(EinsumAttention())


def windows() -> nn.Module:
    return AttentionModel(WindowAttention())


def multi_scale() -> nn.Module:
    return MultiScaleAttention()


def multihead() -> nn.Module:
    return AttentionModel(TorchAttention())
