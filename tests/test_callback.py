"""PruningCallback: what it refuses, when it fires, and what it leaves."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceXLAStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import ChannelMutator, PruningCallback, export_pruned, load_pruned
from lightning_prune.callback.ranks import check_strategy
from lightning_prune.errors import ConfigError, PlanError, TraceError
from lightning_prune.importance import l1
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, Record, data, loader, pruning, trainer, widths

pytestmark = QUIET


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
