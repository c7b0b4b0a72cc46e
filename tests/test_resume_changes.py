"""What a resumed run may change, and what files it refuses to resume from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor

from lightning_prune import PruningCallback, load_pruned
from lightning_prune.callback.resumed import check_resumed, plain_arguments
from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.importance import l1
from lightning_prune.ops import dynamic_ops
from lightning_prune.recovery import Distillation, GroupLasso, Recalibration, Recovery, Rewind
from lightning_prune.targets import parse_target
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.test_resume import assert_same, run

pytestmark = QUIET


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run to macs 0.5: dense at 0, masked at 1 and 2, small from 3 on."""
    path = tmp_path_factory.mktemp("whole")
    run(path)
    return path


# The target


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(0.5, 0.4, id="ratio"),
        pytest.param({"macs": 0.5}, {"macs": 0.4}, id="cost"),
        pytest.param({"macs": 5000}, {"macs": 4000}, id="absolute cost"),
        pytest.param({"macs": 0.5}, {"macs": 0.5, "params": 0.5}, id="one cost more"),
        pytest.param({"conv*": 8, "head*": 0.5}, {"conv*": 4, "head*": 0.5}, id="units"),
    ],
)
def test_a_target_may_shrink(before: Any, after: Any) -> None:
    old, new = (plain_arguments(parse_target(target)) for target in (before, after))
    assert check_resumed(old, new)
    assert not check_resumed(old, old)
    with pytest.raises(ConfigError, match=r"target=.*for a run that was saved with target="):
        check_resumed(new, old)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"macs": 0.5}, {"params": 0.4}, id="another cost"),
        pytest.param({"macs": 0.5}, {"macs": 4000}, id="fraction and number"),
        pytest.param({"macs": 0.5}, 0.4, id="cost and ratio"),
        pytest.param(0.5, {"macs": 0.4}, id="ratio and cost"),
        pytest.param({"conv*": 0.5}, {"conv*": 0.5, "conv1*": 1.0}, id="a glob more"),
    ],
)
def test_targets_that_cannot_be_compared_are_refused(before: Any, after: Any) -> None:
    with pytest.raises(ConfigError, match="expected the same costs or units, none greater"):
        check_resumed(plain_arguments(parse_target(before)), plain_arguments(parse_target(after)))


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_smaller_target_is_met_wherever_the_run_resumes(epoch: int, files: Path, tmp_path: Path) -> None:
    before = load_pruned(files / f"epoch={epoch}.ckpt", LitNet)
    fit = run(tmp_path, ckpt=files / f"epoch={epoch}.ckpt", target={"macs": 0.3})
    model = fit.lightning_module
    assert not dynamic_ops(model)
    assert fit.callback_metrics["pruning/macs"] <= 0.3
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.parameters())
    assert all(state["exp_avg"].shape == p.shape for p, state in fit.optimizers[0].state.items())


def test_what_left_the_tensors_does_not_come_back(tmp_path: Path) -> None:
    def reversed_l1(unit: Any) -> Tensor:
        return -l1(unit)

    given = {"importance": reversed_l1}
    run(tmp_path / "a", **given)
    fit = run(tmp_path / "b", ckpt=tmp_path / "a" / "epoch=3.ckpt", target={"macs": 0.3}, **given)
    kept = torch.load(tmp_path / "a" / "epoch=3.ckpt", weights_only=True)["callbacks"]["PruningCallback"]["kept"]
    (callback,) = (c for c in fit.callbacks if isinstance(c, PruningCallback))
    now = callback.state_dict()["kept"]
    assert all(set(now[name].tolist()) <= set(indices.tolist()) for name, indices in kept.items())
    assert sum(map(len, now.values())) < sum(map(len, kept.values()))


