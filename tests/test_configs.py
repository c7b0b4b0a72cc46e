"""Sizes that forward reads from a config object or a dict which the module holds, as minimal GPTs do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from lightning_prune.compact import compact_, grow_
from lightning_prune.errors import ConfigError
from lightning_prune.ops.structure import reshape_, structure_of
from tests.compare import assert_same, outputs, scattered, zeroed_outputs


@dataclass(frozen=True)
class Config:
    width: int = 20
    n_head: int = 4
    head_size: int = 6
    layers: int = 4  # as many as heads, and no size


class FromObject(nn.Module):
    """Attention that keeps no size of its own: query, key and value in one, as `config` says."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.attend, self.leave = nn.Linear(config.width, 3 * 24), nn.Linear(24, config.width)

    def sizes(self) -> tuple[int, int]:
        return self.config.n_head, self.config.head_size

    def forward(self, x: Tensor) -> Tensor:
        heads, size = self.sizes()
        q, k, v = self.attend(x).split(heads * size, dim=-1)
        q, k, v = (y.view(*x.shape[:2], heads, size).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        return self.leave(y.transpose(1, 2).reshape(*x.shape[:2], heads * size))


class FromDict(FromObject):
    """The same, from a dict."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cfg = dict(vars(config))
        del self.config

    def sizes(self) -> tuple[int, int]:
        return self.cfg["n_head"], self.cfg["head_size"]


class Net(nn.Module):
    def __init__(self, kind: Callable[[Config], nn.Module]) -> None:
        super().__init__()
        self.config = Config()
        self.enter, self.leave = nn.Linear(5, 20), nn.Linear(20, 3)
        self.blocks = nn.ModuleList([kind(self.config) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def sizes_of(model: nn.Module) -> list[tuple[int, int]]:
    return [block.sizes() for block in model.blocks]


def prepared(kind: Callable[[Config], nn.Module]) -> tuple[nn.Module, ChannelMutator, Tensor]:
    model, x = Net(kind).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


def counts(mutator: ChannelMutator) -> list[tuple[int, int]]:
    kept = {(unit.axis, unit.name.split(".")[1]): unit.activated_channels for unit in mutator.units if "." in unit.name}
    return [(kept["heads", str(k)], kept["head_dim", str(k)]) for k in range(2)]


KINDS = pytest.mark.parametrize("kind", [FromObject, FromDict], ids=["object", "dict"])


@KINDS
def test_heads_and_head_dim_follow_in_every_layer_apart(kind: Callable[[Config], nn.Module]) -> None:
    model, mutator, x = prepared(kind)
    assert sorted((u.axis, u.num_channels) for u in mutator.units) == [
        ("channels", 20),
        *[("head_dim", 6)] * 2,
        *[("heads", 4)] * 2,
    ]
    assert sizes_of(model) == [(4, 6)] * 2
    mutator.apply(scattered(mutator.units, 1))
    assert sizes_of(model) == counts(mutator)
    assert len(set(sizes_of(model))) == 2
    small = export_pruned(model)
    assert sizes_of(small) == counts(mutator)
    assert_same(outputs(model, (x,)), outputs(small, (x,)))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    assert model.config == small.config == Config()  # shared by all layers: no number of it says all of them


@KINDS
def test_a_config_is_the_very_same_object_while_nothing_is_cut(kind: Callable[[Config], nn.Module]) -> None:
    model, mutator, _ = prepared(kind)
    name = "config" if kind is FromObject else "cfg"
    before = [getattr(block, name) for block in model.blocks]
    mutator.set_choices({"*heads": 0.5})
    assert all(getattr(block, name) is not held for block, held in zip(model.blocks, before, strict=True))
    mutator.set_choices({"*heads": 1.0})
    assert all(getattr(block, name) is held for block, held in zip(model.blocks, before, strict=True))


@KINDS
def test_the_structure_holds_the_numbers_and_rebuilds_them(kind: Callable[[Config], nn.Module]) -> None:
    model, mutator, x = prepared(kind)
    mutator.apply(scattered(mutator.units, 1))
    expected, structure = outputs(model, (x,)), structure_of(model)
    name = "config" if kind is FromObject else "cfg"
    heads = counts(mutator)[0][0]
    assert structure["integers"]["blocks.0"][f"{name}.n_head"] == {"full": 4, "kept": heads}

    again = Net(kind).double()
    again.load_state_dict(model.state_dict())
    reshape_(again, structure)
    assert sizes_of(again) == counts(mutator)
    assert_same(outputs(again, (x,)), expected)

    compact_(model)
    assert_same(outputs(model, (x,)), expected)
    grow_(model)
    assert sizes_of(model) == [(4, 6)] * 2


def test_a_written_structure_needs_no_trace() -> None:
    _, mutator, x = prepared(FromObject)
    mutator.apply(scattered(mutator.units, 1))
    again, model = ChannelMutator.from_config(mutator.config_template(with_channels=True)), Net(FromObject).double()
    again.prepare_from_supernet(model)
    assert sizes_of(model) == counts(mutator)
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


def test_other_attributes_of_a_config_stay_shared() -> None:
    class Open:
        width, n_head, head_size = 20, 4, 6

        def __init__(self) -> None:
            self.__dict__.update(width=20, n_head=4, head_size=6, bias=0)

    shared = Open()
    model, mutator, _ = prepared(lambda _: FromObject(shared))
    mutator.set_choices({"*heads": 0.5})
    shared.bias = 3
    assert [block.config.bias for block in model.blocks] == [3, 3]
    assert shared.n_head == 4


def test_another_config_may_take_its_place_if_its_dense_sizes_are_the_same() -> None:
    model, mutator, _ = prepared(FromObject)
    mutator.set_choices({"*heads": 0.5})
    model.blocks[0].config = Config(layers=7)
    assert (model.blocks[0].config.layers, model.blocks[0].config.n_head) == (7, 2)
    with pytest.raises(ConfigError, match="it follows the kept channels"):
        model.blocks[0].config = Config(n_head=3)


def test_copies_are_dynamic_too() -> None:
    model, mutator, x = prepared(FromDict)
    mutator.apply(scattered(mutator.units, 1))
    assert_same(outputs(copy.deepcopy(model), (x,)), outputs(model, (x,)))
