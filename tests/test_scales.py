"""Scales that a forward works out from a width: those of attention follow their head_dim, all others keep theirs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from tests.compare import assert_same, outputs, scattered, zeroed_outputs

HEADS, HEAD_DIM, WIDTH = 3, 10, 20
Product = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Asks a function for the weights; what that reads are sizes of the moment."""

    def __init__(self, scores: Product, by_size: bool = True) -> None:
        super().__init__()
        self.scores, self.head_dim, self.by_size = scores, HEAD_DIM, by_size
        self.enter = nn.Linear(7, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.leave = nn.Linear(HEADS * HEAD_DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        shape = (*x.shape[:2], HEADS, -1) if self.by_size else (*x.shape[:2], -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        y: Tensor = self.leave((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


def divided(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.size(-1))


def multiplied(q: Tensor, k: Tensor) -> Tensor:
    return (k.shape[-1] ** -0.5) * torch.einsum("bhtd,bhsd->bhts", q, k)


def query_scaled(q: Tensor, k: Tensor) -> Tensor:
    left, right = (q * q.shape[-1] ** -0.5).chunk(2, -1)
    return torch.cat([right, -left], -1) @ k.mT


def both_scaled(q: Tensor, k: Tensor) -> Tensor:
    return (q / math.sqrt(math.sqrt(q.shape[-1]))) @ (k * k.shape[-1] ** -0.25).mT


def in_a_tensor(q: Tensor, k: Tensor) -> Tensor:
    return (q / torch.sqrt(torch.tensor(q.size(-1), dtype=torch.float) * 3).to(q.dtype)) @ k.mT


def in_a_tensor_first(q: Tensor, k: Tensor) -> Tensor:
    return torch.tensor(k.size(-1)).rsqrt() * (q @ k.mT)


def in_the_product(q: Tensor, k: Tensor) -> Tensor:
    flat_q, flat_k = q.flatten(0, 1), k.flatten(0, 1)
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), flat_q, flat_k.mT, alpha=1 / math.sqrt(q.size(-1)))
    return scores.unflatten(0, q.shape[:2])


def with_a_temperature(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT + 0.25) / (3.0 * q.size(-1))


def prepared(model: nn.Module) -> tuple[nn.Module, ChannelMutator, Tensor]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model, x = model.double().eval(), torch.randn(2, 6, 7, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


def axes_of(mutator: ChannelMutator) -> set[tuple[str, int]]:
    return {(unit.axis, unit.num_channels) for unit in mutator.units}


def rescaled_in(mutator: ChannelMutator) -> list[tuple[str, int]]:
    return [(unit.axis, unit.num_channels) for unit in mutator.graph.units if unit.rescaling]


@pytest.mark.parametrize(
    "scores",
    [
        *(divided, multiplied, query_scaled, both_scaled, in_a_tensor, in_a_tensor_first, in_the_product),
        with_a_temperature,
    ],
)
def test_head_dim_goes_and_its_unit_rescales(scores: Product) -> None:
    model, mutator, x = prepared(Attention(scores))
    # halves that change places are one unit
    assert rescaled_in(mutator) == [("head_dim", HEAD_DIM // 2 if scores is query_scaled else HEAD_DIM)]
    mutator.apply(scattered([unit for unit in mutator.units if unit.axis != "head_dim"]))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


def test_a_size_that_is_kept_is_learned_where_the_scale_is_made_of_it() -> None:
    class Kept(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.scores = lambda q, k: q @ k.mT / math.sqrt(self.head_dim)
            return super().forward(x)

    model, mutator, x = prepared(Kept(divided, by_size=False))
    assert {("heads", HEADS), ("head_dim", HEAD_DIM)} <= axes_of(mutator)
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


@pytest.mark.parametrize("masked", [False, True])
def test_a_fused_attention_is_given_its_scale(masked: bool) -> None:
    class Fused(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
            mask = x.new_zeros(1, 1, 6, 6) if masked else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=2 / q.size(-1))
            z: Tensor = self.leave(y.transpose(1, 2).flatten(2))
            return z

    model, mutator, x = prepared(Fused(divided))
    assert rescaled_in(mutator) == [("head_dim", HEAD_DIM)]
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


def test_a_product_with_a_weight_may_be_scaled_too() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave, self.query = (
                nn.Linear(7, WIDTH),
                nn.Linear(WIDTH, 5),
                nn.Parameter(torch.ones(WIDTH)),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            weights = (x @ self.query / math.sqrt(x.size(-1))).softmax(1)
            y: Tensor = self.leave((weights[..., None] * x).sum(1))
            return y

    model, mutator, x = prepared(Pool())
    assert rescaled_in(mutator) == [("channels", WIDTH)]
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


class Scaled(nn.Module):
    """A number beside no product, made of a width that could go."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.leave, self.scale = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 5), scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.scale(self.enter(x)))
        return y


@pytest.mark.parametrize(
    "scale",
    [lambda x: x * x.shape[-1] ** -0.5, lambda x: x / x.shape[-1], lambda x: x.relu() * math.sqrt(x.shape[-1])],
    ids=["root", "width", "embedding"],
)
def test_a_scale_that_belongs_to_no_product_freezes(scale: Callable[[Tensor], Tensor]) -> None:
    _, mutator, _ = prepared(Scaled(scale))
    assert mutator.units == []
    assert any("takes ('other'" in reason for *_, reason in mutator.report().frozen)


@pytest.mark.parametrize(
    ("scores", "by_size", "axis"),
    [
        pytest.param(lambda q, k: q @ k.mT / math.sqrt(q.shape[1]), False, "heads", id="of another axis"),
        pytest.param(lambda q, k: q @ k.mT * math.log(q.shape[-1]), True, "head_dim", id="of another power"),
        pytest.param(
            lambda q, k: q @ k.mT / (math.sqrt(q.size(-1)) * (1 + 1e-8 * q.size(-1))),
            True,
            "head_dim",
            id="of nearly that power",
        ),
        pytest.param(
            lambda q, k: q @ k.mT * torch.tensor(q.shape[-1]).log(),
            True,
            "head_dim",
            id="of another power, in a tensor",
        ),
        pytest.param(lambda q, k: q @ k.mT + torch.tensor(q.shape[-1]), True, "head_dim", id="added, in a tensor"),
        pytest.param(lambda q, k: torch.tensor(q.shape[-1]) / (q @ k.mT), True, "head_dim", id="divided by it"),
    ],
)
def test_another_scale_of_attention_freezes(scores: Product, by_size: bool, axis: str) -> None:
    model, mutator, x = prepared(Attention(scores, by_size))
    # the head_dim of values is another unit where nothing says that they are one
    assert not any(u.axis == axis and "query" in u.name for u in mutator.units)
    assert rescaled_in(mutator) == []
    mutator.apply(scattered(mutator.units))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)


def test_a_number_made_of_a_size_is_not_returned() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.enter(x)
            return self.leave(x), torch.tensor(x.shape[-1]) * 2.0

    _, mutator, _ = prepared(Says())
    assert mutator.units == []
    assert any("returns a number that is made of a size" in reason for *_, reason in mutator.report().frozen)


def test_a_branch_on_a_number_in_a_tensor_is_another_program() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            y: Tensor = self.leave(x if torch.tensor(x.shape[-1]) < WIDTH else 2 * x)
            return y

    _, mutator, _ = prepared(Asks())
    assert mutator.units == []
