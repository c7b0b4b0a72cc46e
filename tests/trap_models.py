"""Models that slip through a weaker check: integers and attention that look like others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Any, Tensor], Tensor]


class CountsAlike(nn.Module):
    """Three integers are 8; only one of them is the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.heads = self.temperature = 8
        self.embed, self.out = nn.Linear(7, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unflatten(2, (self.heads, 4))
        for _ in range(self.steps):
            x = x * 1.1
        return self.out((x / self.temperature).flatten(2))


class CountsTwice(nn.Module):
    """One integer counts heads, and something of another layer that may not change."""

    def __init__(self, function: Callable[[int, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.number, self.function = 4, function
        self.embed, self.out, self.other = nn.Linear(7, 24), nn.Linear(24, 5), nn.Linear(7, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.out((self.embed(x).unflatten(2, (self.number, 6)) * 2).flatten(2))
        return y, self.function(self.number, self.other, x)


class Attention(nn.Module):
    """The scale of attention is what `score` makes of queries and keys."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], head_dim: int = 6, width: int = 5) -> None:
        super().__init__()
        self.heads, self.head_dim, self.attend = 4, head_dim, attend
        self.q, self.k, self.v = (nn.Linear(7, 4 * head_dim) for _ in "qkv")
        self.out = nn.Linear(4 * head_dim, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1])).to(q)).softmax(-1) @ v


class Inner(nn.Module):
    """As in BERT: heads and their size are integers beside the width of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.all_heads = 4, 6, 24
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in "qkv")

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = unscaled(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)))
        return x.transpose(1, 2).reshape(*x.shape[:1], -1, self.all_heads)


class Spread(nn.Module):
    """The layer that reads the values is in another module than the one that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, 24), nn.Linear(24, 5)
        self.attention = nn.ModuleDict({"inner": Inner(), "dense": nn.Linear(24, 24)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention["dense"](self.attention["inner"](x)))


class Calls(nn.Module):
    """A forward in one function, over layers that it names."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter | list[int]) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def raised_by_turns(self: nn.Module, x: Tensor) -> Tensor:
    x = self.a(x).clone()
    x[..., 1::2].add_(1.0)
    return self.b(x)


def raised_first(self: nn.Module, x: Tensor) -> Tensor:
    x = self.a(x).clone()
    x[..., :1] *= 2
    return self.b(x)


def turned_in_pairs(self: nn.Module, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) + x)


def linear_attention(self: nn.Module, x: Tensor) -> Tensor:
    q, k = nn.functional.elu(self.a(x)) + 1, nn.functional.elu(self.c(x)) + 1
    return self.b(q @ (k.mT @ x)) / (q @ k.sum(1)[..., None])


def cut_and_put_together(self: nn.Module, x: Tensor) -> Tensor:
    first, second, third = self.a(x).split(self.sizes, -1)
    return self.b(torch.cat([third, first, second], -1))


class LargestNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 12, max_norm=1.0), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))


