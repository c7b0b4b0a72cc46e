"""Sizes that modules keep: which axes are bound, and which are left alone, while they are learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from tests.compare import assert_same, outputs, scattered, zeroed_outputs


def prepared(model: nn.Module, *shape: int) -> tuple[nn.Module, ChannelMutator, Tensor]:
    model, x = model.double().eval(), torch.randn(shape, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


def assert_cut_as_certified(model: nn.Module, mutator: ChannelMutator, x: Tensor) -> None:
    mutator.apply(scattered([u for u in mutator.units if not u.renormalizing]))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    mutator.apply(scattered(mutator.units, seed=1))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


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


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_values_follow_the_head_dim_and_no_heads_that_are_as_many_by_luck(layers: int) -> None:
    model = nn.Sequential(nn.Linear(5, 48), *(Separate(48, 6, 8) for _ in range(layers)), nn.Linear(48, 3))
    model, mutator, x = prepared(model, 2, 6, 5)
    assert sorted((u.axis, u.num_channels) for u in mutator.units) == [
        ("channels", 48),
        *[("head_dim", 8)] * layers,
        *[("heads", 6)] * layers,
    ]
    assert_cut_as_certified(model, mutator, x)
