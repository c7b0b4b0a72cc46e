"""Save in one way, load in another: without a Trainer, as safetensors, from LightningCLI, through the mixin."""

from __future__ import annotations

import argparse
import enum
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_prune import PrunableMixin, describe, load_pruned, save_pruned
from lightning_prune.checkpoint import KEY, structure_of
from lightning_prune.compact import compact_
from lightning_prune.errors import CheckpointError, ConfigError
from tests.saved import (
    SUFFIXES,
    TOKENS,
    Arguments,
    Mixed,
    Parts,
    Settings,
    Tied,
    dynamic_,
    save_by_trainer,
    small,
    with_small,
)

# save_pruned


@SUFFIXES
@pytest.mark.parametrize("form", ["small", "mid-schedule", "dense"])
def test_a_model_without_a_trainer_comes_back(form: str, suffix: str, tmp_path: Path) -> None:
    net = small() if form == "small" else Tied().eval()
    if form == "mid-schedule":
        dynamic_(net)
    path = tmp_path / f"net{suffix}"
    save_pruned(net, path, hyper_parameters={"width": 6, "scale": 1.0})
    loaded = load_pruned(path, Tied).eval()
    assert torch.equal(loaded(TOKENS), net(TOKENS))
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.embed.embedding_dim == (6 if form == "dense" else 4)
    assert str(structure_of(loaded)) == str(structure_of(net))
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@SUFFIXES
def test_folders_on_the_way_are_made(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / f"net{suffix}"
    save_pruned(small(), path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileExistsError, match=f"'{path}'"):
        save_pruned(small(), path / f"other{suffix}")


@SUFFIXES
def test_a_file_is_no_larger_than_that_of_a_narrow_model(suffix: str, tmp_path: Path) -> None:
    wide = small()
    save_pruned(wide, tmp_path / f"pruned{suffix}")
    save_pruned(Tied(4), tmp_path / f"narrow{suffix}")
    sizes = [(tmp_path / f"{name}{suffix}").stat().st_size for name in ("pruned", "narrow")]
    assert sizes[0] - sizes[1] < 3000  # the structure, of a few hundred indices


def test_another_process_loads_it_and_computes_the_same(tmp_path: Path) -> None:
    net, path = small(), tmp_path / "net.safetensors"
    save_pruned(net, path)
    code = "import sys, torch; from tests.test_saving import Tied, TOKENS; from lightning_prune import load_pruned\n"
    code += "torch.save(load_pruned(sys.argv[1], Tied()).eval()(TOKENS), sys.argv[2])"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    assert torch.equal(torch.load(tmp_path / "out.pt"), net(TOKENS))


def test_safetensors_store_tied_weights_once_and_text_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_pruned(small(), path)
    stored = load_file(path)
    assert set(stored) == {"embed.weight", *(f"norm.{name}" for name in Tied().norm.state_dict())}
    header = path.read_bytes()
    text = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    structure = json.loads(text["lightning_prune"])["content"][KEY]
    assert structure["tensors"]["embed.weight"]["kept"] == {"1": {"__tensor__": [0, 2, 3, 5]}}


def test_safetensors_of_others_load_where_they_fit(tmp_path: Path) -> None:
    net = Tied().eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "other.safetensors")
    assert torch.equal(load_pruned(tmp_path / "other.safetensors", Tied()).eval()(TOKENS), net(TOKENS))


