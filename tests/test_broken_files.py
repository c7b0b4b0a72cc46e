"""Files that are broken or hostile: an error that says what is wrong, or the very same model; never anything else."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune.checkpoint import KEY, describe, load_pruned, save_pruned, structure_of
from lightning_prune.compact import compact_
from lightning_prune.errors import CheckpointError
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import convert_

FORMATS = ["ckpt", "safetensors"]
CALLED: list[str] = []


class Net(nn.Module):
    """Ten hidden channels between a normed layer and its reader."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def pruned(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model, unit = Net(), MutableChannel(10)
    convert_(model.first).get_mutable_attr("out_channels").register_mutable(unit, 0, 10)
    convert_(model.norm).get_mutable_attr("in_channels").register_mutable(unit, 0, 10)
    convert_(model.last).get_mutable_attr("in_channels").register_mutable(unit, 0, 10)
    unit.current_choice = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 0, 1], dtype=torch.bool)
    compact_(model)
    return model


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"model.{request.param}"
    save_pruned(pruned(), path, hyper_parameters={"width": 10})
    return path


def is_refused_or_right(path: Path, data: bytes, expected: dict[str, torch.Tensor], target: Net) -> bool:
    """Write the data, load it; True if it was refused. Asserts that it is right otherwise."""
    path.write_bytes(data)
    before = copy.deepcopy(target.state_dict())
    found, refusal = target.state_dict(), ""
    try:
        found = load_pruned(path, target).state_dict()
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert str(path) in refusal
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
        assert target.first.out_features == 10
        return True
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    return False


