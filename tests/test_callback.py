"""PruningCallback: what it refuses, when it fires, what it leaves, and how it gets on with others."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceXLAStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import ChannelMutator, PruningCallback, export_pruned, load_pruned
from lightning_prune.callback.example import forward_input
from lightning_prune.callback.ranks import check_strategy
from lightning_prune.errors import ConfigError, PlanError, TraceError
from lightning_prune.importance import l1
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer
from tests.processes import two_processes

pytestmark = QUIET


def widths(model: LitNet) -> tuple[int, int]:
    return model.conv1.out_channels, model.conv2.out_channels


class Record(Callback):
    """Notes what the model is at the end of every epoch."""

    def __init__(self) -> None:
        self.dynamic: list[bool] = []
        self.widths: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.dynamic.append(bool(dynamic_ops(pl_module)))
        self.widths.append(widths(pl_module))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"target": 0}, "target=0", id="target zero"),
        pytest.param({"target": -0.5}, r"target=-0\.5", id="target negative"),
        pytest.param({"target": math.nan}, "target=nan", id="target nan"),
        pytest.param({"target": {"mac": 0.5}}, "Did you mean 'macs'", id="target key"),
        pytest.param({"importance": "l3"}, "importance 'l3'. Did you mean 'l[12p]'", id="importance"),
        pytest.param({"schedule": "cubik"}, "'cubik'.*Did you mean 'cubic'", id="schedule"),
        pytest.param({"scope": "globalx"}, "scope='globalx'.*Did you mean 'global'", id="scope"),
        pytest.param({"compact": "ends"}, "compact='ends'.*Did you mean 'end'", id="compact"),
        pytest.param({"divisor": 0}, "divisor=0", id="divisor zero"),
        pytest.param({"divisor": 2.5}, r"divisor=2\.5", id="divisor fraction"),
        pytest.param({"min_ratio": 1.5}, r"min_ratio=1\.5", id="min_ratio"),
        pytest.param({"min_ratio": True}, "min_ratio=True", id="min_ratio bool"),
        pytest.param({"ignore": [1]}, r"ignore=\[1\]", id="ignore"),
        pytest.param({"mutator": ChannelMutator(), "ignore": "head"}, "mutator= together with ignore", id="mutator 1"),
        pytest.param({"mutator": ChannelMutator(), "example_input": 1}, "with example_input", id="mutator 2"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PruningCallback(**{"target": 0.5, **arguments})


# What a fit leaves


def test_fit_ends_in_plain_small_modules_that_meet_the_target() -> None:
    model, callback = LitNet(), pruning()
    parameters = list(model.parameters())
    fit = trainer(callback)
    fit.fit(model, loader())
    assert not dynamic_ops(model)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert type(model.conv1) is nn.Conv2d
    dense, (first, second) = 3 * 16 * 9 * 36 + 16 * 32 * 9 * 36 + 32 * 5, widths(model)
    macs = 3 * first * 9 * 36 + first * second * 9 * 36 + second * 5
    assert 0.4 * dense < macs <= 0.5 * dense
    assert fit.callback_metrics["pruning/macs"].item() == pytest.approx(macs / dense)
    for parameter, state in fit.optimizers[0].state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_it_fires_at_each_epoch_of_the_schedule_and_is_small_from_the_next_one() -> None:
    record = Record()
    trainer(pruning(), record).fit(LitNet(), loader())
    assert record.dynamic == [True, True, True, False]
    assert record.widths[0] == (16, 32)
    assert record.widths[1] != record.widths[2]
    assert record.widths[2] == record.widths[3]


@pytest.mark.parametrize(
    ("compact", "dynamic"),
    [
        pytest.param("each", [True, False, False, False], id="each"),
        pytest.param("never", [True, True, True, True], id="never"),
    ],
)
def test_compact_says_when_the_model_becomes_small(compact: Any, dynamic: list[bool]) -> None:
    record, model = Record(), LitNet()
    trainer(pruning(compact=compact), record).fit(model, loader())
    assert record.dynamic == dynamic
    small = export_pruned(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in LitNet().parameters())


@pytest.mark.parametrize("max_epochs", [1, 2])
def test_a_short_run_meets_the_target(max_epochs: int) -> None:
    model, fit = LitNet(), trainer(pruning(schedule="cubic"), max_epochs=max_epochs)
    fit.fit(model, loader())
    assert fit.callback_metrics["pruning/macs"] <= 0.5
    assert not dynamic_ops(model)


def test_steps_are_counted_where_the_run_has_no_epochs() -> None:
    calls: list[int] = []
    fit = trainer(max_epochs=-1, max_steps=9, accumulate_grad_batches=2)

    def score(unit: Any) -> Tensor:
        calls.append(fit.global_step)
        return l1(unit)

    fit.callbacks.append(pruning(importance=score, schedule={"kind": "linear", "begin": 0.0, "end": 0.5, "every": 2}))
    model = LitNet()
    fit.fit(model, loader())
    assert sorted(set(calls)) == [0, 2]
    assert calls.count(0) == calls.count(2) == 2  # once per unit, though two batches share a step
    assert not dynamic_ops(model)


def test_metrics_reach_every_logger(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    fit = trainer(pruning(), logger=loggers, log_every_n_steps=1)
    fit.fit(LitNet(), loader())
    assert {"pruning/macs", "pruning/params", "pruning/channels"} <= set(fit.progress_bar_metrics)
    for logger in loggers:
        text = (Path(logger.log_dir) / "metrics.csv").read_text(encoding="utf-8")
        assert "pruning/macs" in text.splitlines()[0]


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_prints_the_units_before_and_after(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(pruning(verbose=verbose)).fit(LitNet(), loader())
    printed = capsys.readouterr().out
    assert ("conv1_(0, 16)" in printed) is verbose
    assert ("before" in printed) is verbose


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_other_precisions_are_certified_too(precision: Any) -> None:
    model = LitNet()
    batches = DataLoader(data(), 8)
    trainer(pruning(), precision=precision).fit(model, batches)
    assert widths(model) != (16, 32)
    assert not dynamic_ops(model)


def test_removed_entries_are_put_back_before_they_are_scored_again() -> None:
    seen: list[Tensor] = []

    def score(unit: Any) -> Tensor:
        if unit.name.startswith("conv2"):
            seen.append(unit.output_related[0].full().clone())
            return torch.arange(32.0)
        return torch.arange(16.0)

    class Keep(Callback):
        removed: Tensor

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                self.removed = pl_module.conv2._parameters["weight"][:2].detach().clone()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:  # weight decay and momentum have moved them
                assert not torch.equal(pl_module.conv2._parameters["weight"][:2], self.removed)

    keep = Keep()
    trainer(pruning(0.5, importance=score), keep).fit(LitNet("sgd"), loader())
    assert torch.equal(seen[1][:2], keep.removed)


def test_a_model_goes_on_where_the_last_fit_stopped() -> None:
    model, callback = LitNet(), pruning()
    fit = trainer(callback)
    fit.fit(model, loader())
    small = widths(model)
    fit.fit_loop.max_epochs = 6
    fit.fit(model, loader())
    assert widths(model) == small
    trainer(callback).fit(model, loader())
    assert widths(model) == small


def test_a_small_model_is_not_grown_by_a_new_callback(tmp_path: Path) -> None:
    fit = trainer(pruning())
    fit.fit(LitNet(), loader())
    fit.save_checkpoint(tmp_path / "small.ckpt")
    model = load_pruned(tmp_path / "small.ckpt", LitNet)
    first, second = widths(model)
    record = Record()
    trainer(pruning({"macs": 0.3}), record).fit(model, loader())
    assert all(a <= first and b <= second for a, b in record.widths)
    assert widths(model) < (first, second)


# What is traced


class Tupled(LitNet):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Mapped(LitNet):
    def forward(self, image: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(image)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(image=batch["image"]), batch["label"])


class Maps(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"label": torch.tensor(index), "image": torch.rand(3, 6, 6)}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([data()[k] for k in range(8)])


class Draws(Callback):
    """Notes the state of the random numbers when it is set up."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.state = torch.get_rng_state()


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        pytest.param(Tupled, loader(), id="leading items of a tuple"),
        pytest.param(Mapped, DataLoader(Maps(), 2), id="keys of a mapping"),
        pytest.param(LitNet, DataLoader(Stream(), 4), id="a stream"),
    ],
)
def test_the_example_comes_from_the_training_data(make: Any, batches: Any) -> None:
    before, callback, after = Draws(), pruning(), Draws()
    trainer(before, callback, after, max_epochs=0).fit(make(), batches)
    assert torch.equal(before.state, after.state)
    assert callback.mutator is not None
    assert [unit.num_channels for unit in callback.mutator.units] == [16, 32]
    trainer(pruning()).fit(make(), batches)


