"""Mixtures of experts: tokens that are sent by values, experts in lists or in one tensor, what is certified then."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, outputs, scattered, zeroed_outputs

WIDTH, INNER, EXPERTS = 24, 20, 3


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu())


class Sent(nn.Module):
    """Finds the tokens of each expert, and adds what it makes of them to their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out, sent = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for k in sent.sum((1, 2)).nonzero():
            rank, token = torch.where(sent[k[0]])
            made = self.experts[int(k)](x[token]) * weights[token, rank, None]
            out.index_add_(0, token, made)
        return out


class Grouped(nn.Module):
    """Sorts tokens by expert, and multiplies all groups in one op."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 5)
        self.leave = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 5)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort()
        counts = torch.histc(chosen.flatten().float(), EXPERTS, 0, EXPERTS - 1)
        bounds = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[order // 2], self.enter.mT, offs=bounds).chunk(2, -1)
        made = F.grouped_mm(gate.sigmoid() * up, self.leave.mT, offs=bounds) * weights.flatten()[order, None]
        return made[order.argsort()].view(len(x), 2, -1).sum(1)


class Mixture(nn.Module):
    """Sends each token to two of three experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 4)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y: Tensor = self.head(x + self.experts(x, weights, chosen))
        return y


def prepared(model: nn.Module, x: Tensor) -> ChannelMutator:
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model.eval())
    return mutator


def test_experts_in_a_list_and_the_width_around_them_are_cut() -> None:
    torch.manual_seed(0)
    model, x = Mixture(Sent()).double(), torch.randn(9, 5).double()
    mutator = prepared(model, x)
    assert sorted(unit.num_channels for unit in mutator.units) == [INNER] * EXPERTS + [WIDTH]
    for seed in range(3):
        mutator.apply(scattered(mutator.units, seed=seed))
        small, other = export_pruned(model), torch.randn(7, 5).double()
        torch.testing.assert_close(outputs(model, (other,)), zeroed_outputs(model, (other,)), rtol=1e-12, atol=1e-12)
        for train in (False, True):
            assert_same(outputs(small, (other,), train=train), outputs(model, (other,), train=train))


def test_grouped_experts_keep_widths_that_their_kernel_takes() -> None:
    torch.manual_seed(0)
    model, x = Mixture(Grouped()), torch.randn(9, 5)
    mutator = prepared(model, x)
    assert mutator.graph.unknown == {}
    assert [(unit.num_channels, unit.divisor) for unit in mutator.units] == [(WIDTH, 4), (INNER, 4)]
    mutator.set_choices({unit.name: 0.7 for unit in mutator.units})
    assert [unit.activated_channels for unit in mutator.units] == [16, 12]
    small = export_pruned(model)
    assert small.experts.enter.shape == (EXPERTS, 24, 16)
    torch.testing.assert_close(outputs(small, (x,)), zeroed_outputs(model, (x,)), rtol=1e-5, atol=1e-5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=r"`_grouped_mm`: it takes .*'of each 4', [23]"):
        mutator.apply(KeepPlan({mutator.units[1].name: tuple(range(11))}))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


class Counting(nn.Module):
    """How many places it finds is how many channels there are: what is read from there on would move with them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        count = len(torch.nonzero(torch.arange(20) < (y == y)[0].sum()))
        z: Tensor = self.leave(y[:, count - 8 : 16])
        return z


def test_places_that_count_channels_are_found_anew() -> None:
    torch.manual_seed(0)
    assert prepared(Counting().double(), torch.randn(9, 5).double()).units == []
