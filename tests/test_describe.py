"""What `describe` tells of a file, and how small the structure in it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import ChannelMutator, describe, export_pruned, save_pruned
from lightning_prune.checkpoint import KEY, structure_of
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import convert_
from tests.saved import SUFFIXES, Arguments, Tied, dynamic_, with_small
from tests.zoo import ZOO


def test_describe_tells_what_is_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = with_small(lambda: Arguments(6, scale=2.0))
    structure = structure_of(module, units={"embed": 4}, progress={"progress": 1.0, "last": 3})
    content = {"state_dict": module.state_dict(), KEY: structure, "epoch": 3, "pytorch-lightning_version": "2.6"}
    torch.save({**content, "hyper_parameters": {"width": 6, "scale": 2.0}}, tmp_path / "last.ckpt")
    found = describe(tmp_path / "last.ckpt")
    text = capsys.readouterr().out
    assert str(found) + "\n" == text
    # 7 tokens of 6 channels, the four vectors of the norm and its counter
    assert found.entries == {"dense": 7 * 6 + 4 * 6 + 1, "kept": 7 * 4 + 4 * 4 + 1, "stored": 7 * 4 + 4 * 4 + 1}
    for line in [
        "last.ckpt: a checkpoint of Lightning, epoch 3",
        "entries of tensors: 67 -> 45 (67.2%), stored small",
        "schedule: progress 1.0, last 3",
        "  scale  2.0",
        "  embed  4",
        "  net.embed.weight       [7, 6] -> [7, 4]",
        "  net.embed.embedding_dim  6 -> 4",
    ]:
        assert line in text
    assert json.loads(json.dumps(found.to_dict()))["tensors"]["net.embed.weight"]["is_cut"]


def test_describe_tells_a_full_sized_file(tmp_path: Path) -> None:
    net = Tied()
    dynamic_(net)
    save_pruned(net, tmp_path / "net.ckpt")
    assert "67 -> 45 (67.2%), stored full-sized, loads small" in str(describe(tmp_path / "net.ckpt"))


def test_describe_tells_a_file_without_a_structure(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "net.pt")
    assert "tensors\nstructure: none\nentries of tensors: 67 -> 67 (100.0%), stored dense" in str(
        describe(tmp_path / "net.pt")
    )


def test_equal_indices_are_stored_once() -> None:
    case = ZOO["bottleneck"]
    mutator = ChannelMutator(example_input=case.inputs())
    mutator.prepare_from_supernet(case.make())
    mutator.set_choices({unit.name: 0.5 for unit in mutator.mutable_units})
    for model in (mutator.model, export_pruned(mutator.model)):
        kept = [indices for entry in structure_of(model)["tensors"].values() for indices in entry["kept"].values()]
        values = {tuple(indices.tolist()) for indices in kept}
        assert len({id(indices) for indices in kept}) == len(values) == len(mutator.units)
        assert len(kept) > 3 * len(values)


@SUFFIXES
def test_a_file_is_little_larger_than_that_of_a_narrow_model(suffix: str, tmp_path: Path) -> None:
    model, unit = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), MutableChannel(128)
    for index, attr in ((0, "out_channels"), (2, "in_channels")):
        convert_(model[index]).get_mutable_attr(attr).register_mutable(unit, 0, 128)
    unit.current_choice = torch.arange(128) % 2 == 0
    save_pruned(export_pruned(model), tmp_path / f"pruned{suffix}")
    save_pruned(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), tmp_path / f"narrow{suffix}")
    sizes = [(tmp_path / f"{name}{suffix}").stat().st_size for name in ("pruned", "narrow")]
    assert sizes[0] <= 1.05 * sizes[1]
