"""Programs that slip through a weaker check: each is refused, or computes what the zero-masked model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, double, full, macs_of, outputs, scattered, zeroed_outputs
from tests.zoo_models import pooled_head

Function = Callable[[Any, Tensor], Tensor]


class Body(nn.Module):
    """A convolution makes `channels`; a function, given the module for what it keeps, turns them into `read`."""

    def __init__(self, function: Function, channels: int, read: int, keeps: dict[str, Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.out = nn.Conv2d(read, 7, 1)
        self.head = pooled_head(7)
        self.function = function
        for name, value in keeps.items():
            setattr(self, name, value(self) if callable(value) else value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.out(self.function(self, self.stem(x)))))


@dataclass(frozen=True)
class Trap:
    function: Function
    channels: int
    read: int
    units: dict[str, int]
    keeps: dict[str, Any]

    def make(self) -> nn.Module:
        return Body(self.function, self.channels, self.read, self.keeps).double()


def trap(function: Function, units: Any = (), *, channels: int = 16, read: int = 0, **keeps: Any) -> Trap:
    """Return a trap; `units` beside that of `out`: (start, channels) of the stem's own, or names and sizes."""
    if not isinstance(units, dict):
        units = {f"stem_({units[0]}, {channels})_out_1_in_1": units[1]} if units else {}
    return Trap(function, channels, read or channels, units, keeps)


def zeroed_in_place(_: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] = 0
    return x


def temporal_shift(_: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :4] = x[:, 4:8]
    y[:, 4:] = x[:, 4:]
    return y


def rolled_half(_: Any, x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    return torch.cat([right, left.roll(1, 1)], 1)


def reads_of_qkv(self: Any, y: Tensor) -> Tensor:
    n = self.n
    return y[:, :n] + y[:, 16 : 16 + n] * y[:, -n:]


def shuffled(_: Any, x: Tensor) -> Tensor:
    return x.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2)


