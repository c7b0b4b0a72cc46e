"""Where and when a report is written, and what is left of it when a run is stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_prune import PruningCallback
from lightning_prune.report import HTML_NAME, JSON_NAME, write_report
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.reports import Seen, report_in, run, whole_run
from tests.resumable import LineLogger, differences

pytestmark = QUIET


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    return whole_run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", ["logger", "logger without a folder", "no logger"])
def test_it_is_in_the_log_folder(kind: str, tmp_path: Path) -> None:
    loggers: dict[str, Any] = {
        "logger": CSVLogger(tmp_path / "logs", name="net"),
        "logger without a folder": LineLogger(tmp_path / "rows"),
        "no logger": False,
    }
    run(tmp_path, logger=loggers[kind])
    folder = tmp_path / "logs" / "net" / "version_0" if kind == "logger" else tmp_path
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("pruning_report*")) == sorted(
        (folder / name).relative_to(tmp_path) for name in (JSON_NAME, HTML_NAME)
    )
    assert not list(tmp_path.rglob(".*"))  # drafts


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"report": False}, id="switched off"),
        pytest.param({"fast_dev_run": 2}, id="fast_dev_run"),
        pytest.param({"barebones": True, "logger": None, "enable_checkpointing": None}, id="barebones"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_nothing_is_written(given: dict[str, Any], tmp_path: Path) -> None:
    options = {"report": True, **given}
    callback = pruning(report=options.pop("report"))
    trainer(callback, path=tmp_path, **options).fit(LitNet(), loader(), loader())
    assert callback.is_done
    assert not list(tmp_path.rglob("pruning_report*"))


def test_nothing_is_remembered_where_nothing_is_written(tmp_path: Path) -> None:
    run(tmp_path, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), report=False)
    fit = run(tmp_path, report=False, ckpt=tmp_path / "epoch=2.ckpt")
    (callback,) = (c for c in fit.callbacks if isinstance(c, PruningCallback))  # type: ignore[attr-defined]
    assert "report" not in callback.state_dict()


def test_the_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for name, report in (("a", True), ("b", False)):
        fit = run(tmp_path / name, report=report)
        weights, optimizers = dict(fit.lightning_module.state_dict()), [o.state_dict() for o in fit.optimizers]
        ends.append([weights, optimizers, torch.get_rng_state(), dict(fit.callback_metrics)])
    assert not differences(*ends)


class Stop(Callback):
    """Ends a run in the middle of epoch 3."""

    def __init__(self, how: BaseException | int) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 3 and batch_idx == 1:
            if isinstance(self.how, int):
                os.kill(os.getpid(), self.how)
            else:
                raise self.how


@pytest.mark.parametrize(
    ("how", "raised"),
    [
        pytest.param(OSError("the power went"), OSError, id="an error"),
        pytest.param(KeyboardInterrupt(), SystemExit, id="Ctrl+C"),
        pytest.param(signal.SIGTERM, SIGTERMException, id="SIGTERM"),
    ],
)
def test_a_run_that_is_stopped_leaves_what_is_known(how: Any, raised: Any, tmp_path: Path) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(raised):
        run(tmp_path, Stop(how))
    signal.signal(signal.SIGINT, interrupt)  # Lightning leaves it switched off
    found = report_in(tmp_path)
    kind = "SIGTERMException" if isinstance(how, int) else type(how).__name__
    assert found["ended"] == f"stopped by {kind}"
    assert len(found["steps"]) == 2
    assert [reading["epoch"] for reading in found["readings"]] == [0, 1, 2]
    assert (tmp_path / HTML_NAME).exists()


def test_a_run_that_fails_before_anything_happened_leaves_nothing(tmp_path: Path) -> None:
    class Broken(LitNet):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        run(tmp_path, model=Broken())
    assert not list(tmp_path.rglob("pruning_report*"))


def test_a_folder_that_cannot_be_written_does_not_cost_the_training(tmp_path: Path) -> None:
    (tmp_path / JSON_NAME).mkdir()
    with pytest.warns(UserWarning, match="Got no pruning report: "):
        fit = run(tmp_path)
    assert fit.state.finished
    assert [path.name for path in tmp_path.glob("*pruning_report*")] == [JSON_NAME]  # no draft


def test_a_report_that_is_written_by_half_leaves_the_earlier_one(
    whole: tuple[Path, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = report_in(whole[0])
    written = write_report(found, tmp_path)
    before = [path.read_bytes() for path in written]

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode(encoding)[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        write_report({**found, "metric": None}, tmp_path)
    assert [path.read_bytes() for path in written] == before
    assert sorted(tmp_path.iterdir()) == sorted(written)
