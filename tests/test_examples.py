"""The demo, cut short: it runs from its configuration file and leaves a checkpoint that can be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits.py"
CONFIG = str(ROOT / "configs" / "digits_resnet.yaml")


def run(*arguments: str, cwd: Path) -> str:
    """Run the example in a directory that goes away and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(DIGITS), *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_its_configuration_prints_back(tmp_path: Path) -> None:
    assert "PruningCallback" in run("--config", CONFIG, "--print_config", cwd=tmp_path)


def test_digits_ends_at_half_the_macs_in_a_checkpoint_that_loads(tmp_path: Path) -> None:
    printed = run("--config", CONFIG, "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false", cwd=tmp_path)
    folder = tmp_path / "runs" / "digits"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for model in ("dense", "pruned"):
        assert set(report[model]) == {"accuracy", "macs", "params", "bytes", "latency_ms"}
        assert report[model]["accuracy"] > 0.2  # ten classes, three epochs
    # 3x3 convolutions: 16 channels on 8x8, 32 on 4x4, 64 on 2x2, the first of a stage reading half as many, 1x1
    # shortcuts; then the head.
    stages = (
        64 * 9 * (1 * 16 + 6 * 16 * 16),
        16 * (9 * (16 * 32 + 5 * 32 * 32) + 16 * 32),
        4 * (9 * (32 * 64 + 5 * 64 * 64) + 32 * 64),
    )
    assert report["dense"]["macs"] == sum(stages) + 64 * 10
    assert 0.49 < report["pruned"]["macs"] / report["dense"]["macs"] <= 0.5
    assert report["pruned"]["params"] < report["dense"]["params"]
    assert report["pruned"]["bytes"] < report["dense"]["bytes"]
    assert (folder / "channels.png").stat().st_size > 1000
    assert f"{report['pruned']['macs']:,}" in printed
    state = torch.load(folder / "pruned.ckpt", weights_only=True)["state_dict"]
    assert sum(t.numel() for t in state.values() if t.dim() == 4) < report["pruned"]["params"]  # small tensors
