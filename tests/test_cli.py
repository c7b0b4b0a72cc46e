"""PruningCallback on the command line: YAML in every form, overrides, interpolation, help, and clear errors."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf

from lightning_prune import PruningCallback
from lightning_prune.importance import Importance, Mixture, SensitivityScores, l1
from lightning_prune.latency import LatencySettings
from lightning_prune.mutator.overrides import Override
from lightning_prune.ops import dynamic_ops
from lightning_prune.recovery import Recalibration
from lightning_prune.sensitivity import SensitivityRow, SensitivityTable
from tests.lit import QUIET, LitNet, loader
from tests.timing import slow

pytestmark = [  # Lightning 2.6 calls what jsonargparse 4.49 deprecated
    *QUIET,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

TRAINER: dict[str, Any] = {
    "max_epochs": 4,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


def late(progress: float) -> float:
    return progress**4


class Halves:
    """An importance of a user: a class with arguments."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def scores(self, units: Any, scope: str = "global") -> Any:
        return {unit.name: self.factor * l1(unit) for unit in units}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def command(*arguments: str, run: bool = False) -> LightningCLI:
    return LightningCLI(
        LitNet,
        Data,
        run=run,
        args=list(arguments),
        save_config_callback=None,
        seed_everything_default=0,
        parser_kwargs={"parser_mode": "omegaconf"},
    )


def config(path: Path, *, callback: str = "PruningCallback", **arguments: Any) -> str:
    """Write a configuration with one callback and return its path."""
    callbacks = [{"class_path": callback, "init_args": {"verbose": False, "divisor": 2, **arguments}}]
    file = path / "config.yaml"
    OmegaConf.save({"trainer": {**TRAINER, "default_root_dir": str(path), "callbacks": callbacks}}, file)
    return str(file)


def callback_of(cli: LightningCLI) -> PruningCallback:
    return next(c for c in cli.trainer.callbacks if isinstance(c, PruningCallback))


def parsed(path: Path, **arguments: Any) -> PruningCallback:
    return callback_of(command("--config", config(path, **{"target": 0.5, **arguments})))


@pytest.mark.parametrize(
    ("target", "costs", "choices"),
    [
        pytest.param(0.5, {}, {"*": 0.5}, id="ratio"),
        pytest.param({"macs": 0.5, "params": "2K"}, {"macs": 0.5, "params": 2000}, {}, id="costs"),
        pytest.param({"macs": 8}, {"macs": 8}, {}, id="absolute"),
        pytest.param({"conv1*": 8}, {}, {"conv1*": 8}, id="units"),
    ],
)
def test_targets(target: Any, costs: Any, choices: Any, tmp_path: Path) -> None:
    found = parsed(tmp_path, target=target).target
    assert (dict(found.costs), dict(found.choices)) == (costs, choices)


@pytest.mark.parametrize("report", [True, False, "val_acc"])
def test_a_report(report: bool | str, tmp_path: Path) -> None:
    found = parsed(tmp_path, report=report)._reporting.report
    assert (type(found), found) == (type(report), report)


def test_a_structure_file_as_target(tmp_path: Path) -> None:
    file = tmp_path / "units.yaml"
    file.write_text("conv1*: 0.25\n", encoding="utf-8")
    assert dict(parsed(tmp_path, target=str(file)).target.choices) == {"conv1*": 0.25}


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        pytest.param("l2", Importance("l2"), id="short name"),
        pytest.param({"name": "l2", "reduction": "max"}, Importance("l2", reduction="max"), id="mapping"),
        pytest.param({"name": "lp", "p": 3}, Importance("lp", arguments={"p": 3}), id="arguments of its own"),
        pytest.param("taylor", Importance("taylor"), id="watching"),
        pytest.param({"name": "taylor", "batches": 4}, Importance("taylor", batches=4), id="batches"),
        pytest.param(
            {"name": "mixture", "of": {"l1": 1.0, "fisher": 0.5}},
            Mixture([(Importance("l1"), 1.0), (Importance("fisher"), 0.5)]),
            id="mixture",
        ),
        pytest.param(
            {"class_path": "lightning_prune.importance.Importance", "init_args": {"name": "apoz", "batches": 2}},
            Importance("apoz", batches=2),
            id="class_path of a watching one",
        ),
        pytest.param("lightning_prune.importance.l1", Importance("lightning_prune.importance.l1"), id="function"),
        pytest.param(
            {"class_path": "lightning_prune.importance.Importance", "init_args": {"name": "bn_scale"}},
            Importance("bn_scale"),
            id="class_path",
        ),
    ],
)
def test_importances(importance: Any, expected: Importance, tmp_path: Path) -> None:
    assert parsed(tmp_path, importance=importance).importance == expected


