"""Sizes that modules keep: which axes are bound, and which are left alone, while they are learned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import structure_of
from lightning_prune.export import export_pruned
from lightning_prune.graph import integers
from lightning_prune.graph.certify import find_mismatches
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops.structure import reshape_
from tests.compare import assert_same, macs_of, outputs, scattered, zeroed_outputs


def prepared(model: nn.Module, *shape: int) -> tuple[nn.Module, ChannelMutator, Tensor]:
    model, x = model.double().eval(), torch.randn(shape, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


def assert_cut_as_certified(model: nn.Module, mutator: ChannelMutator, x: Tensor) -> None:
    renormalizing = {unit.name for unit in mutator.graph.units if unit.renormalizing}
    mutator.apply(scattered([unit for unit in mutator.units if unit.name not in renormalizing]))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    mutator.apply(scattered(mutator.units, seed=1))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


class Adaptive(nn.Module):
    """Its norms have no weights: they are told how wide they are, and get scales from elsewhere (as in DiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.enter, self.leave = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Linear(5, width)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + self.leave(self.enter(norm(x) * self.scale(by)).relu())
        return x


class Stack(nn.Module):
    """Two blocks, and a norm without weights at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 24), nn.Linear(24, 3)
        self.blocks, self.norm = nn.ModuleList(Adaptive(24) for _ in range(2)), nn.RMSNorm(24, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        for block in self.blocks:
            y = block(y, x)
        z: Tensor = self.leave(self.norm(y))
        return z


def test_a_norm_without_weights_follows_the_width_around_it() -> None:
    model, mutator, x = prepared(Stack(), 2, 6, 5)
    assert sorted(u.num_channels for u in mutator.units) == [24, 48, 48]
    assert_cut_as_certified(model, mutator, x)
    small, again = export_pruned(model), Stack().double().eval()
    assert small.norm.normalized_shape == small.blocks[0].norms[1].normalized_shape == (small.leave.in_features,)
    reshape_(again, structure_of(small), set(again.state_dict()))
    again.load_state_dict(small.state_dict())
    assert_same(outputs(again, (x,)), outputs(small, (x,)))


def test_an_unflatten_follows_the_channels_that_its_neighbour_makes() -> None:
    layers = [
        nn.Linear(5, 6 * 4),
        nn.Unflatten(1, (6, 2, 2)),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(16, 2),
    ]
    model, mutator, x = prepared(nn.Sequential(*layers), 3, 5)
    assert sorted(u.num_channels for u in mutator.units) == [4, 6]
    assert_cut_as_certified(model, mutator, x)
    mutator.set_choices({"0_*": 0.5})
    assert export_pruned(model)[1].unflattened_size == (3, 2, 2)


class LargestChannel(nn.Module):
    """Weighs pixels by their largest channel; may say which one it is."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.enter, self.leave, self.says = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1), says

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        largest, index = x.max(1, keepdim=True)
        y: Tensor = self.leave(x * largest.sigmoid())
        if self.says == "reads":
            return y + index
        if self.says == "returns":
            return y, index
        return (y, index.clone().flip(2)) if self.says == "in a copy" else y


@pytest.mark.parametrize(("says", "units"), [("nothing", [12]), ("reads", []), ("returns", []), ("in a copy", [])])
def test_which_channel_is_largest_matters_where_it_is_read(says: str, units: list[int]) -> None:
    model, mutator, x = prepared(LargestChannel(says), 2, 3, 4, 4)
    assert [u.num_channels for u in mutator.units] == units
    assert units == [u.num_channels for u in mutator.graph.units if u.renormalizing]
    assert_cut_as_certified(model, mutator, x)


class Halves(nn.Module):
    """Its size stands in an expression; other attributes are as large, but no code reads them."""

    def __init__(self, **others: int) -> None:
        super().__init__()
        self.half, self.enter, self.leave = 6, nn.Linear(5, 24), nn.Linear(12, 3)
        self.__dict__.update(others)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.enter(x).view(-1, 2, getattr(self, "half") * 2).sum(1))  # noqa: B009
        return y


def test_only_integers_that_the_code_mentions_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(integers, "find_mismatches", lambda *args: runs.append(1) or find_mismatches(*args))
    found = []
    for others in ({}, {f"unread_{k}": 12 for k in range(9)}):
        runs.clear()
        _, mutator, _ = prepared(nn.Sequential(nn.Linear(5, 5), Halves(**others)), 4, 5)
        found.append((len(runs), [(u.axis, u.num_channels) for u in mutator.units]))
    assert found[0] == found[1]


