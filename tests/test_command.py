"""The command `lightning-prune`: every verb in a process of its own, and what it says when something is wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Subset

from lightning_prune import load_pruned
from lightning_prune.checkpoint import structure_of
from lightning_prune.cli import main
from lightning_prune.cli.models import load_model, make_input
from lightning_prune.errors import ConfigError
from lightning_prune.sensitivity import SensitivityRow, SensitivityTable
from lightning_prune.targets import parse_target
from tests.lit import LitNet, data
from tests.test_export_files import Net, run_file
from tests.torchvision_shim import import_torchvision

NET = "tests.test_export_files.Net"
INPUT = ["--input", "2x3x8x8"]
NAMES = ["first_(0, 64)_out_2_in_2", "second_(0, 64)_out_1_in_1"]
ROOT = Path(__file__).resolve().parent.parent


def run(*words: str | Path, code: int = 0) -> str:
    """Run the command from the root of the repository; return stdout, or stderr if it is to fail."""
    command = [sys.executable, "-m", "lightning_prune.cli", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == code, found.stderr
    return found.stderr if code else found.stdout


def run_json(*words: str | Path) -> Any:
    return json.loads(run(*words, "--json"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prune` writes; it is a verb as well."""
    path = tmp_path_factory.mktemp("command") / "small.ckpt"
    found = run_json("prune", NET, "{macs: 0.5}", "-o", path, *INPUT)
    macs = found["costs"]["macs"]
    assert 0.4 < macs["pruned"] / macs["dense"] <= 0.5
    assert load_pruned(path, Net()).first.out_channels == found["units"][NAMES[0]] < 64
    return path


def test_units_writes_what_a_target_reads(tmp_path: Path) -> None:
    assert str(tmp_path / "units.yaml") in run("units", NET, *INPUT, "--choices", "-o", tmp_path / "units.yaml")
    written = OmegaConf.to_container(OmegaConf.load(tmp_path / "units.yaml"))
    assert list(written) == NAMES
    assert set(parse_target(tmp_path / "units.yaml").choices) == set(NAMES)


def test_inspect_tells_units_frozen_axes_and_costs() -> None:
    found = run_json("inspect", NET, *INPUT)
    assert [row["name"] for row in found["units"]] == NAMES
    assert {"tensor": "head.bias", "axis": 0, "size": 5, "reason": "model output"} in found["frozen"]
    assert found["costs"]["macs"]["minimum"] < found["costs"]["macs"]["dense"]


def test_describe_tells_the_units(pruned: Path) -> None:
    assert "  head.weight        [5, 64] -> [5, " in run("describe", pruned)


def test_export_writes_a_program(pruned: Path, tmp_path: Path) -> None:
    found = run_json("export", pruned, NET, "-o", tmp_path / "small.pt2", *INPUT)
    assert found["bytes"] == (tmp_path / "small.pt2").stat().st_size
    images = torch.randn(4, 3, 8, 8)
    expected = load_pruned(pruned, Net()).eval()(images)
    torch.testing.assert_close(run_file(tmp_path / "small.pt2", images), expected)


def test_bench_measures_both(pruned: Path) -> None:
    found = run_json("bench", NET, pruned, "--input=4x3x256x256", "--rounds=3", "--threads=1")
    assert found["times"]["eager"]["ratio"]["median"] > 0
    assert found["sizes"]["pruned"]["macs"] <= found["sizes"]["dense"]["macs"] / 2
    peak = found["peak_memory"]["eager"]
    activations = 4 * 256 * 256 * 4  # bytes of one channel; those of two layers are alive at once
    assert 2 * 64 * activations < peak["dense"]["added"] < peak["dense"]["peak"]
    assert peak["dense"]["added"] - peak["pruned"]["added"] > 20 * activations


def test_compare_tells_units_side_by_side(pruned: Path) -> None:
    found = run_json("compare", pruned, pruned)
    assert list(found["units"]) == NAMES
    assert all(first == second for first, second in found["units"].values())


