"""What a run leaves in its log folder: a report as data, and as a page that needs nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_prune.latency import LatencySettings
from lightning_prune.recovery import Guard
from lightning_prune.report import HTML_NAME
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.reports import EPOCHS, Page, Seen, macs, report_in, run, whole_run
from tests.timing import FakeClock, law

pytestmark = QUIET


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    return whole_run(tmp_path_factory.mktemp("whole"))


def test_the_report_says_what_each_step_left_and_what_it_did_to_the_metric(whole: tuple[Path, Seen]) -> None:
    path, seen = whole
    found, losses = report_in(path), seen.losses
    assert found["model"] == {"name": "LitNet", "submodule": None, "example_input": ["2x3x6x6 float32"]}
    schedule = {"kind": "linear", "unit": "epoch", "begin": 1, "end": 3, "every": 1, "last": 2, "firings": 2}
    assert found["schedule"] == schedule
    assert [(step["epoch"], step["global_step"], step["progress"]) for step in found["steps"]] == [
        (1, 3, 0.5),
        (2, 6, 1.0),
    ]
    assert [tuple(step["kept"].values()) for step in found["steps"]] == seen.widths[1:3]
    assert [step["costs"]["macs"] for step in found["steps"]] == [macs(*widths) for widths in seen.widths[1:3]]
    assert [step["remains"]["macs"] for step in found["steps"]] == [macs(*w) / macs(16, 32) for w in seen.widths[1:3]]
    assert [step["metrics"]["val_loss"] for step in found["steps"]] == [
        {"before": losses[0], "after": losses[1], "recovered": losses[1]},
        {"before": losses[1], "after": losses[2], "recovered": losses[4]},
    ]
    assert [(r["epoch"], r["after_steps"]) for r in found["readings"]] == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 2)]


def test_the_end_is_compared_with_the_dense_model_and_the_target(whole: tuple[Path, Seen]) -> None:
    path, seen = whole
    found, pruned = report_in(path), macs(*seen.widths[-1])
    params = sum(p.numel() for p in LitNet().parameters())
    assert found["final"]["costs"]["macs"] == {
        "dense": macs(16, 32),
        "pruned": pruned,
        "remains": pruned / macs(16, 32),
    }
    assert found["final"]["costs"]["params"]["dense"] == params
    difference = seen.losses[-1] - seen.losses[0]
    assert found["final"]["metrics"] == {
        "val_loss": {"before": seen.losses[0], "final": seen.losses[-1], "difference": difference}
    }
    assert found["target"]["is_met"] is True
    bound = {"cost": "macs", "wanted": 0.5, "reached": pruned / macs(16, 32), "is_met": True}
    assert found["target"]["bounds"] == [bound]
    assert [(u["num_channels"], u["kept"]) for u in found["units"]] == list(zip((16, 32), seen.widths[-1], strict=True))
    assert {f["tensor"] for f in found["frozen"]} == {"conv1.weight", "head.weight", "head.bias"}
    assert (found["ended"], found["remarks"]) == ("fit ended", [])


@pytest.mark.parametrize(
    ("target", "wanted", "reached"),
    [
        pytest.param({"macs": 70_000}, 70_000, lambda *widths: macs(*widths), id="absolute"),
        pytest.param({"channels": 0.5}, 0.5, lambda *widths: sum(widths) / 48, id="fraction"),
        pytest.param(0.5, None, None, id="choices"),
    ],
)
def test_a_target_is_compared_in_its_own_terms(target: Any, wanted: Any, reached: Any, tmp_path: Path) -> None:
    seen = Seen()
    run(tmp_path, seen, target=target)
    found = report_in(tmp_path)["target"]
    assert found["is_met"]
    expected = [] if wanted is None else [(wanted, reached(*seen.widths[-1]))]
    assert [(bound["wanted"], bound["reached"]) for bound in found["bounds"]] == expected


def test_a_guard_that_restores_is_in_the_report(tmp_path: Path) -> None:
    class Scripted(LitNet):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", 1.0)
            self.log("val_acc", (0.8, 0.8, 0.3, 0.7, 0.9)[self.trainer.current_epoch])

    run(tmp_path, model=Scripted(), recovery=[Guard("val_acc", tolerance=0.05, patience=1)])
    found = report_in(tmp_path)
    first, second, restored = found["steps"]
    assert "weights of epoch 1 are restored" in restored["restored"]
    assert found["remarks"] == [restored["restored"]]
    assert restored["kept"] == first["kept"] != second["kept"]
    assert found["metric"] == "val_acc"  # that of the guard
    assert list(second["metrics"]["val_acc"].values()) == pytest.approx([0.8, 0.3, 0.3])
    assert restored["metrics"]["val_acc"]["recovered"] == pytest.approx(0.9)
    assert found["target"]["is_met"] is False
    assert found["recovery"][0]["arguments"] == {"monitor": "val_acc", "mode": "max", "tolerance": 0.05, "patience": 1}
    assert "not met" in Page(tmp_path / HTML_NAME).texts


def test_what_a_guard_restores_at_the_very_end_has_no_metrics(tmp_path: Path) -> None:
    class Scripted(LitNet):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_acc", (0.8, 0.8, 0.8, 0.8, 0.3)[self.trainer.current_epoch])

    guard = Guard("val_acc", patience=1)
    run(tmp_path, model=Scripted(), target="auto", recovery=[guard], schedule={"kind": "linear", "begin": 1, "end": 5})
    found = report_in(tmp_path)
    assert found["remarks"][1:] == [
        "Nothing was validated after the last step: there are no metrics of what the run ended with."
    ]
    assert found["final"]["metrics"]["val_acc"]["final"] is None
    assert found["target"]["is_met"]  # it went as far as the guard let it


def test_a_latency_is_reported_as_it_was_measured(tmp_path: Path) -> None:
    measure = FakeClock(lambda model: law(model, 1), 1.0)
    fit = run(tmp_path, target={"latency": 0.6}, latency=LatencySettings(measure=measure))
    (bound,) = report_in(tmp_path)["target"]["bounds"]
    assert bound["is_met"]
    assert 0.5 < bound["reached"] <= 0.6
    assert bound["reached"] == pytest.approx(float(fit.callback_metrics["pruning/latency"]))


@pytest.mark.parametrize(
    ("extra", "report", "expected"),
    [
        pytest.param(EarlyStopping("other"), True, "other", id="that of early stopping"),
        pytest.param(EarlyStopping("other"), "mean_loss", "mean_loss", id="the one that was asked for"),
        pytest.param(Callback(), "nobody logs it", "val_loss", id="the first one"),
    ],
)
def test_one_metric_comes_first(extra: Callback, report: Any, expected: str, tmp_path: Path) -> None:
    class Several(LitNet):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            self.log("mean_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            super().validation_step(batch, index)
            self.log("other", 1.0)

    run(tmp_path, extra, model=Several(), report=report)
    found = report_in(tmp_path)
    assert found["metric"] == expected
    assert [list(r["metrics"]) for r in found["readings"]] == [["val_loss", "other", "mean_loss"]] * EPOCHS


def test_a_metric_that_is_not_validated_in_an_epoch_is_not_read_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fit = trainer(pruning(report=True), max_epochs=EPOCHS, path=tmp_path, check_val_every_n_epoch=3)
    fit.fit(LitNet(), loader(), loader())
    found = report_in(tmp_path)
    assert [(r["epoch"], r["after_steps"]) for r in found["readings"]] == [(2, 2)]
    assert [s["metrics"]["val_loss"]["before"] for s in found["steps"]] == [None, None]
    assert found["steps"][0]["metrics"]["val_loss"]["after"] is None
    assert found["final"]["metrics"]["val_loss"]["before"] is None
    assert "no metrics of the dense model" in found["remarks"][0]


def test_numbers_that_are_none_are_null_as_data_and_named_on_the_page(tmp_path: Path) -> None:
    class Lost(LitNet):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", math.nan)

    run(tmp_path, model=Lost())
    assert report_in(tmp_path)["final"]["metrics"]["val_loss"] == dict.fromkeys(("before", "final", "difference"))
    assert "nan → nan" in Page(tmp_path / HTML_NAME).texts