class OneKey(nn.Module):
    """Query heads and one key and value in one layer, taken apart by constant indices."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.fused, self.leave = nn.Linear(24, (heads + 2) * head_dim), nn.Linear(heads * head_dim, 3)
        self.enter = nn.Linear(5, 24)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused(self.enter(x)).view(*x.shape[:2], self.num_heads + 2, self.head_dim).transpose(1, 2)
        query, key, value = fused[:, :-2], fused[:, [-2]], fused[:, [-1]]
        made = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
        y: Tensor = self.leave(made.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim))
        return y


def test_queries_of_one_key_lose_heads() -> None:
    model, mutator, x = prepared(OneKey(6, 4), 2, 7, 5)
    assert [(u.axis, u.num_channels) for u in mutator.units] == [("head_dim", 4), ("heads", 6), ("channels", 24)]
    assert_cut_as_certified(model, mutator, x)


class Repeated(nn.Module):
    """As in Mamba2: both factors of a product are repeated for every head before values have any."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 6, 4
        self.query, self.key, self.value, self.leave = (nn.Linear(*s) for s in ((5, 3), (5, 3), (5, 24), (24, 2)))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x)[:, :, None].expand(-1, -1, self.heads, -1) for f in (self.query, self.key))
        scores, v = torch.einsum("blhn,bshn->blsh", q, k), self.value(x).unflatten(-1, (self.heads, self.head_dim))
        y: Tensor = self.leave(torch.einsum("blsh,bshp->blhp", scores, v).flatten(2))
        return y


def test_a_product_of_what_is_repeated_costs_as_many_as_are_left() -> None:
    model, mutator, x = prepared(Repeated(), 2, 7, 5)
    assert {(u.axis, u.num_channels) for u in mutator.units} == {("heads", 6), ("head_dim", 4), ("channels", 3)}
    mutator.apply(scattered(mutator.units))
    assert model.heads < 6
    assert mutator.cost().macs == macs_of(export_pruned(model), (x,))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)


class Positions(nn.Module):
    """Takes one channel, to see how many rows there are; may use it."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        self.enter, self.leave, self.table = nn.Linear(5, 12), nn.Linear(12, 2), nn.Parameter(torch.randn(9, 12))
        self.uses = uses

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        one = x[:, :, -1]
        y: Tensor = self.leave(x + self.table[: one.shape[1]])
        if self.uses == "value":
            return y + one.unsqueeze(-1)
        return (y, one) if self.uses == "output" else y


@pytest.mark.parametrize(("uses", "units"), [("rows", [12]), ("value", []), ("output", [])])
def test_a_channel_that_is_taken_and_not_read_freezes_nothing(uses: str, units: list[int]) -> None:
    model, mutator, x = prepared(Positions(uses), 2, 7, 5)
    assert [u.num_channels for u in mutator.units] == units
    assert_cut_as_certified(model, mutator, x)


class Table(nn.Module):
    """Adds the rows of a table that the length of the input asks for, after an op on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.rows = nn.Linear(5, 12), nn.Linear(12, 2), nn.Embedding(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.enter(x) + self.rows.weight.tanh()[2 : 2 + x.shape[1]])
        return y


def test_rows_that_a_longer_input_would_read_stay() -> None:
    model, mutator, _ = prepared(Table(), 2, 4, 5)
    assert [u.num_channels for u in mutator.units] == [12]
    frozen = {(tensor, dim): (size, reason) for tensor, dim, size, reason in mutator.report().frozen}
    assert frozen["rows.weight", 0] == (9, "a slice leaves it out: a longer input may read it")
    longer = torch.randn(2, 7, 5, dtype=torch.float64)
    mutator.apply(scattered(mutator.units))
    torch.testing.assert_close(outputs(model, (longer,)), zeroed_outputs(model, (longer,)), rtol=1e-12, atol=1e-12)


class Fused(nn.Module):
    """Queries, keys and values in one layer, cut apart at places worked out of several numbers."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.head_dim, self.num_keys = config, 6, config.num_keys
        self.enter = nn.Linear(20, (config.num_heads + 2 * config.num_keys) * 6)
        self.leave = nn.Linear(config.num_heads * 6, 20)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first = self.enter(x), self.config.num_heads * self.head_dim
        second = first + self.num_keys * self.head_dim
        q, k, v = (
            p.unflatten(-1, (-1, self.head_dim)) for p in (x[..., :first], x[..., first:second], x[..., second:])
        )
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        made: Tensor = self.leave(y.transpose(1, 2).flatten(2))
        return x + made


class Nested(Fused):
    """Each key and value lies behind the queries that share them; how many these are is worked out."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.config.num_heads // self.num_keys
        x = self.enter(x).view(*x.shape[:2], -1, shared + 2, self.head_dim)
        q = x[..., :-2, :].reshape(*x.shape[:2], self.config.num_heads, self.head_dim)
        return q, x[..., -2, :], x[..., -1, :]