def rotated(_: Any, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x * 0.3 + torch.cat([-x[:, half:], x[:, :half]], 1) * 0.5


def parent_reads(self: Any, x: Tensor) -> Tensor:
    return F.linear(x.movedim(1, -1), self.proj.weight, self.proj.bias).movedim(-1, 1)


def bias_apart(self: Any, x: Tensor) -> Tensor:
    made = F.linear(x.movedim(1, -1), self.proj.weight).movedim(-1, 1)
    return torch.cat([F.relu(made), self.other(x) + self.proj.bias.view(1, -1, 1, 1)], 1)


def halves_of_a_weight(self: Any, x: Tensor) -> Tensor:
    w = self.proj.weight
    return torch.cat([F.conv2d(x, w[:8]), F.conv2d(x, w[8:]) * 2], 1)


def blurred(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.kernel.expand(x.shape[1], 1, 3, 3).to(x), padding=1, groups=x.shape[1])


def sum_of_ones(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[1]).to(x)
    return torch.einsum("i,i->", ones, ones)


def marked(*lines: str) -> Function:
    """Return a product with a vector of zeros `m`, as long as there are channels, that the lines write to."""

    def call(_: Any, x: Tensor) -> Tensor:
        names = {"m": x.new_zeros(x.shape[1]), "x": x, "torch": torch}
        for line in lines:
            exec(line, names)
        return x * (names["m"] + 1).view(1, -1, 1, 1)  # type: ignore[union-attr]  # a tensor

    return call


def positions(_: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(8, x.shape[1])
    table[:, 0::2] = torch.arange(8.0).to(x).sin()[:, None]
    return x + table.T[None, :, :, None]


def share_of_ones(_: Any, x: Tensor) -> Tensor:
    ones = x.new_zeros(x.shape[1])
    ones[:4] = 1
    return x * ones.mean()


def shifted_rows(_: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, :, 1:] = x[:, :, :-1]
    return y


def filled(_: Any, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    y.copy_(x)
    return y + y.view(-1).view(x.shape)


def mixed(_: Any, x: Tensor) -> Tensor:
    weights = x.new_zeros(x.shape[1], x.shape[1])
    weights.fill_diagonal_(1.0)
    return torch.einsum("bchw,cd->bdhw", x, weights)


WHOLE = (0, 16)
TRAPS = {
    # what is done to one part is not done to another
    "parts scaled apart": trap(lambda _, x: torch.cat([x[:, :8] * 2, x[:, 8:] * 3], 1), (8, 8)),
    "zeroed in place": trap(zeroed_in_place, (4, 12)),
    "shift by slices": trap(lambda _, x: torch.cat([x[:, 4:], x[:, :4]], 1), (4, 12)),
    "temporal shift": trap(temporal_shift, (8, 8)),
    "half of it rolled": trap(rolled_half, {"stem_(0, 15)_out_1_in_1": 7}),
    "reads at numbers that agree with a size": trap(reads_of_qkv, channels=48, read=16, n=16),
    "all but the first of three": trap(lambda _, x: x[:, 1:], (1, 2), channels=3, read=2),
    "all but the first of seven": trap(
        lambda _, x: F.glu(x, 1)[:, 1:], {"stem_(1, 14)_out_1_in_1": 6}, channels=14, read=6
    ),
    "a mask by position": trap(lambda _, x: torch.where((torch.arange(16) < 4).view(1, -1, 1, 1), x * 2, x)),
    "taken by a permutation": trap(lambda self, x: x[:, self.order], order=lambda _: torch.randperm(16)),
    # constants that are overwritten in part
    "ones in a part": trap(marked("m[:4] = 1")),
    "ones in a part of a view": trap(marked("m = x.new_zeros(x.shape[1], 2)", "m.view(-1)[:5] = 1", "m = m[:, 0]")),
    "ones through an earlier view": trap(marked("v = m.view(1, -1)", "m[:4] = 1", "m = v[0]")),
    "ones through a detached one": trap(marked("m.detach()[:4] = 1")),
    "ones at every second": trap(marked("m[::2] += 1")),
    "positions added in place": trap(marked("m.add_(torch.arange(16).to(x))")),
    "positions copied": trap(marked("m.copy_(torch.arange(16))")),
    "a product written into a part": trap(marked("torch.mul(m[:4] + 1, 2, out=m[:4])")),
    "ones at an index": trap(marked("m[torch.tensor([1, 5])] = 1")),
    "one of a slice": trap(marked("m[3:4][0] = 7")),
    "one of all": trap(marked("m.unbind(0)[3].fill_(2)")),
    "the second half": trap(marked("m.split(8)[1].add_(1)")),
    "ones in a part of a stack": trap(marked("s = torch.stack([m, m])", "s.select(0, 0)[2:5] = 1", "m = s.sum(0)")),
    "ones in a part, copied": trap(marked("m[:4] = 1", "m = m.clone() * 2")),
    "the median of a part": trap(marked("m[:4] = 1", "m = m.median().expand(x.shape[1])")),
    "a sinusoid written by columns": trap(positions),
    "the share of ones": trap(share_of_ones),
    "a diagonal filled": trap(mixed),
    "rows shifted": trap(shifted_rows, WHOLE),
    "copied whole": trap(filled, WHOLE),
    "bytes as integers": trap(lambda _, x: x.view(torch.int64).view(torch.float64) * 1, WHOLE),
    "bytes as halves": trap(
        lambda _, x: x.movedim(1, -1).contiguous().view(torch.float32).view(torch.float64).movedim(-1, 1)
    ),
    # what holds for pairs
    "even and odd": trap(lambda _, x: x[:, ::2] * x[:, 1::2], (0, 8), read=8),
    "rotated by half": trap(rotated, (0, 8)),
    "gated by half": trap(lambda _, x: F.glu(x, 1), (0, 8), read=8),
    "largest of neighbours": trap(lambda _, x: x.unflatten(1, (-1, 2)).amax(2), (0, 8), read=8),
    "flipped": trap(lambda _, x: x.flip(1) + x, (0, 8)),
    "shuffled by views": trap(shuffled, (0, 8), channels=24),
    "shuffled": trap(lambda _, x: F.channel_shuffle(x, 3), (0, 8), channels=24),
    "pixels": trap(lambda _, x: F.pixel_shuffle(x, 2), (0, 4), read=4),
    # what depends on the number of channels
    "an odd number": trap(lambda _, x: x * 2 if x.shape[1] % 16 else x),
    "divided by the number": trap(lambda _, x: x / x.shape[1]),
    "divided by a tensor of the number": trap(lambda _, x: x / torch.tensor(float(x.shape[1])).to(x)),
    "divided by a new tensor of the number": trap(lambda _, x: x / x.new_tensor(x.shape[1])),
    "sinusoid of positions": trap(lambda _, x: x + torch.arange(x.shape[1]).to(x).sin().view(1, -1, 1, 1)),
    "last position": trap(lambda _, x: x * torch.arange(x.shape[1])[-1]),
    "count of ones": trap(lambda _, x: x * torch.ones(x.shape[1]).count_nonzero()),
    "norm of ones": trap(lambda _, x: x * torch.linalg.norm(torch.ones(x.shape[1]))),
    "product of ones": trap(lambda _, x: x * sum_of_ones(x)),
    "where ones are": trap(lambda _, x: x * torch.where(torch.ones(x.shape[1]))[0].sum()),
    **{
        f"{name} of ones": trap(
            lambda _, x, call=call: x * call(torch.ones(x.shape[1]).to(x), torch.zeros(x.shape[1]).long()).sum()
        )
        for name, call in {
            "a place": lambda ones, _: torch.searchsorted(ones, torch.tensor([2.0]).to(ones)),
            "a bucket": lambda ones, _: torch.bucketize(torch.tensor(2.0).to(ones), ones),
            "a scatter": lambda ones, zeros: torch.zeros(2).to(ones).scatter_add_(0, zeros, ones),
            "a sum by index": lambda ones, zeros: torch.zeros(2).to(ones).index_add_(0, zeros, ones),
            "a sum put": lambda ones, zeros: torch.zeros(2).to(ones).index_put_((zeros,), ones, True),
            "bins": lambda _, zeros: torch.bincount(zeros, minlength=2),
            "a histogram": lambda ones, _: torch.histc(ones.float(), 3),
            "a convolution": lambda ones, _: F.conv1d(ones[None, :, None], ones[None, :, None]),
            "a largest norm": lambda ones, _: torch.renorm(ones[None], 2, 0, 1.0)[0, 0],
            "counts": lambda ones, _: torch.unique(ones, return_counts=True)[1],
            "a loss": lambda ones, zeros: F.nll_loss(ones[:, None].expand(-1, 3), zeros, reduction="sum"),
        }.items()
    },
    "rows of sixteen": trap(lambda _, x: (x.movedim(1, -1).reshape(-1, 16) * 2).view(2, 8, 8, 16).movedim(-1, 1)),
    "four groups by a number": trap(lambda _, x: x.unflatten(1, (4, -1)).flatten(1, 2), (0, 4)),
    "two splittings of one axis": trap(
        lambda _, x: x.unflatten(1, (4, -1)).flatten(1, 2) * x.unflatten(1, (-1, 2)).flatten(1, 2), (0, 3), channels=24
    ),
    # one channel left
    "squeezed": trap(lambda _, x: x.mean((2, 3)).squeeze()[:, :, None, None], WHOLE),
    "one that would broadcast": trap(lambda self, x: x * self.gate(x.mean((2, 3)))[:, :, None, None], {
        "stem_(0, 16)_out_2_in_2": 16,
    }, gate=lambda _: nn.Linear(16, 16)),
    # weights that the layer does not hand out itself
    "a weight in a list": trap(
        lambda self, x: x * self.listed[0],
        first=lambda _: nn.Parameter(torch.rand(16, 1, 1)), listed=lambda self: [self.first],
    ),
    "a constant in a list": trap(lambda self, x: x * self.listed[0], listed=[torch.rand(16, 1, 1).double()]),
    "the parent reads the weight": trap(
        parent_reads, {"stem_(0, 16)_out_1_in_1": 16, "proj_(0, 16)_out_1_in_1": 16}, proj=lambda _: nn.Linear(16, 16)
    ),
    "a bias read apart from its weight": trap(
        bias_apart, {"stem_(0, 16)_out_1_in_2": 16, "proj_(0, 12)_out_2_in_1": 12},
        read=24, proj=lambda _: nn.Linear(16, 12), other=lambda _: nn.Conv2d(16, 12, 1),
    ),
    "halves of a weight": trap(
        halves_of_a_weight, {"stem_(0, 16)_out_1_in_1": 16, "proj_(8, 16)_out_1_in_1": 8},
        proj=lambda _: nn.Conv2d(16, 16, 1),
    ),
    "a kernel as large as its input": trap(blurred, WHOLE, kernel=lambda _: torch.rand(3, 3)),
    # all channels together
    "softmax": trap(lambda _, x: x.softmax(1)),
    "the four largest": trap(lambda _, x: x.topk(4, 1).values, read=4),
    "local response": trap(lambda _, x: F.local_response_norm(x, 3)),
    "pooled channels": trap(lambda _, x: F.max_pool1d(x.flatten(2).mT, 2).mT.unflatten(2, (8, 8)), read=8),
    "convolved channels": trap(
        lambda self, x: x * self.across(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid(),
        across=lambda _: nn.Conv1d(1, 1, 3, padding=1),
    ),
    "spectrum": trap(lambda _, x: torch.fft.fft(x, dim=1).real),
    "centred": trap(lambda _, x: x - x.mean(1, keepdim=True), WHOLE),
    "unit length": trap(lambda _, x: F.normalize(x, dim=1), WHOLE),
    # recurrent
    "cell": trap(
        lambda self, x: self.cell(x.mean((2, 3)))[:, :, None, None],
        {"stem_(0, 16)_out_1_in_1": 16, "cell_(0, 30)_out_1_in_2": 10}, read=10, cell=lambda _: nn.GRUCell(16, 10),
    ),
    "a cell over ones": trap(
        lambda _, x: x * torch.gru_cell(x.new_ones(1, x.shape[1]), x.new_zeros(1, 1), x.new_ones(3, x.shape[1]) / 50,
                                        x.new_ones(3, 1)).view(1, 1, 1, 1),
    ),
    "sequence": trap(
        lambda self, x: self.lstm(x.flatten(2).mT)[0].mT.unflatten(2, (8, 8)),
        {"stem_(0, 16)_out_1_in_1": 16, "lstm_(0, 40)_out_1_in_2": 10}, read=10,
        lstm=lambda _: nn.LSTM(16, 10, batch_first=True),
    ),
}  # fmt: skip


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
            "the start of channels": (lambda n, other, x: other(x)[..., n : n + 9], {"other_(13, 24)_out_1_in_0": 11}),
        }.items()
    },
    "attention scaled by its head_dim": (
        lambda: Attention(F.scaled_dot_product_attention),
        (2, 9, 7),
        {HEADS: 4, "q_(0, 24)_out_3_in_1_head_dim": 6},
    ),
    "attention scaled by a tensor": (lambda: Attention(scaled_by_a_tensor), (2, 9, 7), {HEADS: 4}),
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


def prepare(model: nn.Module, inputs: tuple[Tensor, ...]) -> ChannelMutator:
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    return mutator


def structures(mutator: ChannelMutator) -> list[KeepPlan]:
    """Return plans for all units at once, and for each with one channel left."""
    everything = full(mutator.units).kept
    alone = [KeepPlan({**everything, unit.name: (1,)}) for unit in mutator.units]
    return [scattered(mutator.units), scattered(mutator.units, seed=1), *alone]


def assert_sound(mutator: ChannelMutator, inputs: tuple[Tensor, ...]) -> int:
    """Assert that every accepted structure computes what it must; return how many were refused."""
    model, refused, sizes = mutator.model, 0, {unit.name: unit.num_channels for unit in mutator.units}
    rescaled = {unit.name for unit in mutator.graph.units if unit.renormalizing or unit.rescaling}
    for plan in structures(mutator):
        try:
            mutator.apply(plan)
        except TraceError:
            refused += 1
            continue
        small = export_pruned(model)
        cut = {name for name, kept in plan.kept.items() if len(kept) < sizes[name]}
        for train in (False, True):
            found = outputs(model, inputs, train=train)
            torch.testing.assert_close(found, outputs(small, inputs, train=train), rtol=0, atol=1e-12)
            if not cut & rescaled:
                zeroed = zeroed_outputs(model, inputs, train=train)
                torch.testing.assert_close(found, zeroed, rtol=0, atol=1e-10)
        assert macs_of(small, inputs) == mutator.cost().macs
        assert sum(p.numel() for p in small.parameters()) == mutator.cost().params
    return refused


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_refused_or_computes_what_the_zero_masked_model_does(name: str) -> None:
    inputs = (torch.randn(2, 3, 8, 8).double(),)
    mutator = prepare(TRAPS[name].make(), inputs)
    expected = {**TRAPS[name].units, "out_(0, 7)_out_1_in_1": 7}
    assert {unit.name: unit.num_channels for unit in mutator.units} == expected
    assert assert_sound(mutator, inputs) == (1 if name == "squeezed" else 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_or_computes_what_the_zero_masked_model_does(name: str) -> None:
    build, shape, units = MODELS[name]
    inputs = double((torch.randint(11, shape) if len(shape) == 2 else torch.randn(shape),))
    mutator = prepare(build().double(), inputs)
    assert {unit.name: unit.num_channels for unit in mutator.units} == units
    assert assert_sound(mutator, inputs) == 0


@pytest.mark.parametrize("kind", [int, np.int64], ids=["int", "NumPy"])
def test_only_the_integer_that_counts_heads_follows(kind: type) -> None:
    model = CountsAlike()
    model.heads = kind(model.heads)
    mutator = prepare(model, (torch.randn(2, 9, 7),))
    own = [f for f in mutator.graph.followers if not f.module]
    assert [(f.attribute, f.element) for f in own] == [("heads", None)]
    mutator.apply(KeepPlan({"embed_(0, 32)_out_1_in_1": (1, 4, 6)}))
    assert (mutator.model.heads, mutator.model.steps, mutator.model.temperature) == (3, 8, 8)


def test_a_refused_plan_leaves_the_model_as_it_was() -> None:
    inputs = (torch.randn(2, 3, 8, 8).double(),)
    mutator = prepare(TRAPS["squeezed"].make(), inputs)
    mutator.apply(scattered(mutator.units))
    plan, expected = mutator.current_plan(), outputs(mutator.model, inputs)
    with pytest.raises(TraceError, match=r"`squeeze`: 1 axes instead of 2\. The model is unchanged"):
        mutator.apply(KeepPlan({"stem_(0, 16)_out_1_in_1": (3,)}))
    assert mutator.current_plan() == plan
    assert_same(outputs(mutator.model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        pytest.param("parts scaled apart", "stem.weight", "a slice by constant numbers in Body", id="slice"),
        pytest.param("softmax", "stem.weight", "softmax over channels in `softmax` of Body", id="softmax"),
        pytest.param("taken by a permutation", "stem.weight", "taken by index in `index` of Body", id="index"),
        pytest.param("a weight in a list", "first", "reached around the module that owns it", id="list"),
        pytest.param("shift by slices", "head.linear.weight", "model output", id="output"),
        pytest.param("half of it rolled", "stem.weight", "rolled by a constant number in `roll` of Body", id="roll"),
        pytest.param(
            "divided by the number", "stem.weight", "where the dense model takes ('other', 16) in Body", id="scalar"
        ),
    ],
)
def test_a_frozen_axis_says_why(name: str, tensor: str, reason: str) -> None:
    mutator = prepare(TRAPS[name].make(), (torch.randn(2, 3, 8, 8).double(),))
    assert reason in {f.tensor: f.reason for f in reversed(mutator.graph.frozen)}[tensor]
