"""A guard brings back what was there before a metric was lost, bit for bit, and ends the schedule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_prune import PruningCallback, export_pruned
from lightning_prune.callback import RecoveryCallback
from lightning_prune.errors import ConfigError
from lightning_prune.ops import dynamic_ops
from lightning_prune.recovery import Distillation, Guard
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET

FIRES = {"kind": "linear", "begin": 1, "end": 4}


class Scripted(LitNet):
    """Logs what a script says, once for each epoch."""

    def __init__(self, values: list[float], optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.values = values

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_acc", self.values[self.trainer.current_epoch])


class Watch(Callback):
    """The model and the optimizer at the end of each validation, and at the first batch of each epoch."""

    def __init__(self, path: Path | None = None) -> None:
        self.ends: list[Any] = []
        self.starts: list[Any] = []
        self.path = path

    def _look(self, trainer: Trainer, pl_module: LitNet) -> Any:
        model = export_pruned(pl_module) if dynamic_ops(pl_module) else copy.deepcopy(pl_module)
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        return dict(model.state_dict()), state

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append(self._look(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path / f"{trainer.current_epoch}.ckpt")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.starts.append(self._look(trainer, pl_module))


def fitted(
    values: list[float], patience: int = 1, path: Path | None = None, ckpt: Path | None = None, **given: Any
) -> tuple[Watch, PruningCallback, Trainer]:
    torch.manual_seed(0)
    watch = Watch(path)
    options = {name: given.pop(name) for name in ("optimizer",) if name in given}
    guard = given.pop("guard", None) or Guard("val_acc", tolerance=0.05, patience=patience)
    callback = pruning(recovery=[guard], **{"schedule": FIRES, **given})
    fit = trainer(callback, watch, max_epochs=len(values))
    fit.fit(Scripted(values, **options), loader(), loader(), ckpt_path=ckpt)
    return watch, callback, fit


def guard_of(callback: PruningCallback) -> Guard:
    [guard] = callback._recovery.recovery
    assert isinstance(guard, Guard)
    return guard


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape and torch.equal(value, other[name]) for name, value in one.items()
    )


def numbers(state: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in state.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("compact", ["end", "each", "never"])
def test_what_was_good_comes_back_bit_for_bit(compact: str, optimizer: str) -> None:
    # fires at 1 (good), at 2 (bad): at 3 the end of epoch 1 is there again
    watch, callback, _ = fitted([0.8, 0.78, 0.5, 0.9, 0.9], compact=compact, optimizer=optimizer)
    assert same(watch.starts[3][0], watch.ends[1][0])
    assert not same(watch.ends[2][0], watch.ends[1][0])
    assert callback.is_done
    assert (
        numbers(watch.ends[2][0]) < numbers(watch.ends[1][0]) == numbers(watch.ends[-1][0]) < numbers(watch.ends[0][0])
    )
    report = guard_of(callback).report
    assert "val_acc is 0.5, 1 epoch after" in report
    assert "weights of epoch 1 are restored" in report
    if compact != "end":  # there the state of epoch 1 was full
        for index, state in watch.ends[1][1].items():
            for name, value in state.items():
                assert torch.equal(value, watch.starts[3][1][index][name]), name


def test_the_dense_model_comes_back() -> None:
    watch, callback, fit = fitted([0.8, 0.5, 0.5, 0.9], patience=2)
    assert same(watch.starts[3][0], watch.ends[0][0])
    assert callback.is_done
    assert len(fit.lightning_module.norm.weight) == 16


def test_a_metric_that_comes_back_in_time_changes_nothing() -> None:
    _, guarded, fit = fitted([0.8, 0.5, 0.5, 0.79, 0.3, 0.3], patience=3)
    assert guard_of(guarded).good is None  # nothing can be taken back any more
    torch.manual_seed(0)
    plain = trainer(pruning(schedule=FIRES), max_epochs=6)
    plain.fit(Scripted([0.8] * 6), loader(), loader())
    assert same(dict(plain.lightning_module.state_dict()), dict(fit.lightning_module.state_dict()))


def test_what_fails_in_the_last_epoch_comes_back_at_the_end_of_training() -> None:
    watch, _, fit = fitted([0.8, 0.78, 0.78, 0.5], compact="end")
    assert same(dict(fit.lightning_module.state_dict()), watch.ends[2][0])


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
@pytest.mark.parametrize("compact", ["end", "each"])
def test_a_resumed_run_restores_the_same(compact: str, epoch: int, tmp_path: Path) -> None:
    values = [0.8, 0.78, 0.5, 0.6, 0.9, 0.9]
    _, whole, fit = fitted(values, 2, tmp_path, compact=compact)
    torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)
    _, resumed, again = fitted(values, 2, ckpt=tmp_path / f"{epoch}.ckpt", compact=compact)
    assert same(dict(fit.lightning_module.state_dict()), dict(again.lightning_module.state_dict()))
    assert guard_of(whole).report == guard_of(resumed).report != ""


def test_auto_prunes_until_the_guard_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"kind": "linear", "begin": 1, "end": 7}
    values = [0.8, 0.8, 0.8, 0.8, 0.4, 0.8, 0.8, 0.8]
    _, callback, fit = fitted(values, target="auto", schedule=schedule, verbose=True)
    assert "weights of epoch 3 are restored" in guard_of(callback).report
    assert " ".join(guard_of(callback).report.split()) in " ".join(capsys.readouterr().out.split())
    kept = len(fit.lightning_module.norm.weight)
    _, to_the_end, fit = fitted([0.8] * 8, target="auto", schedule=schedule)
    assert len(fit.lightning_module.norm.weight) == 2 < kept < 16  # min_ratio and divisor
    assert to_the_end.is_done


def test_auto_wants_a_guard() -> None:
    with pytest.raises(ConfigError, match=r"target='auto' without a Guard.*recovery=\[Guard"):
        PruningCallback()


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("schedule", ["one_shot", {"kind": "linear", "begin": 0, "end": 3}])
def test_a_schedule_from_the_first_epoch_on_waits_for_the_dense_value(schedule: Any, importance: str) -> None:
    watch, callback, _ = fitted([0.8] * 5, schedule=schedule, importance=importance)
    dense, first, last = (numbers(watch.ends[epoch][0]) for epoch in (0, 1, -1))
    assert last <= first < dense
    assert callback.is_done
    watch, callback, _ = fitted([0.8, 0.5, 0.8, 0.8], schedule=schedule, importance=importance)
    assert "weights of epoch 0 are restored" in guard_of(callback).report
    assert numbers(watch.ends[-1][0]) == dense


def test_the_defaults_go_together_with_a_guard() -> None:
    callback = PruningCallback(recovery=[Guard("val_acc")], verbose=False, report=False)
    trainer(callback, max_epochs=4).fit(Scripted([0.8] * 4), loader(), loader())
    assert callback.is_done


def test_a_baseline_for_a_schedule_from_the_first_epoch_on() -> None:
    watch, callback, _ = fitted([0.5, 0.5], schedule="one_shot", guard=Guard("val_acc", patience=1, baseline=0.8))
    assert len(watch.starts[1][0]["norm.weight"]) == 16
    assert "epoch 0 are restored" in guard_of(callback).report


def test_a_metric_of_training() -> None:
    _, callback, _ = fitted([0.8] * 4, guard=Guard("loss", "min", tolerance=100.0))
    assert not guard_of(callback).is_over
    _, callback, _ = fitted([0.8] * 4, guard=Guard("loss", "min", tolerance=0.0, patience=1, baseline=-1.0))
    assert guard_of(callback).is_over


def test_a_metric_that_nobody_logs() -> None:
    with pytest.raises(ConfigError, match=r"monitor='val_ac' for Guard, which nobody logs.*val_acc"):
        fitted([0.8] * 4, guard=Guard("val_ac"))


@pytest.mark.parametrize(
    ("mode", "value", "is_good"),
    [
        ("max", 0.75, True),
        ("max", 0.74, False),
        ("min", 0.85, True),
        ("min", 0.86, False),
        ("max", float("nan"), False),
    ],
)
def test_what_is_good(mode: str, value: float, is_good: bool) -> None:
    assert Guard("m", mode, tolerance=0.05, baseline=0.8).is_good(value) is is_good


@pytest.mark.parametrize("given", [{"mode": "least"}, {"tolerance": -1}, {"patience": 0}, {"patience": 1.5}])
def test_arguments_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Got {next(iter(given))}="):
        Guard("val_acc", **given)


def test_a_guard_without_pruning() -> None:
    with pytest.raises(ConfigError, match="Guard without pruning"):
        trainer(RecoveryCallback([Guard("val_acc")])).fit(LitNet(), loader())


def test_another_model_begins_anew() -> None:
    _, callback, _ = fitted([0.8, 0.5, 0.5])
    teacher = Distillation()
    callback._recovery.recovery = (guard_of(callback), teacher)
    assert guard_of_first(callback).is_over
    for _ in range(2):
        model = Scripted([0.8, 0.8, 0.8, 0.8])
        start = model.head.weight.detach().clone()
        trainer(callback, max_epochs=4).fit(model, loader(), loader())
        assert not guard_of_first(callback).is_over
        assert teacher.teacher is not None
        assert torch.equal(teacher.teacher.get_parameter("head.weight"), start)
        assert len(model.head.weight[0]) < 32


def guard_of_first(callback: PruningCallback) -> Guard:
    guard = callback._recovery.recovery[0]
    assert isinstance(guard, Guard)
    return guard