@pytest.mark.parametrize("layer", [Fused, Nested])
def test_places_that_are_worked_out_of_several_numbers_follow(layer: type[Fused]) -> None:
    layers = [layer(SimpleNamespace(num_heads=4, num_keys=2)) for _ in range(2)]
    model, mutator, x = prepared(nn.Sequential(nn.Linear(5, 20), *layers, nn.Linear(20, 3)), 2, 7, 5)
    found = sorted((unit.axis, unit.num_channels) for unit in mutator.units)
    assert found == [("channels", 20), *[("head_dim", 6)] * 2, *[("heads", 2)] * 2]
    assert_cut_as_certified(model, mutator, x)


class Multiple(nn.Module):
    """Attention whose values have twice the channels of queries and keys, as a number says (as in LeViT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.ratio = 3, 5, 2
        self.enter, self.leave = nn.Linear(width, 3 * 4 * 5), nn.Linear(3 * 2 * 5, width)

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.head_dim, self.head_dim, self.ratio * self.head_dim
        parts = self.enter(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = parts.split(sizes, -1)
        made: Tensor = self.leave(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + made


def test_what_is_a_multiple_of_a_size_that_is_kept_goes_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 22), *(Multiple(22) for _ in range(2)), nn.Linear(22, 7))
    model, mutator, x = prepared(model, 2, 6, 4)
    found = sorted((unit.axis, unit.num_channels) for unit in mutator.units)
    assert found == [("channels", 22), *[("head_dim", 5)] * 2, *[("heads", 3)] * 2]
    assert_cut_as_certified(model, mutator, x)


class Modulated(nn.Module):
    """Makes two copies of the width and three gates at once, and takes them apart by the width of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, 2 * width + 3)
        self.near, self.context = nn.Conv1d(width, width, 3, padding=1, groups=width), nn.Conv1d(width, width, 1)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        query, context, gates = self.enter(self.norm(x)).transpose(1, 2).split((width, width, 3), 1)
        gathered = self.near(context).relu() * gates[:, :1] + context.mean(2, keepdim=True) * gates[:, 1:2]
        return x + self.leave((query * self.context(gathered)).transpose(1, 2))


def test_all_parts_that_are_as_wide_as_the_input_follow_it() -> None:
    layers = (nn.Linear(5, 24), Modulated(24), nn.Linear(24, 36), Modulated(36), Modulated(36), nn.Linear(36, 3))
    model, mutator, x = prepared(nn.Sequential(*layers), 2, 7, 5)
    assert [unit.num_channels for unit in mutator.units] == [24, 36]
    assert_cut_as_certified(model, mutator, x)


class Stages(nn.Module):
    """Reads the width of its last stage from a list that its config holds."""

    def __init__(self, config: SimpleNamespace | dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.config = config
        self.first, self.second, self.leave = nn.Linear(20, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).mT.contiguous()
        sizes = self.config["sizes"] if isinstance(self.config, dict) else self.config.sizes
        y: Tensor = self.leave(x.mT.reshape(len(x), -1, sizes[-1]))
        return y


@pytest.mark.parametrize("config", [SimpleNamespace(sizes=[8, 12]), {"sizes": (8, 12)}], ids=["object", "dict"])
def test_a_size_in_a_list_of_a_config_follows(config: Any) -> None:
    model, mutator, x = prepared(Stages(config), 2, 6, 20)
    assert sorted(unit.num_channels for unit in mutator.units) == [8, 12]
    mutator.apply(scattered(mutator.units))
    small = export_pruned(model)
    torch.testing.assert_close(outputs(small, (x,)), outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    sizes = small.config["sizes"] if isinstance(config, dict) else small.config.sizes
    assert tuple(sizes) == (8, small.second.out_features) != (8, 12)
    assert type(sizes) is type(config["sizes"] if isinstance(config, dict) else config.sizes)
    again = Stages(config).double().eval()
    reshape_(again, structure_of(model))
    again.load_state_dict(small.state_dict())
    assert_same(outputs(again, (x,)), outputs(small, (x,)))