@SUFFIXES
def test_tuples_and_lists_come_back_as_they_were(suffix: str, tmp_path: Path) -> None:
    arguments = {"width": 6, "scale": 0.5, "sizes": (1, [2, (3,)]), "name": None}
    save_pruned(small(), tmp_path / f"net{suffix}", hyper_parameters=arguments)
    assert describe(tmp_path / f"net{suffix}").hyper_parameters == arguments
    assert load_pruned(tmp_path / f"net{suffix}", Tied).scale == 0.5


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param({"a": [Colour.RED]}, r"hyper_parameters\['x'\]\['a'\]\[0\] of type Colour", id="enum"),
        pytest.param(Path("here"), r"hyper_parameters\['x'\] of type PosixPath.*ignore=", id="path"),
        pytest.param(nn.Linear(1, 1), r"of type Linear", id="module"),
    ],
)
def test_hyperparameters_that_would_need_code_are_refused_at_once(value, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.ckpt"
    path.write_text("what was there")
    with pytest.raises(ConfigError, match=message):
        save_pruned(small(), path, hyper_parameters={"x": value})
    assert path.read_text() == "what was there"


def test_safetensors_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown to JSON.*Write \.ckpt"):
        save_pruned(small(), tmp_path / "net.safetensors", hyper_parameters={"x": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


# The class and its arguments


def test_saved_arguments_make_the_model_and_given_ones_go_before(tmp_path: Path) -> None:
    module = with_small(lambda: Arguments(6, scale=2.0))
    save_pruned(module, tmp_path / "net.ckpt")
    assert load_pruned(tmp_path / "net.ckpt", Arguments).net.scale == 2.0
    assert load_pruned(tmp_path / "net.ckpt", Arguments, scale=3.0).net.scale == 3.0


@pytest.mark.parametrize("save", [save_by_trainer, save_pruned], ids=["Trainer", "save_pruned"])
def test_one_object_of_settings_comes_back_with_attributes(save, tmp_path: Path) -> None:
    save(with_small(lambda: Settings(argparse.Namespace(width=6))), tmp_path / "net.ckpt")
    assert load_pruned(tmp_path / "net.ckpt", Settings).net.embed.embedding_dim == 4


def test_without_arguments_the_error_shows_the_call(tmp_path: Path) -> None:
    save_pruned(with_small(lambda: Arguments(6)), tmp_path / "net.ckpt", hyper_parameters={"scale": 1.0})
    with pytest.raises(CheckpointError, match=r"Write load_pruned\('.*net\.ckpt', Arguments, width=\.\.\.\)"):
        load_pruned(tmp_path / "net.ckpt", Arguments)


def test_a_class_that_fails_on_saved_arguments_is_told(tmp_path: Path) -> None:
    save_pruned(small(), tmp_path / "net.ckpt", hyper_parameters={"width": -1})
    with pytest.raises(CheckpointError, match=r"'Tied', which cannot be built from the arguments \['width'\]"):
        load_pruned(tmp_path / "net.ckpt", Tied)


def test_arguments_beside_an_instance_are_refused(tmp_path: Path) -> None:
    save_pruned(small(), tmp_path / "net.ckpt")
    with pytest.raises(ConfigError, match=r"an instance of Tied and the arguments \['width'\]"):
        load_pruned(tmp_path / "net.ckpt", Tied(), width=6)
    with pytest.raises(ConfigError, match=r"Got 'net\.Tied' of type str; expected the class"):
        load_pruned(tmp_path / "net.ckpt", "net.Tied")  # type: ignore[type-var]


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "net.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"net\.ckpt, which cannot be read: it is truncated or damaged: EOFError"):
        load_pruned(tmp_path / "net.ckpt", Tied)


def test_strict_is_an_argument(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["norm.running_mean"]
    torch.save({"state_dict": state, KEY: structure_of(small())}, tmp_path / "net.ckpt")
    with pytest.raises(CheckpointError, match=r"'norm\.running_mean' is in the model but not in the file"):
        load_pruned(tmp_path / "net.ckpt", Tied)
    assert load_pruned(tmp_path / "net.ckpt", Tied, strict=False).norm.num_features == 4


def test_an_open_file_is_read(tmp_path: Path) -> None:
    save_pruned(small(), tmp_path / "net.ckpt")
    with (tmp_path / "net.ckpt").open("rb") as file:
        assert load_pruned(file, Tied).embed.embedding_dim == 4


# LightningCLI


@pytest.fixture
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # what Lightning calls


def save_by_cli(tmp_path: Path, *arguments: str, subclass: bool) -> Path:
    options = {
        "run": False,
        "save_config_callback": None,
        "seed_everything_default": False,
        "subclass_mode_model": subclass,
    }
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    cli = LightningCLI(LightningModule if subclass else Parts, args=list(arguments), trainer_defaults=quiet, **options)
    dynamic_(cli.model.net)
    compact_(cli.model)
    save_by_trainer(cli.model, tmp_path / "cli.ckpt")
    return tmp_path / "cli.ckpt"


@pytest.mark.usefixtures("_command_line")
@pytest.mark.filterwarnings("ignore:Attribute 'net'")  # Lightning's advice on modules as arguments
@pytest.mark.parametrize("subclass", [True, False], ids=["a class in the configuration", "a fixed class"])
def test_modules_that_the_command_line_made_come_back(subclass: bool, tmp_path: Path) -> None:
    start = [f"--model={__name__}.Parts"] if subclass else []
    path = save_by_cli(
        tmp_path, *start, f"--model.net={__name__}.Tied", "--model.net.scale=4", "--model.rate=0.5", subclass=subclass
    )
    loaded = load_pruned(path, Parts)
    assert (loaded.rate, loaded.net.scale, loaded.net.embed.embedding_dim) == (0.5, 4.0, 4)
    assert load_pruned(path, Parts, rate=0.25).rate == 0.25
    assert load_pruned(path, Parts, net=Tied(scale=8.0)).net.scale == 8.0


def tampered(path: Path, **changes) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"].update(changes)
    torch.save(checkpoint, path)
    return path


@pytest.mark.usefixtures("_command_line")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"net": {"class_path": "antigravity.Evil"}}, "names 'antigravity.Evil'", id="not imported"),
        pytest.param({"net": {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}}, "Popen", id="another"),
        pytest.param({"_class_path": "subprocess.Popen"}, "Popen", id="another model"),
        pytest.param({"_instantiator": "os.system"}, "made by 'os.system'", id="another instantiator"),
    ],
)
def test_classes_of_a_hostile_configuration_are_not_followed(changes, message: str, tmp_path: Path) -> None:
    path = save_by_cli(tmp_path, f"--model.net={__name__}.Tied", subclass=False)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_pruned(tampered(path, **changes), Parts)
    assert "antigravity" not in sys.modules


