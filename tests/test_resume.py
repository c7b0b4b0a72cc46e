"""A run that stops and resumes ends bit for bit where the uninterrupted one ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_prune import PruningCallback, load_pruned
from lightning_prune.errors import CheckpointError
from lightning_prune.importance import l1
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*Found keys that are not in the model state dict.*")]

EPOCHS = 5  # fires at 1 and 2, small from 3 on


def run(path: Path, *extra: Callback, ckpt: Path | None = None, model: LitNet | None = None, **given: Any) -> Trainer:
    """Fit from the start, or from a checkpoint, with a file per epoch in `path`."""
    torch.manual_seed(0)
    options = {name: given.pop(name) for name in ("optimizer", "plugins", "first") if name in given}
    model = model or LitNet(options.get("optimizer", "adamw"))
    files = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    callbacks = [pruning(**given), *extra]
    fit = trainer(*(callbacks[::-1] if options.get("first") else callbacks), files, max_epochs=EPOCHS, path=path,
                  plugins=options.get("plugins"))  # fmt: skip
    fit.fit(model, loader(), ckpt_path=ckpt)
    return fit


def assert_same(first: Trainer, second: Trainer) -> None:
    """Weights, buffers, optimizer state, masks and logged values are equal, bit for bit."""
    one, other = first.lightning_module.state_dict(), second.lightning_module.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [fit.optimizers[0].state_dict()["state"] for fit in (first, second)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert not isinstance(value, Tensor) or torch.equal(value, states[1][index][name]), name
    mine, others = (next(c for c in fit.callbacks if isinstance(c, PruningCallback)) for fit in (first, second))
    kept, again = mine.state_dict()["kept"], others.state_dict()["kept"]
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    if second.callback_metrics:  # none where no epoch was left
        assert first.callback_metrics == second.callback_metrics


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Trainer, Path]]:
    """Uninterrupted runs and where their files are, each made once."""
    made: dict[str, tuple[Trainer, Path]] = {}

    def whole(**given: Any) -> tuple[Trainer, Path]:
        key = repr(given)
        if key not in made:
            path = tmp_path_factory.mktemp("whole")
            made[key] = run(path, **given), path
        return made[key]

    return whole


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"optimizer": "sgd"}, id="sgd"),
        pytest.param({"optimizer": "adamw"}, id="adamw"),
        pytest.param({"compact": "each"}, id="each"),
        pytest.param({"compact": "never"}, id="never"),
    ],
)
def test_resume_from_every_epoch(
    epoch: int, given: dict[str, Any], tmp_path: Path, whole_runs: Callable[..., tuple[Trainer, Path]]
) -> None:
    whole, path = whole_runs(**given)
    resumed = run(tmp_path, ckpt=path / f"epoch={epoch}.ckpt", **given)
    assert_same(whole, resumed)
    assert bool(dynamic_ops(resumed.lightning_module)) is (given.get("compact") == "never")


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_loaded_model_goes_on_where_the_run_stopped(epoch: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "a")
    path = tmp_path / "a" / f"epoch={epoch}.ckpt"
    assert_same(whole, run(tmp_path / "b", ckpt=path, model=load_pruned(path, LitNet)))


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_from_what_is_saved_after_a_shorter_fit(
    stop: int, tmp_path: Path, whole_runs: Callable[..., tuple[Trainer, Path]]
) -> None:
    torch.manual_seed(0)
    model = LitNet()
    fit = trainer(pruning(), max_epochs=stop)
    fit.fit(model, loader())
    assert not dynamic_ops(model)
    fit.save_checkpoint(tmp_path / "after.ckpt")
    whole, _ = whole_runs()
    assert_same(whole, run(tmp_path, ckpt=tmp_path / "after.ckpt"))


def test_resume_after_a_crash_in_the_middle(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 1:
                raise OSError("the power went")

    whole = run(tmp_path / "a")
    with pytest.raises(OSError, match="the power went"):
        run(tmp_path / "b", Crash())
    last = sorted((tmp_path / "b").glob("*.ckpt"))[-1]
    assert last.name == "epoch=1.ckpt"
    assert_same(whole, run(tmp_path / "c", ckpt=last))


@pytest.mark.filterwarnings("ignore:.*ended before the epoch ended.*")
def test_a_firing_happens_once_though_the_run_stops_in_its_epoch(tmp_path: Path) -> None:
    calls: list[str] = []

    def score(unit: Any) -> Tensor:
        calls.append(unit.name)
        return l1(unit)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    run(tmp_path / "a", Save(), importance=score)
    assert len(calls) == 4  # two units, two firings
    calls.clear()
    run(tmp_path / "b", ckpt=tmp_path / "middle.ckpt", importance=score)
    assert len(calls) == 2


@pytest.mark.parametrize("first", [True, False], ids=["average first", "pruning first"])
@pytest.mark.parametrize("epoch", [0, 2, 3])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_follow_and_resume(kind: str, epoch: int, first: bool, tmp_path: Path) -> None:
    def average() -> Callback:
        return EMAWeightAveraging(decay=0.9) if kind == "ema" else StochasticWeightAveraging(1e-3, swa_epoch_start=2)

    whole = run(tmp_path / "a", average(), first=first)
    resumed = run(tmp_path / "b", average(), first=first, ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt")
    assert_same(whole, resumed)


@pytest.mark.parametrize("epoch", [1, 3])
def test_files_written_in_the_background_resume(epoch: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "a", plugins=AsyncCheckpointIO())
    path = tmp_path / "a" / f"epoch={epoch}.ckpt"
    metadata = getattr(torch.load(path, weights_only=True)["state_dict"], "_metadata", {})
    assert "lightning_prune" not in metadata.get("", {})  # else this tests nothing
    assert_same(whole, run(tmp_path / "b", ckpt=path))


def test_the_state_is_plain_data(tmp_path: Path) -> None:
    run(tmp_path)
    for path in sorted(tmp_path.glob("*.ckpt")):
        torch.load(path, weights_only=True)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert saved["lightning_prune"]["progress"] == {"progress": 1.0, "last": 2, "unit": "epoch"}
    state = saved["callbacks"]["PruningCallback"]
    assert set(state["kept"]) == set(saved["lightning_prune"]["units"])
    assert "conv2.weight" in state["removed"]
    assert torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["callbacks"]["PruningCallback"]["removed"] == {}


def test_the_state_key_does_not_depend_on_arguments() -> None:
    assert pruning(0.5).state_key == pruning(0.25, scope="local", divisor=4).state_key


def test_a_changed_schedule_still_meets_the_target(tmp_path: Path) -> None:
    run(tmp_path / "a")
    fit = run(tmp_path / "b", ckpt=tmp_path / "a" / "epoch=1.ckpt", schedule={"kind": "cubic", "begin": 0, "end": 2})
    assert fit.callback_metrics["pruning/macs"] <= 0.5
    assert not dynamic_ops(fit.lightning_module)


def test_a_run_that_stops_before_the_last_firing_says_so(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

    model = LitNet()
    fit = trainer(pruning(), Stop())
    with pytest.warns(UserWarning, match="before the last firing of the pruning schedule at 2"):
        fit.fit(model, loader())
    assert dynamic_ops(model)


def test_a_checkpoint_with_other_units_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"other units|another `ignore`"):
        run(tmp_path / "b", ckpt=tmp_path / "a" / "epoch=1.ckpt", ignore="conv1")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"version": 99}, "version 99.*Upgrade", id="newer"),
        pytest.param({"version": None}, "version None", id="no version"),
        pytest.param({"kept": None}, r"without \['kept'\]", id="damaged"),
    ],
)
def test_a_state_that_is_not_ours_is_refused(change: dict[str, Any], match: str) -> None:
    callback = pruning()
    trainer(callback).fit(LitNet(), loader())
    state = {**copy.deepcopy(callback.state_dict()), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=match):
        pruning().load_state_dict(state)
