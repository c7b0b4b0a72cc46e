"""Programs on channels of a convolution that slip through a weaker check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def beside_ones(self: Any, x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), self.width, *x.shape[2:])], 1)


def zeros_then_ones(self: Any, x: Tensor) -> Tensor:
    half = self.width // 2
    sizes = half, self.width - half
    return x + torch.cat([x.new_full((len(x), n, *x.shape[2:]), k) for k, n in enumerate(sizes)], 1)


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
    "beside ones": trap(beside_ones, WHOLE, read=21, width=5),
    "zeros, then ones": trap(zeros_then_ones, width=16),
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
