"""`nn.MultiheadAttention`: the same numbers through the slim module, and heads, head_dim and embedding that can go."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import structure_of
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import DynamicMultiheadAttention, SlimMultiheadAttention, see_through
from lightning_prune.ops.structure import reshape_
from tests.compare import zeroed_outputs

VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": False}, id="no_bias"),
    pytest.param({"add_bias_kv": True, "add_zero_attn": True}, id="extra_keys"),
    pytest.param({"kdim": 10, "vdim": 14}, id="separate_projections"),
    pytest.param({"batch_first": True}, id="batch_first"),
]
BOOLEAN, ADDED = torch.arange(35).view(5, 7) % 6 == 1, torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.1, batch_first=True)
    named = OrderedDict(embed=nn.Linear(7, 24), encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(24, 5))
    return nn.Sequential(named).double()


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 24)
        self.transformer = nn.Transformer(24, 4, 1, 1, 40, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        output: Tensor = self.head(self.transformer(self.embed(source), self.embed(target)))
        return output


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_the_slim_module_gives_torchs_numbers(variant: dict[str, Any], need_weights: bool) -> None:
    module = nn.MultiheadAttention(24, 4, dtype=torch.float64, **variant).eval()
    sizes = (24, variant.get("kdim", 24), variant.get("vdim", 24))
    tokens = [torch.randn(n, 2, c, dtype=torch.float64) for n, c in zip((5, 7, 7), sizes, strict=True)]
    tokens = [t.transpose(0, 1) for t in tokens] if variant.get("batch_first") else tokens
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    per_head = torch.randn(8, 5, 7, dtype=torch.float64)
    for mask, padded in itertools.product((None, BOOLEAN, ADDED, per_head), (None, padding)):
        if mask is not None and padded is not None and mask.dtype != padded.dtype:
            continue
        arguments = {"need_weights": need_weights, "attn_mask": mask, "key_padding_mask": padded}
        expected, weights = module(*tokens, **arguments)
        with see_through(module):
            assert isinstance(module, SlimMultiheadAttention)
            output, found = module(*tokens, **arguments)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        assert (weights is None) == (found is None)
        if weights is not None:
            torch.testing.assert_close(found, weights, rtol=0, atol=1e-12)
    assert type(module) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("build", "shapes", "heads"),
    [
        pytest.param(encoder, ((2, 9, 7),), 2, id="encoder"),
        pytest.param(lambda: Translator().double(), ((2, 9, 7), (2, 6, 7)), 3, id="encoder_decoder"),
    ],
)
def test_heads_head_dim_and_embedding_go(build: Any, shapes: Any, heads: int) -> None:
    model = build().eval()
    inputs = tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
    before = model(*inputs)
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    assert torch.equal(model(*inputs), before)  # nothing is cut: torch's own forward
    axes = [unit.axis for unit in mutator.units]
    assert axes.count("heads") == axes.count("head_dim") == heads
    mutator.set_choices({"*_heads": 0.5, "*_head_dim": 0.5, "embed*": 0.75})
    small = export_pruned(model)
    slim = [m for m in small.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [(m.num_heads, m.head_dim, type(m)) for m in slim] == [(2, 3, SlimMultiheadAttention)] * heads
    assert slim[0].in_proj_weight.shape == (3 * 2 * 3, 18)
    for train in (True, False):
        results = []
        for twin in (model, small):
            torch.manual_seed(0)
            results.append(twin.train(train)(*inputs))
        assert torch.equal(*results)
    with torch.no_grad():  # torch's fused encoder layer must not go around the slim module
        torch.testing.assert_close(small(*inputs), results[0], rtol=0, atol=1e-12)
    assert mutator.cost().params == sum(p.numel() for p in small.parameters())


class Padded(nn.Module):
    """An encoder of sequences of several lengths, which torch takes as nested tensors where it need not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40, batch_first=True), 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "choices",
    [{"*heads": 2}, {"*head_dim": 3}, {"embed*": 24, "*heads": 3}, {"*layers.1*heads": 1}, {"*linear1*": 20}],
    ids=["heads", "head_dim", "odd heads that fill the embedding", "one layer", "ffn"],
)
def test_padded_sequences_go_through_torchs_encoder(choices: dict[str, int]) -> None:
    model, x = Padded().double().eval(), torch.randn(3, 6, 7).double()
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    mutator = ChannelMutator(example_input=(x, padding))
    mutator.prepare_from_supernet(model)
    mutator.set_choices(choices)
    small = export_pruned(model)
    assert small.encoder.use_nested_tensor
    with torch.no_grad():
        expected = zeroed_outputs(model, (x, padding))[0] if "embed*" not in choices else model(x, padding)
        for twin in (model, small):
            torch.testing.assert_close(twin(x, padding), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", ["attn_*heads", "attn_*head_dim", "enter_*"], ids=["heads", "head_dim", "embedding"])
def test_a_structure_gives_the_class_that_the_sizes_ask_for(cut: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.attn = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.leave = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return self.leave(x + self.attn(x, x, x, need_weights=False)[0])

    model, x = Net().double().eval(), torch.randn(2, 6, 5).double()
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    mutator.set_choices({cut: 0.5})
    small, again = export_pruned(model), Net().double().eval()
    reshape_(again, structure_of(small), set(again.state_dict()))
    again.load_state_dict(small.state_dict())
    assert type(again.attn) is type(small.attn) is SlimMultiheadAttention
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_the_structure_travels_without_a_trace() -> None:
    model = encoder().eval()
    inputs = torch.randn(2, 9, 7, dtype=torch.float64)
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    assert any(isinstance(m, DynamicMultiheadAttention) for m in model.modules())
    mutator.set_choices({"*_heads": 0.5})
    small, other = export_pruned(model), encoder().eval()
    dense = copy.deepcopy(structure_of(other))
    reshape_(other, structure_of(model))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(inputs), small(inputs))
    reshape_(other, dense, loaded=dict(other.state_dict()))
    assert {type(m) for m in other.modules() if isinstance(m, nn.MultiheadAttention)} == {nn.MultiheadAttention}
