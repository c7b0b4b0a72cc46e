"""Sizes that are equal by chance: heads as many as their channels, and grids of the same channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_learned_sizes import assert_cut_as_certified, prepared


class Separate(nn.Module):
    """Query, key and value apart, of one head_dim; as many heads as come out."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.leave = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        y: Tensor = self.leave(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + y


@pytest.mark.parametrize(("width", "heads", "head_dim"), [(48, 6, 8), (16, 4, 4)])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_values_follow_the_head_dim_and_no_heads_that_are_as_many_by_luck(
    layers: int, width: int, heads: int, head_dim: int
) -> None:
    blocks = (Separate(width, heads, head_dim) for _ in range(layers))
    model = nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 3))
    model, mutator, x = prepared(model, 2, 6, 5)
    assert sorted((u.axis, u.num_channels) for u in mutator.units) == [
        ("channels", width),
        *[("head_dim", head_dim)] * layers,
        *[("heads", heads)] * layers,
    ]
    assert_cut_as_certified(model, mutator, x)


class Quotient(nn.Module):
    """Blocks of attention whose heads have what the width of the input, divided by their number, gives them."""

    def __init__(self, rest: bool, head_dim: int, talk: bool) -> None:
        super().__init__()
        self.width, self.heads, self.rest = 4 * head_dim, 4, rest
        self.enter, self.last = nn.Linear(5, self.width), nn.Linear(self.width, 2)
        self.fused, self.leave, self.talk = (
            nn.ModuleList(nn.Linear(self.width, 3 * self.width) for _ in "ab"),
            nn.ModuleList(nn.Linear(self.width, self.width) for _ in "ab"),
            nn.ModuleList(nn.Linear(4, 4) for _ in "ab") if talk else [nn.Identity()] * 2,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for fused, leave, talk in zip(self.fused, self.leave, self.talk, strict=True):
            batch, tokens, width = x.shape
            q, k, v = fused(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            weights = talk((q @ k.mT * 0.3).movedim(1, -1)).movedim(-1, 1).softmax(-1)
            made = (weights @ v).transpose(1, 2)
            x = x + leave(made.reshape(batch, tokens, -1 if self.rest else self.width))
        y: Tensor = self.last(x)
        return y


@pytest.mark.parametrize(("head_dim", "talk"), [(6, False), (6, True), (4, False), (4, True), (16, False)])
@pytest.mark.parametrize("rest", [False, True])
def test_a_width_that_is_divided_among_heads_goes_with_them(rest: bool, head_dim: int, talk: bool) -> None:
    model, mutator, x = prepared(Quotient(rest, head_dim, talk), 2, 7, 5)
    assert [(u.axis, u.num_channels) for u in mutator.units] == [("head_dim", head_dim), ("heads", 4)]
    assert_cut_as_certified(model, mutator, x)


class Gated(nn.Module):
    """Attention beside a grouped convolution: 64 channels are 8 heads of 8, which stay, and 4 groups of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads = 64, 8
        self.enter, self.groups, self.leave = nn.Linear(5, 64), nn.Conv1d(64, 64, 1, groups=4), nn.Linear(64, 3)
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.groups(x.mT).mT
        batch, tokens, _ = x.shape
        gate = self.gate(x.view(batch, tokens, self.heads, -1).transpose(1, 2))
        gate = gate.view(batch, self.heads, tokens, 2, 4).sum(-1).prod(-1).view(-1, tokens, 1)
        t = x.transpose(0, 1)
        biases = torch.cat([self.query.bias, self.key.bias, self.value.bias])
        made, _ = F.multi_head_attention_forward(
            *(t, t, t, self.width, self.heads, None, biases, None, None, False, 0.0, self.out.weight, self.out.bias),
            attn_mask=gate.expand(-1, -1, tokens),
            use_separate_proj_weight=True,
            q_proj_weight=self.query.weight,
            k_proj_weight=self.key.weight,
            v_proj_weight=self.value.weight,
        )
        y: Tensor = self.leave(x + made.transpose(0, 1))
        return y


def test_a_grid_whose_rows_are_what_it_is_made_of_ends() -> None:
    _, mutator, _ = prepared(Gated(), 2, 6, 5)
    assert [(u.axis, u.num_channels) for u in mutator.units] == [("channels", 2), ("groups", 4)]