def test_an_importance_class_of_ones_own(tmp_path: Path) -> None:
    given = {"class_path": f"{__name__}.Halves", "init_args": {"factor": 0.5}}
    found: Any = parsed(tmp_path, importance=given).importance
    assert (type(found).__name__, found.factor) == ("Halves", 0.5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param("linear", ("linear", 0.0, 0.5, 1), id="short name"),
        pytest.param({"kind": "cubic", "begin": 2, "end": 0.75}, ("cubic", 2, 0.75, 1), id="mapping"),
        pytest.param({"end": "${trainer.max_epochs}", "every": 2}, ("cubic", 0.0, 4, 2), id="interpolation"),
        pytest.param(
            {"class_path": "lightning_prune.Schedule", "init_args": {"kind": "one_shot", "end": 3}},
            ("one_shot", 0.0, 3, 1),
            id="class_path",
        ),
    ],
)
def test_schedules(schedule: Any, expected: Any, tmp_path: Path) -> None:
    found = parsed(tmp_path, schedule=schedule).schedule
    assert (found.kind, found.begin, found.end, found.every) == expected
    assert type(found.begin) is type(expected[1])


@pytest.mark.parametrize("key", [None, "kind"])
def test_a_curve_of_ones_own(key: str | None, tmp_path: Path) -> None:
    path = f"{__name__}.late"
    found = parsed(tmp_path, schedule=path if key is None else {key: path, "end": 4}).schedule
    assert found.curve(0.5) == 0.0625


def test_other_arguments(tmp_path: Path) -> None:
    found = parsed(
        tmp_path,
        scope="local",
        ignore=["head", "conv1*"],
        divisor=8.0,
        min_ratio=0.25,
        compact="never",
        submodule="conv1",
        reset_monitors=False,
        regrow=False,
        per_cost="macs",
        overrides={"head*": {"choice": 4}, "conv2*": {"min": 0.5, "max": 0.9, "divisor": 1}, "norm": {"ignore": True}},
        callback="lightning_prune.PruningCallback",
    )
    assert (found.scope, found.ignore, found.divisor, found.min_ratio) == ("local", ("head", "conv1*"), 8, 0.25)
    assert (found.compact, found.submodule, found.reset_monitors) == ("never", "conv1", False)
    assert (found.regrow, found.per_cost) == (False, "macs")
    assert found.overrides == {
        "head*": Override("head*", choice=4),
        "conv2*": Override("conv2*", min=0.5, max=0.9, divisor=1),
        "norm": Override("norm", ignore=True),
    }


@pytest.mark.parametrize("by_path", [False, True], ids=["name", "class path"])
def test_what_was_measured_as_importance(by_path: bool, tmp_path: Path) -> None:
    row = SensitivityRow("conv1", 16, (8,), (2.0,))
    SensitivityTable("val_loss", "min", 1.0, (0.5,), (row,)).save(tmp_path / "table.json")
    given: dict[str, Any] = {"table": str(tmp_path / "table.json"), "of": "l2"}
    path = {"class_path": "lightning_prune.importance.SensitivityScores", "init_args": given}
    found = parsed(tmp_path, importance=path if by_path else {"name": "sensitivity", **given}).importance
    assert isinstance(found, SensitivityScores)
    assert found.of == Importance("l2")


def test_recovery_in_yaml(tmp_path: Path) -> None:
    entries = [{"class_path": "lightning_prune.recovery.Recalibration", "init_args": {"batches": 3}}]
    [part] = parsed(tmp_path, recovery=entries)._recovery.recovery
    assert isinstance(part, Recalibration)
    assert part.batches == 3


def mean_square(student, teacher, batch):  # type: ignore[no-untyped-def]  # as most people write
    return (student - teacher).square().mean()


def squared(share):  # type: ignore[no-untyped-def]
    return share**2


def test_functions_of_recovery_in_yaml(tmp_path: Path) -> None:
    entries = [
        {"class_path": "Distillation", "init_args": {"loss": f"{__name__}.mean_square"}},
        {"class_path": "GroupLasso", "init_args": {"schedule": f"{__name__}.squared"}},
        {"class_path": "BNScaleL1", "init_args": {"schedule": "linear"}},
    ]
    distillation, lasso, scales = map(vars, parsed(tmp_path, recovery=entries)._recovery.recovery)
    assert distillation["loss"].__name__ == "mean_square"
    assert lasso["schedule"].__name__ == "squared"
    assert scales["schedule"] == "linear"


def test_a_mutator_in_yaml(tmp_path: Path) -> None:
    given = {
        "class_path": "lightning_prune.ChannelMutator",
        "init_args": {"ignore": ["conv1"], "overrides": {"*": {"max": 0.5}}},
    }
    mutator = parsed(tmp_path, mutator=given).mutator
    assert mutator is not None
    assert mutator.overrides == {"*": Override("*", max=0.5)}
    assert mutator.ignore == ("conv1",)


