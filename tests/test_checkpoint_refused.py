"""Files and structures that are refused, by name, and leave the model as it was."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from lightning_prune.checkpoint import (
    KEY,
    check_structure,
    load_pruned,
    structure_of,
)
from lightning_prune.errors import CheckpointError
from tests.checkpoint_nets import (
    Mix,
    Net,
    Strange,
    compacted,
    dense,
    dynamic,
    saved,
)


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
