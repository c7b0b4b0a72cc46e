from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.checkpoint import save_pruned
from lightning_prune.errors import ConfigError
from lightning_prune.export import export_pruned
from lightning_prune.mutables import MutableChannel
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import DynamicOp, convert_
from tests.zoo import ZOO

BATCH = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def supernet() -> nn.Sequential:
    """Two layers that share a hidden width of 5, of which 0, 2 and 3 are kept."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    hidden = MutableChannel(5)
    convert_(model[0]).get_mutable_attr("out_channels").register_mutable(hidden, 0, 5)
    convert_(model[2]).get_mutable_attr("in_channels").register_mutable(hidden, 0, 5)
    hidden.current_choice = torch.tensor([True, False, True, True, False])
    return model


def test_export_gives_a_new_small_model_and_leaves_its_argument_alone():
    model = supernet()
    before = copy.deepcopy(model.state_dict())
    small = export_pruned(model)
    assert [type(layer) for layer in small] == [nn.Linear, nn.Tanh, nn.Linear]
    assert [tuple(p.shape) for p in small.parameters()] == [(3, 4), (3,), (2, 3), (2,)]
    assert torch.equal(small(BATCH), model(BATCH))
    assert isinstance(model[0], DynamicOp)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {id(p) for p in small.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_export_of_a_plain_model_is_a_copy():
    model = nn.Linear(2, 2)
    small = export_pruned(model)
    assert small is not model
    assert torch.equal(small.weight, model.weight)


def test_export_contains_no_class_of_this_library():
    model = supernet()
    for module in export_pruned(model).modules():
        assert not type(module).__module__.startswith("lightning_prune")
        assert all(not type(value).__module__.startswith("lightning_prune") for value in module.__dict__.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", ["bottleneck", "grouped", "c2f"])
def test_exported_tensors_lie_in_memory_as_those_of_a_network_built_narrow(name: str, layout: torch.memory_format):
    case = ZOO[name]
    model = case.make().to(memory_format=layout)
    mutator = ChannelMutator(example_input=case.inputs())
    mutator.prepare_from_supernet(model)
    mutator.set_choices({unit.name: 0.5 for unit in mutator.mutable_units})
    tensors = [*(small := export_pruned(model)).parameters(), *small.buffers()]
    built = [
        tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.contiguous() for tensor in tensors
    ]
    assert [tensor.stride() for tensor in tensors] == [tensor.stride() for tensor in built]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert not any(getattr(module, "_forward_pre_hooks", None) or module._forward_hooks for module in small.modules())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        pytest.param(3, "Got 3 of type int", id="a number"),
        pytest.param(nn.ReLU, r"Got the class ReLU.*expected a module: ReLU\(\.\.\.\)", id="a class"),
    ],
)
@pytest.mark.parametrize(
    ("purpose", "run"),
    [
        ("to export", export_pruned),
        ("to save", lambda model: save_pruned(model, "nowhere.ckpt")),
        ("to prune", ChannelMutator(example_input=BATCH).prepare_from_supernet),
    ],
    ids=["export", "save", "prune"],
)
def test_what_is_no_module_is_refused(given: Any, match: str, purpose: str, run: Callable[[Any], None]) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        run(given)
    assert purpose in str(caught.value)