@pytest.mark.parametrize(
    ("importance", "schedule"),
    [
        pytest.param({"name": "l2"}, {"kind": "cubic", "end": 0.25}, id="mappings"),
        pytest.param({"name": "lp", "p": 3}, "linear", id="arguments of its own"),
        pytest.param({"name": "mixture", "of": {"l1": 1.0, "fisher": 0.5}}, "linear", id="mixture"),
        pytest.param("l2", "linear", id="names"),
    ],
)
def test_what_is_printed_can_be_read_back(
    importance: Any, schedule: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = {"conv1*": {"min": 0.5}}
    file = config(tmp_path, target={"macs": 0.5}, importance=importance, schedule=schedule, overrides=units)
    with pytest.raises(SystemExit) as stop:
        command("--config", file, "--print_config")
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    first, again = (callback_of(command("--config", str(path))) for path in (file, printed))
    assert (first.target, first.importance, first.schedule) == (again.target, again.importance, again.schedule)
    assert (first.ignore, first.divisor, first.scope) == (again.ignore, again.divisor, again.scope)
    assert first.overrides == again.overrides == {"conv1*": Override("conv1*", min=0.5)}


def test_arguments_override_the_file(tmp_path: Path) -> None:
    file = config(tmp_path, target=0.5)
    found = callback_of(command("--config", file, "--trainer.callbacks.importance.reduction=max"))
    assert found.importance == Importance("magnitude", reduction="max")
    added = ("--trainer.callbacks+=PruningCallback", "--trainer.callbacks.target.macs=0.25")
    found = callback_of(command("--trainer.logger=false", *added))  # the default logger asks for a package by a warning
    assert dict(found.target.costs) == {"macs": 0.25}


def test_help_shows_every_argument_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--trainer.callbacks.help=PruningCallback")
    shown = " ".join(capsys.readouterr().out.split())
    documented = dict(re.findall(r"^        (\w+): (.{20})", str(PruningCallback.__doc__), flags=re.MULTILINE))
    for name in list(inspect.signature(PruningCallback.__init__).parameters)[1:]:
        assert f"--trainer.callbacks.{name} " in shown
        assert documented[name] in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param({"importanse": "l1"}, "importanse", id="key"),
        pytest.param({"importance": "bn_scael"}, "Did you mean 'bn_scale'", id="importance"),
        pytest.param({"schedule": {"kind": "cubik"}}, "Did you mean 'cubic'", id="schedule"),
        pytest.param({"scope": "globalx"}, "globalx", id="scope"),
        pytest.param({"divisor": "many"}, "many", id="divisor"),
        pytest.param({"schedule": {"kind": "cubic", "begn": 2}}, "Did you mean 'begin'", id="key of a schedule"),
        pytest.param({"importance": {"name": "taylor", "batchs": 4}}, "Did you mean 'batches'", id="criterion"),
        pytest.param({"target": {"macs": -1}}, "-1", id="negative target"),
        pytest.param({"target": None}, "target", id="no target"),
        pytest.param({"verbose": "loud"}, "loud", id="type"),
        pytest.param({"compact": "soon"}, "soon", id="choice"),
        pytest.param({"overrides": {"conv1": {"mx": 0.5}}}, "Did you mean 'max'", id="overrides"),
    ],
)
def test_mistakes_are_named(
    arguments: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:  # parsing exits, construction raises
        parsed(tmp_path, **arguments)
    assert text in capsys.readouterr().err + str(stop.value)


FACTORY = """
from lightning_prune import PruningCallback

def callbacks():
    return [PruningCallback(target={"macs": 0.5}, divisor=2, verbose=False, report=False)]
"""


@pytest.mark.parametrize("installed", [False, True], ids=["off by default", "a package that brings it"])
def test_a_package_may_bring_the_callback(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        (tmp_path / "pruning_for_all.py").write_text(FACTORY, encoding="utf-8")
        entry = "[lightning.pytorch.callbacks_factory]\npruning = pruning_for_all:callbacks\n"
        metadata = tmp_path / "pruning_for_all-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Name: pruning-for-all\nVersion: 1\n", encoding="utf-8")
        (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
    trainer = Trainer(**TRAINER)
    model = LitNet()
    trainer.fit(model, loader())
    assert ("pruning/macs" in trainer.callback_metrics) == installed
    assert (model.conv1.out_channels < 16) == installed


def test_fit_from_the_command_line_prunes(tmp_path: Path) -> None:
    file = config(tmp_path, target={"macs": 0.5}, schedule={"kind": "linear", "end": "${trainer.max_epochs}"})
    cli = command("fit", "--config", file, run=True)
    assert not dynamic_ops(cli.model)
    assert cli.trainer.callback_metrics["pruning/macs"] <= 0.5


@pytest.mark.parametrize(
    "latency",
    [
        pytest.param({"backend": "onnxruntime", "batch_size": 1}, id="some"),
        pytest.param({"measure": "tests.timing.slow"}, id="a clock of your own"),
    ],
)
def test_latency_in_yaml(latency: dict[str, Any], tmp_path: Path) -> None:
    callback = parsed(tmp_path, target={"latency": 0.6, "latency_ms": 12.5}, latency=latency)
    assert callback.target.costs == {"latency": 0.6, "latency_ms": 12.5}
    settings = callback._timing.settings
    assert settings == LatencySettings(**{**latency, **({"measure": slow} if "measure" in latency else {})})