# Everything else


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"importance": "l2"}, id="importance"),
        pytest.param({"scope": "local"}, id="scope"),
        pytest.param({"divisor": 4}, id="divisor"),
        pytest.param({"min_ratio": 0.2}, id="min_ratio"),
        pytest.param({"compact": "never"}, id="compact"),
        pytest.param({"regrow": False}, id="regrow"),
        pytest.param({"per_cost": "params"}, id="per_cost"),
        pytest.param({"overrides": {"conv1*": {"min": 0.5}}}, id="overrides"),
        pytest.param({"ignore": "conv1"}, id="ignore"),
        pytest.param({"target": {"macs": 0.6}}, id="greater target"),
        pytest.param({"recovery": [Recalibration()]}, id="recovery"),
    ],
)
def test_another_argument_is_refused_and_the_module_is_as_it_was(
    change: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    model = LitNet()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    (name,) = change
    with pytest.raises(ConfigError, match=rf"Got {name}=.*saved with {name}=.*change its schedule"):
        run(tmp_path, ckpt=files / "epoch=3.ckpt", model=model, **change)
    assert not dynamic_ops(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


PARTS: dict[str, Callable[[], list[Recovery]]] = {
    "none": list,
    "another": lambda: [GroupLasso()],
    "one more": lambda: [Recalibration(), Rewind()],
    "argument": lambda: [Recalibration(8)],
    "function": lambda: [Recalibration(), GroupLasso(schedule=lambda share: share)],
    "teacher": lambda: [Recalibration(), Distillation(teacher=LitNet())],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_other_recovery_is_refused_and_both_are_named(parts: Callable[[], list[Recovery]]) -> None:
    first, same, other = (PruningCallback(0.5, recovery=r) for r in ([Recalibration()], [Recalibration()], parts()))
    saved = first._arguments()
    assert not check_resumed(saved, same._arguments())
    assert not check_resumed(other._arguments(), PruningCallback(0.5, recovery=parts())._arguments())
    with pytest.raises(ConfigError, match=r"recovery=.*saved with recovery='\[Recalibration\(batches=16\)\]'"):
        check_resumed(saved, other._arguments())
    assert not check_resumed({n: v for n, v in saved.items() if n != "recovery"}, other._arguments())  # an older file


def test_the_file_of_a_teacher_may_lie_elsewhere() -> None:
    here, there, nowhere = (repr(Distillation(teacher=path)) for path in ("a.ckpt", "b/a.ckpt", None))
    assert here == there != nowhere


@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks")
def test_other_stages_may_have_other_arguments(files: Path) -> None:
    trainer(PruningCallback(0.9, "l2")).validate(LitNet(), loader(), ckpt_path=files / "epoch=3.ckpt", verbose=False)


def test_a_function_is_the_same_in_the_next_process() -> None:
    def make() -> Callable[[Any], Tensor]:
        def score(unit: Any) -> Tensor:
            return l1(unit)

        return score

    first, second = (PruningCallback(0.5, make())._arguments() for _ in range(2))
    assert first == second
    assert "0x" not in first["importance"]


# Files


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("damage", [cut_short, emptied])
def test_a_half_written_file_is_refused_and_the_one_before_works(
    damage: Callable[[Path], None], stage: str, files: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.ckpt"
    shutil.copy(files / "epoch=2.ckpt", half)
    damage(half)
    model = LitNet()
    match = r"half\.ckpt, which cannot be read: it is half written.*Resume from an earlier one"
    if stage == "validate":
        with pytest.raises(CheckpointError, match=match):
            trainer(PruningCallback(0.5)).validate(model, loader(), ckpt_path=half)
        return
    with pytest.raises(CheckpointError, match=match):
        run(tmp_path / "a", ckpt=half, model=model)
    assert not dynamic_ops(model)
    whole = run(tmp_path / "whole")
    assert_same(whole, run(tmp_path / "b", ckpt=files / "epoch=1.ckpt", model=model))


@pytest.mark.filterwarnings("ignore:Training ended at epoch")
@pytest.mark.parametrize(
    ("schedule", "max_epochs", "is_told"),
    [
        pytest.param({"kind": "linear", "begin": 1, "end": 3}, 2, True, id="shorter"),
        pytest.param({"kind": "one_shot", "begin": 3}, 2, True, id="before it begins"),
        pytest.param({"kind": "linear", "begin": 1, "end": 3}, 3, False, id="long enough"),
        pytest.param({"kind": "one_shot", "begin": 1}, 2, False, id="one shot"),
        pytest.param("cubic", 2, False, id="a share of the run"),
    ],
)
def test_a_schedule_that_the_run_ends_before_is_told(
    schedule: Any, max_epochs: int, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_prune.callback.resumed.rank_zero_info", said.append)
    for verbose in (True, False):
        trainer(pruning(schedule=schedule, verbose=verbose), max_epochs=max_epochs).fit(LitNet(), loader())
    assert len(said) == is_told
    assert all("after the 2 of this run" in text for text in said)


@pytest.mark.filterwarnings("ignore:Training ended at epoch")
@pytest.mark.parametrize("compact", ["end", "each"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_run_that_a_smaller_number_of_epochs_stopped_goes_on(stop: int, compact: Any, tmp_path: Path) -> None:
    """The schedule fires at epochs 1, 2 and 3."""

    def fit(max_epochs: int, ckpt: Path | None = None) -> LitNet:
        torch.manual_seed(0)
        model = LitNet()
        callback = pruning(schedule={"kind": "linear", "begin": 1, "end": 4}, compact=compact)
        fitting = trainer(callback, max_epochs=max_epochs, path=tmp_path, enable_checkpointing=False)
        fitting.fit(model, loader(), ckpt_path=ckpt)
        fitting.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return model

    whole = fit(6).state_dict()
    fit(stop)
    resumed = fit(6, tmp_path / f"{stop}.ckpt").state_dict()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_file_with_hyperparameters_of_ones_own_says_so(files: Path, tmp_path: Path) -> None:
    whole = torch.load(files / "epoch=2.ckpt", weights_only=True)
    torch.save({**whole, "hyper_parameters": {"path": tmp_path}}, tmp_path / "own.ckpt")
    match = r"Path in its entry 'hyper_parameters'.*fit\(\.\.\., weights_only=False\)"
    with pytest.raises(CheckpointError, match=match):
        run(tmp_path / "a", ckpt=tmp_path / "own.ckpt")


def test_an_error_in_the_background_is_raised_when_the_fit_ends(tmp_path: Path) -> None:
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if checkpoint["epoch"] == 4:  # the last one: no other write comes after it that could raise
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, plugins=AsyncCheckpointIO(Full()))


def test_hpc_files_resume(tmp_path: Path) -> None:
    """As Lightning's handler of a signal from SLURM writes and finds them."""
    whole = run(tmp_path / "whole")
    for version, epoch in ((1, 0), (2, 2)):  # the newest counts
        shutil.copy(tmp_path / "whole" / f"epoch={epoch}.ckpt", tmp_path / f"hpc_ckpt_{version}.ckpt")
    assert_same(whole, run(tmp_path, ckpt="hpc"))  # type: ignore[arg-type]