class TokenNorm(nn.Module):
    """Batch statistics of each token, taken over the features too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(7, 12), nn.BatchNorm1d(9), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.embed(x)))


HEADS = "q_(0, 24)_out_3_in_1_heads"
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "three integers of one value": (CountsAlike, (2, 9, 7), {"embed_(0, 32)_out_1_in_1": 8}),
    **{
        f"heads and {what}": (lambda function=function: CountsTwice(function), (2, 9, 7), units)
        for what, (function, units) in {
            "groups of a norm": (lambda n, other, x: F.group_norm(other(x).mT, n), {}),
            "a padding": (lambda n, _, x: F.pad(x, (0, 0, n, 9 - n)), {}),
            "the start of tokens": (lambda n, _, x: x[:, n : n + 3], {}),
            "the start of channels": (lambda n, other, x: other(x)[..., n : n + 9], {}),
        }.items()
    },
    "attention scaled by its head_dim": (
        lambda: Attention(F.scaled_dot_product_attention),
        (2, 9, 7),
        {HEADS: 4, "q_(0, 24)_out_3_in_1_head_dim": 6},
    ),
    "attention scaled by a tensor": (
        lambda: Attention(scaled_by_a_tensor),
        (2, 9, 7),
        {HEADS: 4, "q_(0, 24)_out_3_in_1_head_dim": 6},
    ),
    "attention scaled by a tensor of one axis": (
        lambda: Attention(lambda q, k, v: (q @ k.mT * torch.tensor([q.shape[-1]]).rsqrt()).softmax(-1) @ v),
        (2, 9, 7),
        {HEADS: 4},
    ),
    # queries and values share one integer; what the first block teaches does not tell them apart in the others
    "attention of three sizes": (
        lambda: nn.Sequential(Attention(unscaled, 6, 7), Attention(unscaled, 3, 7), Attention(unscaled, 4)),
        (2, 9, 7),
        {
            "0.out_(0, 7)_out_1_in_3": 7,
            "1.out_(0, 7)_out_1_in_3": 7,
            **{f"{n}.q_(0, {4 * size})_out_3_in_1_heads": 4 for n, size in enumerate((6, 3, 4))},
            **{f"{n}.q_(0, {4 * size})_out_3_in_1_head_dim": size for n, size in enumerate((6, 3, 4))},
        },
    ),
    "attention over several modules": (
        Spread,
        (2, 9, 7),
        {
            "embed_(0, 24)_out_2_in_4": 24,
            "attention.inner.q_(0, 24)_out_3_in_1_heads": 4,
            "attention.inner.q_(0, 24)_out_3_in_1_head_dim": 6,
        },
    ),
    "a layer's own number": (
        lambda: Calls(lambda self, x: self.b(self.a(x) / self.a.out_features), a=nn.Linear(7, 8), b=nn.Linear(8, 5)),
        (2, 9, 7),
        {},
    ),
    "a grid of channels with themselves": (
        lambda: Calls(
            lambda self, x: self.b((self.a(x)[..., None] * self.a(x)[..., None, :]).flatten(-2)),
            a=nn.Linear(7, 6),
            b=nn.Linear(36, 5),
        ),
        (2, 9, 7),
        {},
    ),
    "positions for longer inputs": (
        lambda: Calls(
            lambda self, x: self.b(self.a(x) + self.places[: x.shape[1]]),
            a=nn.Linear(7, 24),
            b=nn.Linear(24, 5),
            places=nn.Parameter(torch.randn(9, 24)),
        ),
        (2, 5, 7),
        {"places_(0, 24)_out_2_in_2": 24},
    ),
    "every second channel": (
        lambda: Calls(raised_by_turns, a=nn.Linear(7, 8), b=nn.Linear(8, 5)),
        (2, 9, 7),
        {"a_(0, 8)_out_1_in_1": 4},
    ),
    "rotary pairs": (
        lambda: Calls(turned_in_pairs, a=nn.Linear(7, 8), b=nn.Linear(8, 5)),
        (2, 9, 7),
        {"a_(0, 8)_out_1_in_1": 4},
    ),
    "linear attention": (
        lambda: Calls(linear_attention, a=nn.Linear(7, 6), c=nn.Linear(7, 6), b=nn.Linear(7, 5)),
        (2, 9, 7),
        {"a_(0, 6)_out_2_in_0": 6},
    ),
    # a part that could vanish keeps its first channel: the model would be left with nothing there
    "parts in another order": (
        lambda: Calls(cut_and_put_together, a=nn.Linear(7, 24), b=nn.Linear(24, 5), sizes=[6, 8, 10]),
        (2, 9, 7),
        {"a_(1, 24)_out_1_in_1": 21},
    ),
    "one channel of its own": (
        lambda: Calls(raised_first, a=nn.Linear(7, 6), b=nn.Linear(6, 5)),
        (2, 9, 7),
        {"a_(1, 6)_out_1_in_1": 5},
    ),
    "embedding of a largest norm": (LargestNorm, (2, 9), {}),
    "statistics over features": (TokenNorm, (2, 9, 7), {"embed_(0, 12)_out_1_in_1": 12}),
}