@pytest.mark.parametrize("is_measured", [False, True], ids=["structure", "sensitivity too"])
def test_plot_draws_the_units(is_measured: bool, pruned: Path, tmp_path: Path) -> None:
    words = ["--sensitivity", str(tmp_path / "table.json")] if is_measured else []
    rows = (SensitivityRow(NAMES[0], 64, (32, 16), (0.5, 0.9)),)  # of one unit of two
    SensitivityTable("val_loss", "min", 0.25, (0.5, 0.25), rows).save(tmp_path / "table.json")
    found = run_json("plot", NET, pruned, "-o", tmp_path / "units.svg", *INPUT, *words)
    assert found["units"][0]["kept"] < found["units"][0]["channels"] == 64
    assert found["units"][0].get("sensitivity") == ({"0.5": 0.5, "0.25": 0.9} if is_measured else None)
    assert "sensitivity" not in found["units"][1]
    drawing = (tmp_path / "units.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert drawing.count('id="patch_') >= 6  # a bar for dense, kept and cost of both units
    assert drawing.count('id="axes_') == 2 + is_measured
    assert ("val_loss with the unit pruned alone" in drawing) == is_measured


# In this process


def test_the_script_of_the_package_is_the_command() -> None:
    line = 'lightning-prune = "lightning_prune.cli:main"'
    assert f"[project.scripts]\n{line}\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["units", "inspect", "prune", "describe", "export", "bench", "compare", "plot"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["bogus"], ["prune", NET], ["inspect"], ["describe", "x", "--more"]], ids=" ".join
)
def test_a_wrong_call_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: lightning-prune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["describe", "none.ckpt"], "No such file", id="no file"),
        pytest.param(["inspect", "nowhere.Net"], "No module named 'nowhere'", id="no package"),
        pytest.param(["inspect", "tests.test_export_files.Nett"], "Did you mean 'Net'", id="no class"),
        pytest.param(
            ["inspect", "resnet50"], "expected package.module.Class, or one of torchvision:name", id="no path"
        ),
        pytest.param(["inspect", NET, "--arguments={depth: 3}"], "cannot be made from {'depth': 3}", id="arguments"),
        pytest.param(["inspect", NET, "--input=2,x"], "expected shapes such as 2x3x224x224", id="input"),
        pytest.param(["prune", NET, "0.5", "-o=x.ckpt", "--importance=taylor"], "watch training", id="importance"),
        pytest.param(["prune", NET, "{macs: 0.0001}", "-o=x.ckpt", *INPUT], "macs", id="target"),
        pytest.param(["prune", NET, "0.5", "-o=x.ckpt", "--divisor=0", *INPUT], "Got divisor=0", id="divisor"),
        pytest.param(["inspect", NET, "--min_ratio=2", *INPUT], "min_ratio=2.0; expected", id="floor"),
    ],
)
def test_what_cannot_be_done_is_code_1(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lightning-prune {words[0]}: ")
    assert message in error


def test_a_zoo_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["inspect", "timm:resnet18"]) == 1
    assert "pip install timm" in capsys.readouterr().err


class Unpicklable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.activation = lambda x: x


