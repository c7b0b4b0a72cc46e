"""A run that resumes ends with the same report; two processes write one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import PruningCallback
from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.report import History
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.processes import two_processes
from tests.reports import EPOCHS, Seen, report_in, run, whole_run
from tests.resumable import ResumableLoader

pytestmark = QUIET


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    return whole_run(tmp_path_factory.mktemp("whole"))


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "written"}


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_a_run_that_resumes_ends_with_the_same_report(epoch: int, whole: tuple[Path, Seen], tmp_path: Path) -> None:
    run(tmp_path, ckpt=whole[0] / f"epoch={epoch}.ckpt")
    assert lasting(report_in(tmp_path)) == lasting(report_in(whole[0]))


def in_steps(path: Path, ckpt: Path | None = None) -> dict[str, Any]:
    """Return the report of a run of 4 steps in each epoch, with a file after each of them."""
    torch.manual_seed(0)
    files = ModelCheckpoint(
        path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    fit = trainer(pruning(report=True, importance="taylor"), files, max_epochs=EPOCHS, path=path)
    fit.fit(LitNet(), ResumableLoader(), loader(), ckpt_path=ckpt)
    return lasting(report_in(path))


@pytest.fixture(scope="module")
def whole_in_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("steps")
    return path, in_steps(path)


@pytest.mark.parametrize("step", [3, 5, 7, 11, 13, 19])  # at the end of an epoch Lightning skips its validation
def test_a_run_that_resumes_at_a_step_ends_with_the_same_report(
    step: int, whole_in_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, expected = whole_in_steps
    assert (len(expected["steps"]), len(expected["readings"])) == (2, EPOCHS)
    assert in_steps(tmp_path, path / f"step={step}.ckpt") == expected


def test_the_state_is_plain_data(whole: tuple[Path, Seen]) -> None:
    states = torch.load(whole[0] / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["callbacks"]
    assert list(states) == [name for name in states if "Report" not in name]
    history = History.from_dict(states["PruningCallback"]["report"])
    assert [change.epoch for change in history.changes] == [1, 2]


def test_a_checkpoint_that_tells_nothing_is_not_taken_for_the_dense_model(tmp_path: Path) -> None:
    run(tmp_path / "a", ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), report=False)
    run(tmp_path, ckpt=tmp_path / "epoch=2.ckpt")
    found = report_in(tmp_path)
    assert found["final"]["metrics"]["val_loss"]["before"] is None
    assert found["final"]["metrics"]["val_loss"]["final"] is not None
    assert found["remarks"] == ["The dense model was not seen in this run: there are no metrics of it."]
    run(tmp_path / "b", ckpt=tmp_path / "epoch=0.ckpt")
    assert report_in(tmp_path / "b")["remarks"] == [
        "Nothing was validated before the first step of the schedule: there are no metrics of the dense model."
    ]


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        pytest.param({"version": 2}, "in version 2; this library reads 1", id="newer"),
        pytest.param({"version": 1, "changes": []}, "damaged report .*'readings'", id="cut"),
        pytest.param({"version": 1, "changes": [{"when": 1}], "readings": []}, "damaged report .*when", id="other"),
    ],
)
def test_a_damaged_history_is_refused(saved: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        History.from_dict(saved)


# Two processes

SCRIPT = """
import os
from pathlib import Path
import torch
from lightning_prune.callback import reporting
from tests.lit import LitNet, loader, pruning, trainer

rank, write = os.environ.get("LOCAL_RANK", 0), reporting.write_report

def noted(*arguments):
    Path(f"written{rank}").touch()
    return write(*arguments)

reporting.write_report = noted
torch.manual_seed(0)
callback = pruning(report=True)
trainer(callback, strategy="ddp", devices=2, path=Path.cwd() / "out").fit(LitNet(), loader(), loader())
Path(f"rank{rank}").write_text(str(len(callback._reporting.history.changes)))
"""


def test_rank_zero_writes_for_all(tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert len(report_in(tmp_path / "out")["readings"]) == 4
    assert [path.name for path in tmp_path.glob("written*")] == ["written0"]


def test_an_argument_that_is_neither_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"report=1\.5 for PruningCallback"):
        PruningCallback({"macs": 0.5}, report=1.5)  # type: ignore[arg-type]
