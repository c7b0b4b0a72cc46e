"""`examples/config_pruning.py`: units -> YAML -> edit -> a small model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from config_pruning import main
from omegaconf import OmegaConf

from lightning_prune import load_pruned
from tests.test_export_files import Net

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "config_pruning.py"
NET = ["tests.test_export_files.Net", "--input=2x3x8x8"]
FIRST, SECOND = "first_(0, 64)_out_2_in_2", "second_(0, 64)_out_1_in_1"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the script in this process, in a folder that goes away."""

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["config_pruning.py", *words])
        monkeypatch.setattr(sys, "path", [*sys.path])
        main()

    monkeypatch.chdir(tmp_path)
    return call


def test_the_file_is_written_edited_by_hand_and_followed(run, capsys: pytest.CaptureFixture[str]) -> None:
    run(*NET, "--structure=edited.yaml")
    assert capsys.readouterr().out == "edited.yaml: 2 units\n"
    choices = OmegaConf.load("edited.yaml")
    assert dict(choices) == {FIRST: 1.0, SECOND: 1.0}
    choices[SECOND] = 10
    OmegaConf.save(choices, "edited.yaml")
    run(*NET, "--structure=edited.yaml", "--output=small.ckpt")
    small = load_pruned("small.ckpt", Net())
    assert (small.first.out_channels, small.second.out_channels) == (64, 10)
    assert f"{SECOND}: 10 of 64" in capsys.readouterr().out


def test_it_edits_the_file_and_goes_on_from_weights(run) -> None:
    run(*NET, "--set", "*=0.5", "--set", f"{FIRST}=48", "--output=small.safetensors", "--importance=l2")
    assert dict(OmegaConf.load("units.yaml")) == {FIRST: 48.0, SECOND: 0.5}
    run(*NET, "--checkpoint=small.safetensors", "--structure=again.yaml", "--set", "first*=12", "--output=less.ckpt")
    small = load_pruned("less.ckpt", Net())
    assert (small.first.out_channels, small.second.out_channels) == (12, 32)


def test_an_edit_of_nothing_is_told(run) -> None:
    with pytest.raises(SystemExit, match=r"Got --set third\*=0\.5, which matches no unit of units\.yaml: first_"):
        run(*NET, "--set", "third*=0.5")


def test_help_is_that_of_the_script() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "units -> YAML -> edit" in done.stdout
    assert "--structure" in done.stdout