def test_the_example_passes_the_transfer_hooks_of_the_data() -> None:
    class Bytes(LightningDataModule):
        def train_dataloader(self) -> Any:
            images, labels = data().tensors
            return DataLoader(torch.utils.data.TensorDataset((images * 9).to(torch.uint8), labels), 8)

        def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
            return batch[0].float() / 9, batch[1]

    model = LitNet()
    trainer(pruning()).fit(model, datamodule=Bytes())
    assert widths(model) != (16, 32)


def test_given_examples_come_first() -> None:
    given, array = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 10, 10)
    model = LitNet()
    model.example_input_array = array
    for callback, expected in ((pruning(example_input=given), given), (pruning(), array)):
        trainer(callback, max_epochs=0).fit(model, loader())
        assert callback.mutator is not None
        assert callback.mutator.example_input is expected


def test_items_of_a_batch_that_forward_takes() -> None:
    assert forward_input(lambda x, y, z=1: 0, [1, 2, 3]) == (1, 2)
    assert forward_input(lambda x=1: 0, (1, 2)) == (1,)
    assert forward_input(lambda batch: 0, {"a": 1}) == ({"a": 1},)
    with pytest.raises(ConfigError, match=r"a training batch of 1 items; forward requires 2: x, y"):
        forward_input(lambda x, y: 0, [1])
    with pytest.raises(ConfigError, match=r"keys \['x'\]; forward requires y too"):
        forward_input(lambda x, y: 0, {"x": 1})


class NoForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = LitNet()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_without_forward_the_error_names_submodule_and_example_input() -> None:
    with pytest.raises(ConfigError, match=r"without a forward method.*submodule='net', example_input="):
        trainer(pruning()).fit(NoForward(), loader())
    model = NoForward()
    trainer(pruning(submodule="net", example_input=torch.randn(2, 3, 6, 6))).fit(model, loader())
    assert widths(model.net) != (16, 32)


def test_an_example_that_cannot_be_made_is_explained() -> None:
    class Broken(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            raise OSError("no such image")

    with pytest.raises(ConfigError, match=r"OSError while making an example batch.*no such image.*example_input="):
        trainer(pruning()).fit(LitNet(), DataLoader(Broken(), 8))


class Parted(LitNet):
    """A backbone with a head outside, and a second head that `forward` never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.outer = nn.Linear(8, 5)
        self.hidden = nn.Conv2d(16, 5, 1)
        self.reads_inside = False

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.backbone(x * 2))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if self.reads_inside:
            loss = loss + self.hidden(self.backbone[0](batch[0])).mean()
        return loss


def test_a_submodule_is_pruned_inside_and_keeps_its_outputs() -> None:
    model, callback = Parted(), pruning(submodule="backbone")
    trainer(callback).fit(model, loader())
    assert model.backbone[0].out_channels < 16
    assert model.backbone[2].out_channels == 8
    assert widths(model) == (16, 32)
    assert callback.mutator is not None
    assert [unit.name for unit in callback.mutator.units] == ["0_(0, 16)_out_1_in_1"]
    assert callback.mutator.example_input[0].shape == (2, 3, 6, 6)


def test_an_unknown_submodule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"submodule='backbones'.*'backbone'"):
        trainer(pruning(submodule="backbones")).fit(Parted(), loader())


@pytest.mark.parametrize("submodule", ["backbone", None])
def test_a_layer_outside_the_trace_that_meets_a_narrower_input_is_named(submodule: str | None) -> None:
    model = Parted()
    model.reads_inside = True
    with pytest.raises(ConfigError, match=r"input of \d+ channels for layer 'hidden', which expects 16.*ignore="):
        trainer(pruning({"macs": 0.6}, submodule=submodule)).fit(model, loader())


# What is refused at setup, with the model unchanged


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        pytest.param({"target": {"macs": 0.001}}, PlanError, "the least that can be reached", id="unreachable"),
        pytest.param({"target": {"conv9*": 0.5}}, ConfigError, "matches none of 2 units", id="unit glob"),
        pytest.param({"ignore": "*"}, ConfigError, "nothing to prune", id="nothing to prune"),
        pytest.param({"schedule": {"begin": 3, "end": 0.1}}, ConfigError, "begin=3 after end", id="schedule"),
    ],
)
def test_what_cannot_be_is_refused_at_setup(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    model = LitNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        trainer(pruning(**arguments), max_epochs=9).fit(model, loader())
    assert not dynamic_ops(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_example_that_does_not_fit_leaves_the_model_alone() -> None:
    model = LitNet()
    with pytest.raises(TraceError, match=r"shapes \[\(2, 4, 6, 6\)\].*3 channels.*example_input="):
        trainer(pruning(example_input=torch.randn(2, 4, 6, 6))).fit(model, loader())
    assert not dynamic_ops(model)


class Late(LitNet):
    def setup(self, stage: str) -> None:
        self.extra = nn.Linear(5, 5)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.extra(self(batch[0])), batch[1])


class Later(LitNet):
    def setup(self, stage: str) -> None:
        self.extra = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


@pytest.mark.parametrize("make", [Late, Later])
def test_layers_made_in_setup_are_refused(make: Any) -> None:
    model = make()
    with pytest.raises(ConfigError, match=r"in __init__ or in configure_model"):
        trainer(pruning()).fit(model, loader())
    assert not dynamic_ops(model)


def test_layers_made_in_configure_model_are_pruned() -> None:
    class Configured(LitNet):
        def configure_model(self) -> None:
            if not hasattr(self, "extra"):
                self.extra = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(super().forward(x))

    model = Configured()
    trainer(pruning(0.5)).fit(model, loader())
    assert model.extra[0].out_features == 8


def test_lbfgs_is_refused_unless_masks_stay() -> None:
    class Newton(LitNet):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=1)

    with pytest.raises(ConfigError, match=r"LBFGS.*compact='never'"):
        trainer(pruning()).fit(Newton(), loader())


def test_a_second_instance_is_refused() -> None:
    class Another(PruningCallback):
        pass

    with pytest.raises(ConfigError, match="two PruningCallbacks"):
        trainer(pruning(), Another(0.5)).fit(LitNet(), loader())


def test_strategies_that_hold_parameters_are_refused_with_the_way_out() -> None:
    stub: Any = SimpleNamespace(strategy=SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy))
    with pytest.raises(ConfigError, match=r"SingleDeviceXLAStrategy.*ddp.*load_pruned"):
        check_strategy(stub, True)


def test_synchronized_batch_norm_is_refused() -> None:
    strategy = DDPStrategy()
    strategy._layer_sync = TorchSyncBatchNorm()
    with pytest.raises(ConfigError, match="sync_batchnorm=True"):
        check_strategy(SimpleNamespace(strategy=strategy), True)  # type: ignore[arg-type]


def test_a_compiled_module_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(LitNet):  # Lightning 2.6 cannot log in a compiled step
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    plain, compiled = Silent(), Silent()
    compiled.load_state_dict(plain.state_dict())
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    trainer(pruning()).fit(plain, loader())
    assert not resets
    trainer(pruning()).fit(torch.compile(compiled, backend="eager"), loader())  # type: ignore[arg-type]
    assert len(resets) == 3
    assert widths(plain) == widths(compiled)
    assert torch.allclose(plain.head.weight, compiled.head.weight, atol=1e-5)


def test_spawned_processes_need_the_hooks_before_fit() -> None:
    strategy = DDPStrategy(start_method="spawn")
    strategy._launcher = type("_MultiProcessingLauncher", (), {"_start_method": "spawn"})()  # type: ignore[assignment]
    stub: Any = SimpleNamespace(strategy=strategy)
    with pytest.raises(ConfigError, match=r"'spawn'.*register_structure_hooks"):
        check_strategy(stub, False)
    check_strategy(stub, True)


# A mutator of one's own


def test_a_mutator_of_ones_own_is_used() -> None:
    mutator = ChannelMutator(example_input=torch.randn(2, 3, 6, 6), ignore="conv1")
    model = LitNet()
    trainer(pruning(0.5, mutator=mutator)).fit(model, loader())
    assert widths(model) == (16, 16)
    with pytest.raises(ConfigError, match="already has a model"):
        trainer(pruning(0.5, mutator=mutator)).fit(LitNet(), loader())


def test_a_mutator_that_has_the_model_already_is_used() -> None:
    model = LitNet()
    mutator = ChannelMutator(example_input=torch.randn(2, 3, 6, 6))
    mutator.prepare_from_supernet(model)
    trainer(pruning(0.5, mutator=mutator)).fit(model, loader())
    assert widths(model) == (8, 16)


# Other callbacks


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


def test_an_exception_ends_the_watch_over_layers() -> None:
    model = Parted()
    model.reads_inside = True
    with pytest.raises(ConfigError, match="layer 'hidden'"):
        trainer(pruning({"macs": 0.6})).fit(model, loader())
    assert not any(module._forward_pre_hooks for module in model.modules())


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


# Two processes

SCRIPT = """
import sys
import torch
from lightning_prune import PruningCallback
from tests.lit import LitNet, loader, pruning, trainer

def score(unit):  # every rank would choose otherwise
    order = torch.arange(unit.num_channels, dtype=torch.float32)
    return order if fit.global_rank == 0 else order.flip(0) * 1.5

torch.set_num_threads(1)
torch.manual_seed(0)
model = LitNet()
callback = pruning(importance=score, compact=sys.argv[1])
fit = trainer(callback, strategy=sys.argv[2], devices=2, max_epochs=5)
fit.fit(model, loader())
kept = {name: indices.tolist() for name, indices in callback.state_dict()["kept"].items()}
torch.save({"weights": dict(model.named_parameters()), "kept": kept}, f"rank{fit.global_rank}.pt")
"""


@pytest.mark.parametrize(
    ("compact", "strategy"),
    [
        pytest.param("end", "ddp_find_unused_parameters_false", id="end"),
        pytest.param("each", "ddp", id="each"),
    ],
)
def test_two_processes_keep_the_same_structure_and_weights(compact: str, strategy: str, tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path, compact, strategy)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    kept = first["kept"]["conv1_(0, 16)_out_2_in_2"]
    assert kept == list(range(len(kept)))  # the mean of both scores prefers the first channels
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert len(first["weights"]["conv1.weight"]) == len(kept) < 16


DISAGREE = """
from lightning_prune import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.lit import LitNet, loader, pruning, trainer

apply = ChannelMutator.apply

def other(self, plan):
    if fit.global_rank == 1:
        plan = KeepPlan({name: kept[1:] for name, kept in plan.kept.items()})
    apply(self, plan)

ChannelMutator.apply = other
fit = trainer(pruning(), strategy="ddp", devices=2)
try:
    fit.fit(LitNet(), loader())
finally:
    with open(f"rank{fit.global_rank}.txt", "w") as file:
        import sys
        file.write(str(sys.exc_info()[1]))
"""


def test_a_rank_with_another_structure_stops_all_ranks(tmp_path: Path) -> None:
    assert two_processes(DISAGREE, tmp_path).returncode != 0
    for rank in (0, 1):
        said = (tmp_path / f"rank{rank}.txt").read_text(encoding="utf-8")
        assert "Got different structures on rank 0 and" in said
