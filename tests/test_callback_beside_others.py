"""Other callbacks, optimizers and ways to run a Trainer, beside a callback that prunes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint, ModelSummary
from torch import Tensor

from lightning_prune import PruningCallback, load_pruned
from lightning_prune.errors import ConfigError
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, Record, loader, pruning, trainer, widths

pytestmark = QUIET


class Flat(LitNet):
    """Its validation loss never gets better after the first epoch."""

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("flat", float(self.current_epoch))


def test_early_stopping_waits_for_the_schedule_and_starts_again_after_it() -> None:
    stop = EarlyStopping("flat", patience=1)
    fit = trainer(pruning(schedule={"kind": "linear", "begin": 1, "end": 5}), stop, max_epochs=12)
    model = Flat()
    fit.fit(model, loader(), loader())
    assert fit.current_epoch == 6  # the last firing is at epoch 4: its loss is the best, epoch 5 is worse
    assert not dynamic_ops(model)
    assert fit.callback_metrics["pruning/macs"] <= 0.5


class Late(LitNet):
    """Its validation loss is bad right after the last firing at epoch 4, and comes back later."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("late", (0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 3.0, 2.0, 5.0, 6.0)[self.current_epoch])


def test_early_stopping_counts_no_epoch_of_the_grace() -> None:
    ends = {}
    for grace_epochs in (0, 2):
        stop = EarlyStopping("late", patience=1)
        callback = pruning(schedule={"kind": "linear", "begin": 1, "end": 5}, grace_epochs=grace_epochs)
        fit = trainer(callback, stop, max_epochs=10)
        fit.fit(Late(), loader(), loader())
        ends[grace_epochs] = fit.current_epoch
    assert ends == {0: 6, 2: 9}


def test_a_grace_in_epochs_wants_a_schedule_in_epochs() -> None:
    callback = pruning(schedule={"kind": "linear", "begin": 0.0, "end": 0.5}, grace_epochs=1)
    with pytest.raises(ConfigError, match=r"grace_epochs=1 with a schedule that counts steps.*max_epochs"):
        trainer(callback, max_epochs=-1, max_steps=6).fit(LitNet(), loader())
    with pytest.raises(ConfigError, match="Got grace_epochs=-1 for PruningCallback"):
        pruning(grace_epochs=-1)


def test_the_best_checkpoint_is_one_of_the_pruned_model(tmp_path: Path) -> None:
    best = {}
    for reset in (True, False):
        keep = ModelCheckpoint(tmp_path / str(reset), monitor="flat")
        trainer(pruning(reset_monitors=reset), keep, path=tmp_path).fit(Flat(), loader(), loader())
        best[reset] = load_pruned(keep.best_model_path, Flat)
    assert widths(best[False]) == (16, 32)
    assert widths(best[True]) < (16, 32)


def test_the_summary_shows_the_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[int] = []
    monkeypatch.setattr(ModelSummary, "summarize", lambda *a, **k: totals.append(a[2] if len(a) > 2 else a[1]))
    model = LitNet()
    trainer(pruning(), ModelSummary(), enable_model_summary=True).fit(model, loader())
    assert len(totals) == 2


def test_learning_rate_schedulers_go_on() -> None:
    class Cosine(LitNet):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    fit = trainer(pruning())
    fit.fit(Cosine(), loader())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


class Manual(LitNet):
    """Two optimizers by hand; the second is for the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = [p for name, p in self.named_parameters() if not name.startswith("head")]
        return torch.optim.Adam(body, 1e-2), torch.optim.SGD(self.head.parameters(), 0.1, momentum=0.9)


def test_two_optimizers_by_hand_shrink_both() -> None:
    model, fit = Manual(), trainer(pruning())
    fit.fit(model, loader())
    assert not dynamic_ops(model)
    states = {p: s for optimizer in fit.optimizers for p, s in optimizer.state.items()}
    assert set(states) == set(model.parameters())
    for parameter, state in states.items():
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
        assert moments
        assert all(value.shape == parameter.shape for value in moments)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"fast_dev_run": True}, id="fast_dev_run"),
        pytest.param({"overfit_batches": 1}, id="overfit_batches"),
        pytest.param({"limit_train_batches": 1}, id="limit_train_batches"),
        pytest.param({"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}, id="clip and accumulate"),
        pytest.param({"val_check_interval": 0.5, "num_sanity_val_steps": 1}, id="val_check_interval"),
        pytest.param({"reload_dataloaders_every_n_epochs": 1}, id="reload"),
        pytest.param({"enable_checkpointing": None, "logger": None, "barebones": True}, id="barebones"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*overfit_batches.*")
def test_ways_to_run_a_trainer(arguments: dict[str, Any]) -> None:
    model, callback = LitNet(), pruning(schedule="cubic")
    trainer(callback, **arguments).fit(model, loader(), loader())
    assert not dynamic_ops(model)
    assert callback.is_done
    assert widths(model) < (16, 32)


def test_the_learning_rate_finder_leaves_the_schedule_alone(tmp_path: Path) -> None:
    class Rated(LitNet):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    record = Record()
    finder = LearningRateFinder(num_training_steps=5)
    trainer(pruning(), finder, record, path=tmp_path).fit(Rated(), loader())
    assert record.widths[0] == (16, 32)
    assert record.widths[2] == record.widths[3] < (16, 32)


def test_other_stages_neither_trace_nor_need_an_example(tmp_path: Path) -> None:
    fit = trainer(pruning())
    fit.fit(LitNet(), loader())
    fit.save_checkpoint(tmp_path / "small.ckpt")
    expected = fit.validate(fit.lightning_module, loader(), verbose=False)
    for run in ("validate", "test", "predict"):
        model = LitNet()
        callback = PruningCallback(0.5, example_input="nothing that could be traced")
        result = getattr(trainer(callback), run)(model, loader(), ckpt_path=tmp_path / "small.ckpt")
        assert widths(model) == widths(fit.lightning_module)  # type: ignore[arg-type]
        if run == "validate":
            assert result == expected
