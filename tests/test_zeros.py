"""Zeros of removed channels: of two activations summed over channels one must be zero, or the unit renormalises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.mutator import ChannelMutator
from tests.compare import outputs, scattered, zeroed_outputs

Function = Callable[[nn.Module, Tensor], Tensor]


class Products(nn.Module):
    """Tokens compared with tokens, over the channels that `function` makes of a layer's."""

    def __init__(self, function: Function, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.attend = function, attend
        self.embed, self.out = nn.Linear(7, 12), nn.Linear(9, 5)
        self.norm, self.gate, self.scale = nn.LayerNorm(9), nn.Linear(7, 12), nn.Parameter(torch.rand(12) + 0.5)
        self.mean = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        return self.out(self.attend(self.function(self, self.embed(x))))


def gram(y: Tensor) -> Tensor:
    return y @ y.mT


ZERO: dict[str, Function] = {
    "linear": lambda _, y: y,
    "activations": lambda _, y: F.silu(F.gelu(F.relu(y).tanh())),
    "moved": lambda _, y: y.mT.flip(1).mT.unflatten(2, (4, -1)).flatten(2),
    "rotated": lambda _, y: y * 0.3 + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1),
    "times a gate": lambda self, y: y * self.gate(self.input).sigmoid(),
    "over a gate": lambda self, y: y / self.gate(self.input).sigmoid(),
    "plus a weight": lambda self, y: y + self.scale,
    "through a norm of parameters": lambda self, y: self.mean(y.mT).mT,
    "masked": lambda _, y: y.masked_fill(torch.eye(9, 1).bool(), 0.0),
    "summed in place": lambda self, y: y.clone().mul_(2).add_(self.gate(self.input)),
    "squared": lambda _, y: y**2,
    "limited": lambda _, y: y.clamp(-1, 1),
    "mixed": lambda self, y: torch.einsum("bnc,bnd->bd", y, self.gate(self.input))[:, None] * y,
}
OTHER: dict[str, Function] = {
    "sigmoid": lambda _, y: y.sigmoid(),
    "elu plus one": lambda _, y: F.elu(y) + 1,
    "exponential": lambda _, y: y.exp(),
    "one minus": lambda _, y: 1 - y,
    "cosine": lambda _, y: y.cos(),
    "plus a constant": lambda _, y: y + torch.ones(y.shape[-1]).to(y),
    "filled where masked": lambda _, y: y.masked_fill(torch.eye(9, 1).bool(), 2.0),
    "in place": lambda _, y: y.clone().sigmoid_(),
    "in place through a view": lambda _, y: (y.clone(), y.clone())[0].view_as(y).sigmoid_(),
    "limited to positive numbers": lambda _, y: y.clamp(0.5, 1),
    "the largest of it and one": lambda _, y: torch.max(y, torch.ones(()).to(y)),
    "to the power of it": lambda _, y: 2**y,
}
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": gram,
    "einsum": lambda y: torch.einsum("bic,bjc->bij", y, y),
    "attention": lambda y: F.scaled_dot_product_attention(y, y, torch.eye(9).to(y).expand(len(y), -1, -1), scale=0.3),
}
# what is the same for all tokens is no matter to a softmax: attention over others renormalises by name alone
CASES = [
    *(pytest.param(f, gram, False, id=name) for name, f in ZERO.items()),
    *(pytest.param(f, gram, True, id=name) for name, f in OTHER.items()),
    *(pytest.param(ZERO["linear"], s, False, id=f"{name} of zeros") for name, s in SUMS.items()),
    *(
        pytest.param(OTHER["sigmoid"], s, True, id=f"{name} of others")
        for name, s in SUMS.items()
        if name != "attention"
    ),
]


@pytest.mark.parametrize(("function", "attend", "renormalizes"), CASES)
def test_a_sum_over_channels_renormalises_unless_removed_ones_are_zero(
    function: Function, attend: Callable[[Tensor], Tensor], renormalizes: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = Products(function, attend).double(), (torch.randn(3, 9, 7).double(),)
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    assert {unit.renormalizing for unit in mutator.units} == {renormalizes}
    mutator.apply(scattered(mutator.units))
    found, zeroed = outputs(model, inputs), zeroed_outputs(model, inputs)
    same = all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(found, zeroed, strict=True))
    assert same != renormalizes
