from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.checkpoint import (
    KEY,
    check_structure,
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


class Net(nn.Module):
    """A convolution, a norm, an attention-like block with sizes in Python ints, and a tied pair."""

    def __init__(self, width: int = 6, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.mix = Mix(width)
        self.embed = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(7, classes)

    def forward(self, x):
        y = self.mix(self.norm(self.conv(x)).relu().mean((2, 3)))
        return self.out(self.head(y))


class DoubleNet(Net):
    def __init__(self, width: int = 6):
        super().__init__(width)
        self.double()


class Mix(nn.Module):
    """Owns a raw parameter, a buffer that is not saved, and its size, twice."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.register_buffer("offset", torch.arange(width) / 8.0, persistent=False)
        self.width = width
        self.shape = (1, width)

    def forward(self, x):
        return x.view(-1, *self.shape[1:]) * self.scale / self.width + self.offset


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)


KEPT = (1, 0, 1, 1, 0, 1)
BATCH = torch.linspace(-1, 1, 100, dtype=torch.float64).view(2, 2, 5, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dense(seed: int = 0, **kwargs) -> Net:
    torch.manual_seed(seed)
    model = Net(**kwargs).double()
    register_structure_hooks(model)
    return model


def dynamic(seed: int = 0, kept: tuple[int, ...] | None = KEPT) -> tuple[Net, MutableChannel]:
    model = dense(seed)
    for module in (model.conv, model.norm, model.mix, model.embed, model.head, model.out):
        convert_(module, generic=True)
    unit = MutableChannel(6, "width")
    axes = [model.conv.get_mutable_attr("out_channels"), model.norm.get_mutable_attr("in_channels")]
    axes += [model.mix.axis_container("scale", 0), model.mix.axis_container("offset", 0)]
    axes += [model.embed.get_mutable_attr("out_channels"), model.head.get_mutable_attr("in_channels")]
    for axis in axes:
        axis.register_mutable(unit, 0, 6)
    model.mix.follow_integer("width", axes[2])
    model.mix.follow_integer("shape", axes[2], element=1)
    if kept is not None:
        unit.current_choice = torch.tensor(kept, dtype=torch.bool)
    return model, unit


def compacted(seed: int = 0) -> Net:
    model, _ = dynamic(seed)
    compact_(model)
    return model


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(module, DynamicOp) for module in model.modules())


def saved(model: nn.Module, path) -> str:
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"width": 6, "unused": "x"}}, path)
    return str(path)


def through_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


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


# Bad files


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_text(path):
    path.write_text("not a checkpoint")


def write_object(path):
    torch.save({"state_dict": {}, "hyper_parameters": functools.partial(print)}, path)


def write_list(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(truncate, "truncated or damaged", id="truncated"),
        pytest.param(write_text, "damaged", id="text"),
        pytest.param(write_object, "Python objects", id="objects"),
        pytest.param(write_list, "expected a checkpoint or a state dict", id="list"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(damage, message, tmp_path):
    path = tmp_path / "last.ckpt"
    saved(compacted(), path)
    damage(path)
    with pytest.raises(CheckpointError, match=rf"last\.ckpt.*{message}|{message}.*last\.ckpt"):
        load_pruned(path, dense(1))


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "none.ckpt", Net)


def test_a_class_without_its_arguments_says_what_to_do(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"'Mix', which cannot be built from the arguments \[\].*load_pruned"):
        load_pruned(path, Mix)


def test_small_tensors_without_a_structure_say_how_to_save_it(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(dict(compacted().state_dict()), path)
    with pytest.raises(CheckpointError, match=r"no structure.*'conv\.weight'.*register_structure_hooks"):
        load_pruned(path, dense(1))


def change(path):
    def apply(structure, value):
        *parents, last = path
        for key in parents:
            structure = structure[key]
        structure[last] = value

    return apply


WEIGHT = ("tensors", "conv.weight")
TAMPERED = {
    "newer version": (change(("version",)), 2, "version 2.*up to 1.*Upgrade"),
    "no version": (change(("version",)), "1", "without a version"),
    "no tensors": (change(("tensors",)), None, "without a mapping 'tensors'"),
    "caches": (change(("caches",)), ["a"], "caches"),
    "cache": (change(("caches",)), {"conv.weight": "else"}, "caches"),
    "no integers": (change(("integers",)), [], "without a mapping 'integers'"),
    "entry": (change(WEIGHT), 3, r"no shape and kept indices for tensor 'conv\.weight'"),
    "shape": (change((*WEIGHT, "shape")), [6, 2.0, 3, 3], r"shape \[6, 2\.0, 3, 3\]"),
    "other shape": (change((*WEIGHT, "shape")), [7, 2, 3, 3], r"another model.*'conv\.weight' is \[7, 2, 3, 3\]"),
    "axis": (change((*WEIGHT, "kept", "4")), torch.tensor([0]), "axis '4'"),
    "axis name": (change((*WEIGHT, "kept", 0)), torch.tensor([0]), "axis 0"),
    "index beyond": (change((*WEIGHT, "kept", "0")), torch.tensor([0, 6]), r"axis 0.*\[0, 6\)"),
    "index repeated": (change((*WEIGHT, "kept", "0")), torch.tensor([0, 0, 1, 2]), "not ascending"),
    "index empty": (change((*WEIGHT, "kept", "0")), torch.tensor([], dtype=torch.long), "not ascending"),
    "index type": (change((*WEIGHT, "kept", "0")), torch.tensor([0.0]), "not ascending"),
    "index count": (change((*WEIGHT, "kept", "0")), torch.tensor([0, 1]), r"\[4, 2, 3, 3\] for tensor 'conv\.weight'"),
    "integer": (change(("integers", "conv", "out_channels")), {"full": 6, "kept": "4"}, "whole numbers"),
    "integer missing": (change(("integers", "conv")), 4, "Got integers 4"),
    "other integer": (
        change(("integers", "conv", "out_channels")),
        {"full": 9, "kept": 4},
        r"out_channels = 9.*it is 6",
    ),
    "unknown integer": (change(("integers", "conv", "forward")), {"full": 9, "kept": 4}, r"conv\.forward = 9"),
    "unknown module": (change(("integers", "stem")), {"width": {"full": 9, "kept": 4}}, r"stem\.width = 9"),
    "unknown tensor": (change(("tensors", "stem.weight")), {"shape": [2], "kept": {}}, r"'stem\.weight'.*missing"),
}


@pytest.mark.parametrize(("apply", "value", "message"), TAMPERED.values(), ids=TAMPERED.keys())
@pytest.mark.parametrize("make", [lambda: dense(1), lambda: dynamic(1, None)[0]], ids=["dense", "dynamic"])
def test_a_tampered_structure_is_named_and_the_model_is_as_it_was(apply, value, message, make, tmp_path):
    model, path = compacted(), tmp_path / "last.ckpt"
    structure = copy.deepcopy(structure_of(model))
    apply(structure, value)
    torch.save({"state_dict": dict(model.state_dict()), KEY: structure}, path)
    target = make()
    before, kinds = copy.deepcopy(target.state_dict()), [type(module) for module in target.modules()]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_pruned(path, target)
    assert [type(module) for module in target.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert target.conv.out_channels == 6


def test_well_formed_structures_pass():
    structure = structure_of(compacted())
    assert check_structure(structure) is structure


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda s: s.pop("out.bias"), r"'out\.bias' is in the model but not in the file", id="missing"),
        pytest.param(lambda s: s.update(stem=torch.zeros(1)), "'stem' is in the file but not in the model", id="extra"),
        pytest.param(lambda s: s.update({"out.bias": torch.zeros(9)}), r"\[9\] for tensor 'out\.bias'", id="shape"),
    ],
)
@pytest.mark.parametrize("through", ["load_pruned", "load_state_dict"])
def test_tensors_of_another_model_are_named_and_the_model_is_as_it_was(edit, message, through, tmp_path):
    state = compacted().state_dict()
    edit(state)
    target = dense(1)
    before = copy.deepcopy(target.state_dict())
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=message):
        load_pruned(tmp_path / "last.ckpt", target) if through == "load_pruned" else target.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert target.conv.out_channels == 6


def test_a_checkpoint_of_another_class_is_named(tmp_path):
    path = saved(compacted(), tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"another model.*'conv\.weight' is \[6, 2, 3, 3\] when dense; here it is \[5"
    ):
        load_pruned(path, Strange)


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