def test_a_file_cut_at_every_hundredth_is_refused(file: Path) -> None:
    data, expected = file.read_bytes(), pruned().state_dict()
    lengths = [len(data) * percent // 100 for percent in range(100)] + [len(data) - 1]
    assert all(is_refused_or_right(file, data[:length], expected, Net()) for length in lengths)


@pytest.mark.filterwarnings("ignore")  # torch and pickle wonder aloud at what they read
def test_a_flipped_byte_is_refused_or_changes_nothing(file: Path) -> None:
    data, expected = file.read_bytes(), pruned().state_dict()
    places = random.Random(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        changed[places.randrange(len(data))] ^= places.randrange(1, 256)
        refused += is_refused_or_right(file, bytes(changed), expected, Net())
    assert refused > 200  # padding and dates of an archive are nobody's


def test_a_flipped_byte_of_a_weight_is_refused(file: Path) -> None:
    data, weight = file.read_bytes(), pruned().last.weight.detach().numpy().tobytes()
    place = data.index(weight) + 5
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CheckpointError, match="checksum"):
        load_pruned(file, Net)


def packed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    save_pruned(pruned(), path)
    packed(path)
    with pytest.raises(CheckpointError, match="is packed"):
        load_pruned(path, Net)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return CALLED.append, ("executed",)


@pytest.mark.parametrize("key", ["hyper_parameters", "callbacks"])
def test_code_in_a_file_is_named_and_not_executed(key: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    model = pruned()
    content = {"epoch": 3, "state_dict": model.state_dict(), KEY: structure_of(model), key: {"run": functools.partial}}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"functools\.partial in its entry '{key}'.*weights_only=False"):
        load_pruned(path, Net)
    with pytest.raises(CheckpointError, match=r"functools\.partial"):
        describe(path)
    if key == "callbacks":
        assert load_pruned(path, Net, weights_only=False).first.out_features == 6


def test_code_without_an_archive_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        load_pruned(path, Net)
    torch.save({"state_dict": {}, "x": Evil()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        load_pruned(path, Net)
    assert CALLED == []


def expanded(size: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.long).expand(size)


INDICES = {
    "out of range": torch.tensor([0, 2, 3, 5, 7, 10]),
    "negative": torch.tensor([-1, 2, 3, 5, 7, 9]),
    "twice": torch.tensor([0, 2, 2, 5, 7, 9]),
    "huge": torch.tensor([0, 2, 3, 5, 7, 2**62]),
    "more than there are": torch.arange(11),
    "a trillion of them": expanded(10**12),
    "on no device": torch.empty(10**12, dtype=torch.long, device="meta"),
    "sparse": torch.tensor([0, 2, 3, 5, 7, 9]).to_sparse(),
    "numbers of another kind": torch.tensor([0.0, 2, 3, 5, 7, 9]),
}


@pytest.mark.parametrize("size", [10, 10**15], ids=["the model's size", "a huge size"])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
def test_indices_that_cannot_be_are_refused_before_anything_is_made(
    indices: torch.Tensor, size: int, tmp_path: Path
) -> None:
    path, model = tmp_path / "model.ckpt", pruned()
    structure = copy.deepcopy(structure_of(model))
    structure["tensors"]["first.bias"] = {"shape": [size], "kept": {"0": indices}}
    torch.save({"state_dict": dict(model.state_dict()), KEY: structure}, path)
    with pytest.raises(CheckpointError, match=r"tensor 'first\.bias'"):
        load_pruned(path, Net)


INTEGERS = {
    "more than dense": {"full": 10, "kept": 11},
    "negative": {"full": 10, "kept": -6},
    "huge": {"full": 10, "kept": 10**30},
    "both huge": {"full": 10**30, "kept": 6},
}


@pytest.mark.parametrize("pair", INTEGERS.values(), ids=INTEGERS.keys())
def test_integers_that_cannot_be_are_refused(pair: dict[str, int], tmp_path: Path) -> None:
    path, model = tmp_path / "model.ckpt", pruned()
    structure = copy.deepcopy(structure_of(model))
    structure["integers"]["first"]["out_features"] = pair
    torch.save({"state_dict": dict(model.state_dict()), KEY: structure}, path)
    with pytest.raises(CheckpointError, match=r"first.*out_features|out_features.*first"):
        load_pruned(path, Net)


def with_value(value: torch.Tensor):
    model = pruned()
    return {"state_dict": {**model.state_dict(), "first.bias": value}, KEY: structure_of(model)}


VALUES = {
    "NaN": (torch.tensor([1.0, 2, 3, float("nan"), 5, 6]), "NaN in 1 of 6 entries"),
    "whole numbers": (torch.arange(6), r"torch\.int64"),
    "complex": (torch.zeros(6, dtype=torch.cfloat), r"torch\.complex64"),
    "sparse": (torch.arange(6.0).to_sparse(), r"sparse_coo"),
    "nowhere": (torch.empty(6, device="meta"), "on meta"),
}


@pytest.mark.parametrize(("value", "message"), VALUES.values(), ids=VALUES.keys())
def test_values_that_are_no_weights_are_refused(value: torch.Tensor, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(with_value(value), path)
    target = Net()
    before = target.first.bias.detach().clone()
    with pytest.raises(CheckpointError, match=rf"'first\.bias'.*{message}|{message}.*'first\.bias'"):
        load_pruned(path, target)
    assert torch.equal(target.first.bias, before)


def test_a_tensor_bigger_than_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            claimed = data.replace(b"K\x02\x85", b"J\x00\x00\x00\x10\x85") if name.endswith("data.pkl") else data
            assert claimed != data or not name.endswith("data.pkl")
            archive.writestr(name, claimed)
    with pytest.raises(CheckpointError, match=r"damaged: .*storage"):
        load_pruned(path, nn.Linear(1, 2, bias=False))


def test_a_hook_that_fails_on_the_file_is_a_bad_file(tmp_path: Path) -> None:
    class Hooked(Net):
        def on_load_checkpoint(self, checkpoint):
            self.note = checkpoint["note"]

    save_pruned(pruned(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"on_load_checkpoint.*KeyError\('note'\)"):
        load_pruned(tmp_path / "model.ckpt", Hooked)