# PrunableMixin


def test_the_mixin_loads_itself_small(tmp_path: Path) -> None:
    module = with_small(lambda: Mixed(6, scale=2.0)).eval()
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    loaded = Mixed.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded.eval().net(TOKENS), module.net(TOKENS))
    assert loaded.loaded
    assert Mixed.load_from_checkpoint(tmp_path / "last.ckpt", scale=5.0).net.scale == 5.0
    (tmp_path / "hparams.yaml").write_text("width: 6\nscale: 7\n")
    other = Mixed.load_from_checkpoint(tmp_path / "last.ckpt", hparams_file=tmp_path / "hparams.yaml")
    assert other.net.scale == 7
    fresh = Mixed(6)
    fresh.load_state_dict(module.state_dict())
    assert fresh.net.embed.embedding_dim == 4


def test_the_mixin_names_the_file_and_refuses_bad_yaml(tmp_path: Path) -> None:
    save_pruned(small(), tmp_path / "last.ckpt", hyper_parameters={"width": 6})
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .*another model"):
        Mixed.load_from_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "hparams.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(CheckpointError, match="no plain YAML"):
        Mixed.load_from_checkpoint(tmp_path / "last.ckpt", hparams_file=tmp_path / "hparams.yaml")


def test_the_mixin_says_that_it_comes_first() -> None:
    with pytest.raises(ConfigError, match=r"Write it first: class Late\(PrunableMixin, LightningModule\)"):
        type("Late", (LightningModule, PrunableMixin), {})
