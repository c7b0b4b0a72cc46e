"""`ChannelMutator(tie_kinds=True)`: one unit for all units of a kind, so that every layer has the same width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from tests.compare import assert_same, outputs, scattered, zeroed_outputs


class Block(nn.Module):
    """Attention and a feed-forward part."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv, self.leave = nn.Linear(20, 3 * 24), nn.Linear(24, 20)
        self.up, self.down = nn.Linear(20, hidden), nn.Linear(hidden, 20)
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, 6).permute(2, 0, 3, 1, 4)
        x = x + self.leave(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """Three blocks alike and one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 20), nn.Linear(20, 3)
        self.blocks = nn.ModuleList([Block(30), Block(30), Block(30), Block(28)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def prepared(**arguments: Any) -> tuple[nn.Module, ChannelMutator, Tensor]:
    model, x = Stack().double(), torch.randn(2, 6, 5, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x, **arguments)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


def test_units_of_a_kind_become_one_and_others_stay_apart() -> None:
    _, apart, _ = prepared()
    _, tied, _ = prepared(tie_kinds=True)
    assert [u.name for u in apart.units if "up" in u.name] == [
        *(f"blocks.{k}.up_(0, 30)_out_1_in_1" for k in range(3)),
        "blocks.3.up_(0, 28)_out_1_in_1",
    ]
    assert {u.name: u.num_channels for u in tied.units} == {
        "enter_(0, 20)_out_9_in_9": 20,
        "blocks.0.qkv_(0, 72)_out_4_in_4_heads": 4,
        "blocks.0.up_(0, 30)_out_3_in_3": 30,
        "blocks.3.up_(0, 28)_out_1_in_1": 28,
    }


def test_every_layer_of_a_kind_keeps_the_same_channels() -> None:
    model, mutator, x = prepared(tie_kinds=True)
    mutator.apply(scattered(mutator.units))
    kept = [block.up.kept_indices_of("weight")[0].tolist() for block in model.blocks[:3]]
    assert kept[0] == kept[1] == kept[2] == list(mutator.current_plan().kept["blocks.0.up_(0, 30)_out_3_in_3"])
    small = export_pruned(model)
    assert len({block.heads for block in small.blocks}) == 1
    assert small.blocks[0].heads == next(u for u in mutator.units if u.axis == "heads").activated_channels < 4
    assert_same(outputs(model, (x,)), outputs(small, (x,)))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)


def test_a_written_structure_brings_the_tied_units_back() -> None:
    _, mutator, x = prepared(tie_kinds=True)
    mutator.set_choices({"*up*": 0.5})
    again = ChannelMutator.from_config(mutator.config_template(with_channels=True))
    model = Stack().double()
    again.prepare_from_supernet(model)
    assert again.current_choices == mutator.current_choices
    assert [block.up.out_features for block in export_pruned(model).blocks] == [15, 15, 15, 14]
    assert outputs(model, (x,))[0].shape == (2, 6, 3)
