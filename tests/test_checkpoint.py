"""Structures, state dicts that carry them, and `load_pruned`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.checkpoint import (
    KEY,
    fingerprint_of,
    load_pruned,
    register_structure_hooks,
    reshape_,
    structure_of,
)
from lightning_prune.compact import compact_
from lightning_prune.errors import CheckpointError
from lightning_prune.export import export_pruned
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import DynamicOp, convert_, dynamic_ops
from tests.checkpoint_nets import (
    BATCH,
    KEPT,
    DoubleNet,
    Net,
    compacted,
    dense,
    dynamic,
    is_plain,
    saved,
    through_file,
)

# What the structure holds


def test_the_structure_is_plain_data_with_dense_shapes_kept_indices_and_integers():
    model, _ = dynamic()
    structure = structure_of(model, units={"conv": 0.5}, progress={"epoch": 3})
    assert structure["version"] == 1
    assert structure["tensors"]["conv.weight"]["shape"] == [6, 2, 3, 3]
    assert {dim: kept.tolist() for dim, kept in structure["tensors"]["conv.weight"]["kept"].items()} == {
        "0": [0, 2, 3, 5]
    }
    assert structure["tensors"]["out.weight"] == {"shape": [3, 7], "kept": {}}
    assert structure["integers"]["mix"] == {"width": {"full": 6, "kept": 4}, "shape": {"full": [1, 6], "kept": [1, 4]}}
    assert "out" not in structure["integers"]
    assert structure["units"] == {"conv": 0.5}
    assert structure["progress"] == {"epoch": 3}


def test_the_structure_outlives_compaction():
    model, _ = dynamic()
    before = structure_of(model)
    compact_(model)
    after = structure_of(model)
    assert str(after) == str(before)
    assert str(structure_of(copy.deepcopy(model))) == str(before)
    assert str(structure_of(export_pruned(dynamic()[0]))) == str(before)


def test_the_structure_of_a_part_counts_in_the_whole():
    model, _ = dynamic()
    before = structure_of(model)
    for name in ("conv", "norm", "mix", "embed", "head", "out"):
        compact_(getattr(model, name))
    assert str(structure_of(model)["tensors"]["conv.weight"]) == str(before["tensors"]["conv.weight"])
    assert structure_of(model)["integers"] == before["integers"]
    compact_(model)
    assert structure_of(model)["integers"] == before["integers"]


@pytest.mark.parametrize("make", [dense, lambda: dynamic()[0], compacted], ids=["dense", "dynamic", "small"])
def test_the_fingerprint_is_that_of_the_dense_model(make):
    assert fingerprint_of(make()) == fingerprint_of(Net())
    assert fingerprint_of(make()) != fingerprint_of(Net(width=5))


# State dicts


def test_hooks_add_no_keys_and_are_registered_once():
    model, _ = dynamic()
    register_structure_hooks(model)
    assert len(model._state_dict_hooks) == len(model._load_state_dict_pre_hooks) == 1
    assert list(model.state_dict()) == list(Net().state_dict())


SOURCES = {"dense": dense, "mid-schedule": lambda: dynamic()[0], "small": compacted}
TARGETS = {
    "dense": lambda: dense(1),
    "dynamic": lambda: dynamic(1, None)[0],
    "dynamic, cut elsewhere": lambda: dynamic(1, (0, 1, 1, 0, 0, 0))[0],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_any_state_dict_loads_into_any_form_of_the_model(source, target, tmp_path):
    model, other = source().eval(), target().eval()
    other.load_state_dict(through_file(model.state_dict(), tmp_path / "state.pt"))
    assert torch.equal(other(BATCH), model(BATCH))
    assert other.head.weight is other.embed.weight or not is_plain(other)


def test_a_dynamic_model_stays_dynamic_as_long_as_the_tensors_fit():
    model, unit = dynamic(1, None)
    model.load_state_dict(dynamic()[0].state_dict())
    assert len(dynamic_ops(model)) == 6
    assert unit.current_mask.int().tolist() == list(KEPT)
    model.load_state_dict(dense().state_dict())
    assert unit.activated_channels == 6


def test_a_dynamic_model_becomes_plain_for_small_tensors():
    model, _ = dynamic(1, None)
    model.load_state_dict(compacted().state_dict())
    assert is_plain(model)
    assert model.conv.weight.shape == (4, 2, 3, 3)
    assert (model.mix.width, model.mix.shape) == (4, (1, 4))


def test_tensors_that_are_not_saved_are_cut_too():
    model = dense(1)
    model.load_state_dict(compacted().state_dict())
    assert model.mix.offset.tolist() == [0.0, 2 / 8, 3 / 8, 5 / 8]


def test_a_full_state_dict_that_is_cut_loads_small_into_a_plain_model():
    model = dense(1)
    model.load_state_dict(dynamic()[0].state_dict())
    assert is_plain(model)
    assert model.conv.out_channels == 4


def make_growable() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    register_structure_hooks(model)
    return model


def cut_growable(kept: list[bool]) -> nn.Module:
    model, unit = make_growable(), MutableChannel(4)
    convert_(model[0]).get_mutable_attr("out_channels").register_mutable(unit, 0, 4)
    convert_(model[2]).get_mutable_attr("in_channels").register_mutable(unit, 0, 4)
    unit.current_choice = torch.tensor(kept)
    compact_(model)
    return model


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without"])
def test_a_small_model_grows_back_for_a_dense_state_dict(metadata):
    model, other = cut_growable([True, False, True, True]), make_growable()
    parameters = [id(parameter) for parameter in model.parameters()]
    state = other.state_dict()
    model.load_state_dict(state if metadata else dict(state))
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    assert torch.equal(model(torch.ones(1, 3)), other(torch.ones(1, 3)))
    assert structure_of(model)["integers"] == {}


def test_a_small_model_takes_another_small_structure():
    model, other = cut_growable([True, False, True, True]), cut_growable([False, True, False, True])
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(torch.ones(1, 3)), other(torch.ones(1, 3)))
    assert structure_of(model)["tensors"]["0.bias"]["kept"]["0"].tolist() == [1, 3]


def test_a_small_model_loads_its_own_tensors_without_metadata():
    model = cut_growable([True, False, True, True])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert model[0].out_features == 3


def test_a_small_model_that_is_dynamic_again_stays_so():
    model, other = cut_growable([True, False, True, True]), cut_growable([True, False, True, True])
    unit = MutableChannel(3)
    convert_(model[0]).get_mutable_attr("out_channels").register_mutable(unit, 0, 3)
    convert_(model[2]).get_mutable_attr("in_channels").register_mutable(unit, 0, 3)
    unit.current_choice = torch.tensor([True, True, False])
    model.load_state_dict(other.state_dict())
    assert isinstance(model[0], DynamicOp)
    assert unit.activated_channels == 3
    assert torch.equal(model(torch.ones(1, 3)), other(torch.ones(1, 3)))


def test_a_dynamic_model_that_was_cut_the_same_way_takes_small_tensors_without_metadata():
    model, _ = dynamic(1)
    other = compacted()
    model.load_state_dict(dict(other.state_dict()))
    assert is_plain(model)
    assert torch.equal(model.eval()(BATCH), other.eval()(BATCH))


def test_growing_a_tensor_that_is_not_saved_is_refused_and_changes_nothing():
    model = compacted()
    with pytest.raises(CheckpointError, match=r"'mix\.offset' has entries that were removed"):
        model.load_state_dict(dense().state_dict())
    assert model.conv.out_channels == 4
    assert model.conv.weight.shape == (4, 2, 3, 3)


def clone_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle], ids=["deepcopy", "pickle"])
def test_hooks_travel_with_copies(clone):
    model = clone(dense(1))
    model.load_state_dict(compacted().state_dict())
    assert model.conv.out_channels == 4
    assert KEY in model.state_dict()._metadata[""]


def test_a_nested_root_reads_the_metadata_of_its_prefix():
    wrapper, other = nn.ModuleDict({"module": dense(1)}), nn.ModuleDict({"module": compacted()})
    wrapper.load_state_dict(other.state_dict())
    assert wrapper["module"].conv.out_channels == 4


def test_training_goes_on_after_loading():
    model = dense(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alive = model(BATCH).sum()
    alive.backward()
    model.load_state_dict(compacted().state_dict())
    optimizer.zero_grad()
    model(BATCH).sum().backward()
    optimizer.step()
    assert model.conv.weight.grad.shape == (4, 2, 3, 3)


def test_units_found_otherwise_are_refused_and_masks_stay():
    model, _ = dynamic(1, None)
    convert_(model.out)
    other = MutableChannel(3, "classes")
    model.out.get_mutable_attr("out_channels").register_mutable(other, 0, 3)
    structure = structure_of(model)
    other.current_choice = torch.tensor([True, True, False])
    state = model.state_dict()
    fresh, unit = dynamic(2)
    with pytest.raises(CheckpointError, match=r"'out\.weight' would keep other channels.*ignore"):
        fresh.load_state_dict(state)
    assert unit.activated_channels == 4
    assert structure["tensors"]["out.weight"]["kept"] == {}


# load_pruned


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("target", [DoubleNet, *TARGETS.values()], ids=["class", *TARGETS.keys()])
def test_load_pruned_gives_a_plain_small_model(source, target, tmp_path):
    model = source().eval()
    path = saved(model, tmp_path / "last.ckpt")
    given = target if target is DoubleNet else target()
    loaded = load_pruned(path, given)
    assert is_plain(loaded)
    assert isinstance(loaded, DoubleNet) if target is DoubleNet else loaded is given
    assert torch.equal(loaded.eval()(BATCH), model(BATCH))
    assert loaded.head.weight is loaded.embed.weight
    assert all(value.grad_fn is None for value in loaded.parameters())
    assert [tuple(p.shape) for p in loaded.parameters()] == [tuple(p.shape) for p in export_pruned(model).parameters()]


def test_init_kwargs_come_before_the_hyperparameters(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": dense(classes=4).state_dict(), "hyper_parameters": {"classes": 3}}, path)
    assert load_pruned(path, Net, classes=4).out.out_features == 4


@pytest.mark.parametrize("bare", [True, False], ids=["bare state dict", "with state_dict"])
def test_without_metadata_the_entry_of_the_checkpoint_serves(bare, tmp_path):
    model, path = compacted().eval(), tmp_path / "last.ckpt"
    if bare:
        torch.save(model.state_dict(), path)
    else:
        torch.save({"state_dict": dict(model.state_dict()), KEY: structure_of(model)}, path)
    assert torch.equal(load_pruned(path, dense(1)).eval()(BATCH), model(BATCH))


class Late(Net):
    """Makes a layer in configure_model, and keeps something beside its weights."""

    def __init__(self):
        super().__init__()
        self.extra = None

    def configure_model(self):
        if self.extra is None:
            self.extra = nn.Linear(2, 2)

    def on_load_checkpoint(self, checkpoint):
        self.note = checkpoint["note"]


def test_layers_of_configure_model_and_the_hook_of_the_model_are_served(tmp_path):
    model = Late()
    model.configure_model()
    register_structure_hooks(model)
    torch.save({"state_dict": model.state_dict(), "note": "mine"}, tmp_path / "last.ckpt")
    loaded = load_pruned(tmp_path / "last.ckpt", Late)
    assert torch.equal(loaded.extra.weight, model.extra.weight)
    assert loaded.note == "mine"


def test_strict_loading_of_the_model_is_respected(tmp_path):
    state = compacted().state_dict()
    del state["out.bias"]
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    model = dense(1)
    model.strict_loading = False
    assert load_pruned(tmp_path / "last.ckpt", model).conv.out_channels == 4


# reshape_


def test_reshape_keeps_the_values_that_remain():
    model = make_growable()
    weight = model[0].weight.detach().clone()
    structure = structure_of(cut_growable([True, False, True, True]))
    reshape_(model, structure)
    assert torch.equal(model[0].weight, weight[[0, 2, 3]])
    assert model[2].in_features == 3
    reshape_(model, structure_of(make_growable()), loaded=["0.weight", "0.bias", "2.weight"])
    assert torch.equal(model[0].weight[[0, 2, 3]], weight[[0, 2, 3]])
    assert model[0].weight[1].tolist() == [0.0, 0.0, 0.0]
