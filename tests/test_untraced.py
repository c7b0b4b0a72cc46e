"""Models that use what a trace does not see through: none raises, each keeps what cannot be followed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from lightning_prune.errors import TraceError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from tests.compare import assert_same, outputs, scattered

Function = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Between(nn.Module):
    """A function of the channels that a layer makes, and of the input, between two layers."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.one, self.hidden, self.two, self.out = (
            nn.Linear(7, 10),
            nn.Linear(10, 10),
            nn.Linear(10, 12),
            nn.Linear(12, 5),
        )
        self.register_buffer("adjacency", torch.eye(9).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.out(self.function(self, self.two(y + self.hidden(y).relu()), x))


def condition(_: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda z: z.sin(), lambda z: z.cos(), (y,))


def derivative(_: nn.Module, y: Tensor, __: Tensor) -> Tensor:
    with torch.enable_grad():
        z = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad((z**3).sum(), z)
    return y + slope


def padded(_: nn.Module, y: Tensor, __: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(torch.nested.nested_tensor(list(y.unbind(0))), 0.0)


def jagged(_: nn.Module, y: Tensor, __: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor(list(y.unbind(0)), layout=torch.jagged)
    return torch.nested.to_padded_tensor(nested.sin(), 0.0)


def quantized(_: nn.Module, y: Tensor, __: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(y.float(), 0.1, 0, -128, 127).to(y)


INNER = {"one_(0, 10)_out_2_in_2": 10}
WHOLE = {**INNER, "two_(0, 12)_out_1_in_1": 12}
SEEN: dict[str, tuple[Function, dict[str, int]]] = {
    "a condition on data": (condition, INNER),
    "a derivative inside": (derivative, WHOLE),
    "mapped over examples": (lambda _, y, __: torch.vmap(lambda row: row.sin() * 2)(y), WHOLE),
    "a functional derivative": (lambda _, y, __: torch.func.grad(lambda z: (z**3).sum())(y), WHOLE),
    "computed again for its gradient": (lambda _, y, __: checkpoint(torch.relu, y, use_reentrant=False), WHOLE),
    "a sparse product": (lambda self, y, _: torch.stack([torch.sparse.mm(self.adjacency.to(y), r) for r in y]), WHOLE),
    "in another number format": (lambda _, y, __: y.to(torch.float8_e4m3fn).to(y), WHOLE),
    "bits as integers": (lambda _, y, __: (y.view(torch.int64) & -256).view(y.dtype), WHOLE),
    "fake quantisation": (quantized, WHOLE),
    "a loop over steps": (
        lambda _, y, __: torch.stack([y[:, : t + 1].mean(1) for t in range(y.shape[1])], 1).tanh(), WHOLE
    ),
}  # fmt: skip


def prepared(model: nn.Module, x: Tensor, **arguments: bool) -> ChannelMutator:
    mutator = ChannelMutator(example_input=x, **arguments)
    mutator.prepare_from_supernet(model)
    return mutator


@pytest.mark.filterwarnings("ignore")  # torch warns of prototypes
@pytest.mark.parametrize("name", SEEN)
def test_what_is_around_an_odd_op_is_pruned(name: str) -> None:
    function, units = SEEN[name]
    model, x = Between(function).double(), torch.randn(2, 9, 7).double()
    mutator = prepared(model, x)
    assert {unit.name: unit.num_channels for unit in mutator.units} == units
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(export_pruned(model), (x,)), outputs(model, (x,)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [pytest.param(padded, id="nested"), pytest.param(jagged, id="jagged")])
def test_a_model_that_cannot_be_watched_keeps_all_and_says_so(function: Function) -> None:
    model, x = Between(function).double(), torch.randn(2, 9, 7).double()
    before = outputs(model, (x,))
    mutator = prepared(model, x)
    assert mutator.units == []
    assert any("the model cannot be traced, so that nothing is pruned" in note for note in mutator.graph.notes)
    assert {frozen.reason for frozen in mutator.graph.frozen} == {"the model cannot be traced"}
    assert_same(outputs(model, (x,)), before)
    with pytest.raises(TraceError, match="strict=True"):
        prepared(Between(function).double(), x, strict=True)


class Flexible(nn.Module):
    """Attention whose scores lose with distance."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.q, self.k, self.v = (nn.Linear(7, 4 * 16) for _ in "qkv")
        self.out = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))

        def lessened(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - 0.1 * (query - key).abs() * (head + 1)

        return self.out(flex_attention(q, k, v, lessened, scale=self.scale).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("scale", "units"),
    [
        pytest.param(0.25, {"q_(0, 64)_out_2_in_0_head_dim": 16, "v_(0, 64)_out_1_in_1_head_dim": 16}, id="given"),
        pytest.param(None, {"v_(0, 64)_out_1_in_1_head_dim": 16}, id="from head_dim"),
    ],
)
def test_flexible_attention_loses_head_dim_alone(scale: float | None, units: dict[str, int]) -> None:
    model, x = Flexible(scale).requires_grad_(False), torch.randn(2, 16, 7)
    mutator = prepared(model, x)
    assert {unit.name: unit.num_channels for unit in mutator.units} == units
    mutator.apply(scattered(mutator.units))
    for a, b in zip(outputs(export_pruned(model), (x,)), outputs(model, (x,)), strict=True):
        torch.testing.assert_close(a, b)