def test_bench_tells_why_memory_is_missing(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"{__name__}.Unpicklable", str(pruned), *INPUT, "--rounds=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "Unpicklable, which cannot be pickled" in found["peak_memory"]["eager"]["error"]
    assert found["times"]["eager"]["ratio"]["median"] > 0


def test_plot_refuses_a_table_of_another_model(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = SensitivityRow("first_(0, 32)_out_2_in_2", 32, (16,), (0.5,))
    SensitivityTable("val_loss", "min", 0.25, (0.5,), (row,)).save(tmp_path / "table.json")
    words = ["plot", NET, str(pruned), "-o", str(tmp_path / "units.png"), *INPUT]
    assert main([*words, "--sensitivity", str(tmp_path / "table.json")]) == 1
    assert f"none of the units of the model. Did you mean '{NAMES[0]}'" in capsys.readouterr().err
    assert not (tmp_path / "units.png").exists()


def test_compare_refuses_other_models(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tmp_path / "other.ckpt")
    assert main(["prune", NET, "0.5", "-o", other, "--arguments={width: 32}", *INPUT]) == 0
    assert main(["compare", str(pruned), other]) == 1
    assert "different dense models" in capsys.readouterr().err


def test_a_checkpoint_prunes_on(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = tmp_path / "smaller.safetensors"
    words = [
        "prune",
        NET,
        "{params: 0.6}",
        "-o",
        str(smaller),
        "--checkpoint",
        str(pruned),
        "--importance={name: lp, p: 3}",
    ]
    assert main([*words, *INPUT]) == 0
    assert load_pruned(smaller, Net()).first.out_channels < load_pruned(pruned, Net()).first.out_channels


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("2x3", [(2, 3)]),
        ("2x3, int64:2x4<9", [(2, 3), (2, 4)]),
        ("ids=int64:2x4,mask=float32:2x4", {"ids": (2, 4), "mask": (2, 4)}),
    ],
    ids=["one", "two", "named"],
)
def test_inputs_are_written_as_shapes(text: str, shapes: Any) -> None:
    found = make_input(text, torch.nn.Identity())
    if isinstance(shapes, dict):
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
        assert found["ids"].dtype == torch.int64
    else:
        found = [found] if isinstance(found, torch.Tensor) else found
        assert [tuple(tensor.shape) for tensor in found] == shapes


class Data(LightningDataModule):
    """A few batches."""

    def __init__(self, batches: int = 9) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(Subset(data(), range(2 * self.batches)), 2)


def make_lit() -> LitNet:
    torch.manual_seed(0)
    return LitNet()


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_data_prune_by_what_training_shows_and_train_nothing(
    importance: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", f"{__name__}:make_lit", "{macs: 0.5}", "-o", str(tmp_path / "small.ckpt"), "--input=2x3x6x6"]
    words += [f"--importance={importance}", "--divisor=1", "--json"]
    level = logging.getLogger("lightning.pytorch").level
    assert main([*words, f"--data={__name__}.Data"]) == 0
    assert logging.getLogger("lightning.pytorch").level == level != logging.ERROR
    small, dense = load_pruned(tmp_path / "small.ckpt", LitNet), make_lit()
    kept = json.loads(capsys.readouterr().out)["units"]
    assert small.conv1.out_channels == next(iter(kept.values())) < 16
    indices = structure_of(small)["tensors"]["conv1.weight"]["kept"]["0"]
    assert torch.equal(small.conv1.weight, dense.conv1.weight[indices])
    assert torch.equal(small.norm.running_mean, torch.zeros(len(indices)))
    assert main([*words, f"--data={__name__}.Data", "--data_arguments={batches: 1}"]) == 1
    assert "fewer than 2 batches" in capsys.readouterr().err


def test_a_function_or_a_module_gives_a_model() -> None:
    assert isinstance(load_model("tests.test_export_files:make", {"width": 8}), Net)
    with pytest.raises(ConfigError, match="gives dict; expected a torch module"):
        load_model("builtins.dict")


@pytest.mark.filterwarnings("ignore")  # of the zoos, about themselves
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_zoos_have_short_forms_and_know_their_input(name: str) -> None:
    import_torchvision()
    model = load_model(name, {"num_classes": 7})
    images = make_input(None, model)
    assert images.shape[:2] == (2, 3)
    assert model(images[:1, :, :64, :64]).shape == (1, 7)
    with pytest.raises(ConfigError, match="cannot be made from"):
        load_model(name.split(":")[0] + ":nothing")


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_of_hugging_face_gives_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 50, **sizes}))
    assert main(["inspect", f"hf:{tmp_path}", "--input", "input_ids=int64:2x9<50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any(row["num_channels"] == 24 for row in found["units"])
