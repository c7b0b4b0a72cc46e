"""Every recipe of `configs/` for `examples/train.py` runs from its command line, cut short, and ends at its target."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import train
from lightning.pytorch.cli import LightningCLI

from lightning_prune import PruningCallback, load_pruned
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # Lightning 2.6
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),  # of batches, since few are taken
]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BRIEF = ("--trainer.max_epochs=4", "--trainer.limit_train_batches=4")
MACS = {"macs": 0.5}
RECIPES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "taylor_accumulation": (BRIEF, MACS),
    "fisher_per_cost": (BRIEF, {"macs": 0.4}),
    "bn_slimming": (BRIEF, {"channels": 0.6}),
    "unit_structure": (BRIEF, {}),
    "params_and_memory": (BRIEF, {"params": 0.5, "memory": 0.7}),
    "one_shot": (BRIEF, {"macs": 0.3}),
    "steps": (("--trainer.max_steps=12", "--trainer.callbacks.schedule.every=2"), MACS),
    "bf16": (BRIEF, MACS),
    "vit_heads": (BRIEF, {}),
}


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    file = str(CONFIGS / f"{name}.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", file, *quiet, *arguments])
    return train.main()


def callback_of(cli: LightningCLI) -> PruningCallback:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, PruningCallback))


def test_every_configuration_is_run() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*RECIPES, "digits_resnet"}  # that one by test_examples


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_at_its_target(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, target = RECIPES[name]
    cli = run(name, *arguments, monkeypatch=monkeypatch)
    callback = callback_of(cli)
    assert callback.is_done
    assert not dynamic_ops(cli.model)
    cost, counts = callback.mutator.graph.cost, callback.mutator.counts()
    for key, bound in target.items():
        assert cost.measure(key, counts) <= bound * cost.measure(key, cost.full)
    assert (counts != cost.full).any()
    (path,) = (tmp_path / "runs" / name / "checkpoints").glob("*.ckpt")
    small = load_pruned(path, type(cli.model))
    shapes = {key: value.shape for key, value in cli.model.named_parameters()}
    assert {key: value.shape for key, value in small.named_parameters()} == shapes


def test_units_keep_what_the_structure_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    features = run("unit_structure", *BRIEF, monkeypatch=monkeypatch).model.features
    # halves of 8, 16 and 32 channels; the last glob gives the first block of the last stage 24
    assert [features[k].conv1.out_channels for k in (3, 6, 9, 10)] == [4, 8, 24, 16]
    assert [features[k].conv2.out_channels for k in (3, 6, 9, 11)] == [8, 16, 24, 24]


def test_the_transformer_keeps_half_of_its_heads_and_its_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layer = run("vit_heads", *BRIEF, monkeypatch=monkeypatch).model.net.layers[0]
    assert (layer.attention.heads, tuple(layer.attention.qkv.weight.shape)) == (2, (48, 32))
    assert tuple(layer.mlp[0].weight.shape) == (64, 32)


def test_the_penalty_of_slimming_reaches_the_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--model.learning_rate=0.001")
    with_it, without = (
        run("bn_slimming", *short, f"--model.scale_penalty={penalty}", monkeypatch=monkeypatch).model
        for penalty in (10.0, 0.0)
    )
    assert with_it.features[1].weight.mean() < without.features[1].weight.mean() - 0.001


def test_a_mistake_in_a_recipe_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("steps", "--trainer.callbacks.divisr=4", monkeypatch=monkeypatch)
    assert "divisr" in capsys.readouterr().err
