"""What a run leaves in its log folder: a report as data, and as a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from torch import Tensor, nn

from lightning_prune import PruningCallback
from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.latency import LatencySettings
from lightning_prune.recovery import Guard
from lightning_prune.report import HTML_NAME, JSON_NAME, History, write_report
from lightning_prune.report import html as page
from lightning_prune.report.figures import _positions
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.processes import two_processes
from tests.resumable import LineLogger, ResumableLoader, differences
from tests.timing import FakeClock, law

pytestmark = QUIET

EPOCHS = 5  # fires at 1 and 2


class Seen(Callback):
    """The validation loss of each epoch, as other callbacks see it, and the widths that it belongs to."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.widths: list[tuple[int, int]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
            self.widths.append((pl_module.conv1.weight.shape[0], pl_module.conv2.weight.shape[0]))


def run(path: Path | None, *extra: Callback, model: LitNet | None = None, ckpt: Any = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    options = {name: given.pop(name) for name in ("logger", "num_sanity_val_steps") if name in given}
    fit = trainer(
        pruning(**{"report": True, **given}), *extra, max_epochs=EPOCHS, path=path, log_every_n_steps=1, **options
    )
    fit.fit(model or LitNet(), loader(), loader(), ckpt_path=ckpt)
    return fit


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    return found


def macs(first: int, second: int) -> int:
    """Of `LitNet` on one image of 6 x 6 pixels."""
    return 36 * 9 * (3 * first + first * second) + 5 * second


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.values: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                self.links.append(value or "")
            else:
                self.values.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A run that nobody stopped, with a file for each epoch."""
    path, seen = tmp_path_factory.mktemp("whole"), Seen()
    run(path, seen, ModelCheckpoint(path, filename="{epoch}", save_top_k=-1), num_sanity_val_steps=1)
    return path, seen


# As data


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


# As a page


def test_the_page_needs_nothing_else_and_its_images_decode(whole: tuple[Path, Seen]) -> None:
    text = (whole[0] / HTML_NAME).read_text(encoding="utf-8")
    found = Page(whole[0] / HTML_NAME)
    assert not {"script", "link", "iframe", "object", "embed", "svg"} & set(found.tags)
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert len(found.links) == 4  # two figures, for light and dark
    pictures = []
    for link in found.links:
        kind, data = link.split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            pictures.append(image.copy())
    assert [picture.size for picture in pictures] == [(900, 600)] * 2 + [(900, 360)] * 2
    assert all(len(picture.getcolors(1 << 20)) > 10 for picture in pictures)  # something is drawn
    assert len(text) < 300_000


def test_the_page_shows_the_numbers(whole: tuple[Path, Seen]) -> None:
    path, seen = whole
    texts = set(Page(path / HTML_NAME).texts)
    numbers = [f"{macs(*w) / macs(16, 32):.1%}" for w in seen.widths[1:3]] + [f"{macs(16, 32):,}", "met", "val_loss"]
    numbers += [f"{loss:.4g}" for loss in (*seen.losses[:3], seen.losses[-1])]
    assert set(numbers) <= texts
    assert {"conv1_(0, 16)_out_2_in_2", "conv1, norm, conv2", "model output"} <= texts


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)<\\script><img src=x onerror='$b$'>&amp"

    class Evil(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(evil, nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.get_submodule(evil)(x))

        def validation_step(self, batch: Any, index: int) -> None:
            self.log(evil, 1.0)

    Evil.__name__ = "<b>Evil</b>"
    run(tmp_path, model=Evil(), divisor=1, ignore="conv2")
    found, plain = Page(tmp_path / HTML_NAME), Page(tmp_path / HTML_NAME)
    assert not {"script", "b"} & set(found.tags)
    assert found.tags.count("img") == 2
    assert not [value for value in found.values if value.startswith("on")]
    assert "Pruning report: <b>Evil</b>" in plain.texts
    assert evil in plain.texts
    assert any(text.startswith(evil + "_(0, 3)") for text in plain.texts)


def test_without_matplotlib_there_are_no_figures_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "can_draw", lambda: False)
    run(tmp_path)
    found = Page(tmp_path / HTML_NAME)
    assert not found.links
    assert [text for text in found.texts if "matplotlib" in text] == [
        "The figures are missing, as matplotlib is: pip install 'lightning-prune[plots]'."
    ]


def test_a_second_fit_is_drawn_behind_the_first() -> None:
    readings = [{"after_steps": k, "global_step": s} for k, s in ((0, 3), (1, 6), (1, 9), (1, 3), (1, 6))]
    document = {"readings": readings, "steps": [{"global_step": 3}]}
    assert _positions(document) == ([3, 6, 9, 12, 15], [3])


# Where and when


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


# Runs that resume


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
