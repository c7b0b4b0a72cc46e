"""A latency as the target of a run: measured once, met at the end, the same after a resume and on every rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import PruningCallback
from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.latency import LatencySettings
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.processes import two_processes
from tests.test_resume import assert_same
from tests.timing import FakeClock, law

pytestmark = QUIET
EPOCHS = 4  # fires at 1 and 2, small from 3 on


def timed(clock: FakeClock, target: Any = None, **given: Any) -> PruningCallback:
    latency = LatencySettings(measure=clock, **given.pop("latency", {}))
    return pruning({"latency": 0.6} if target is None else target, latency=latency, **given)


def share(model: LitNet, clock: FakeClock) -> float:
    return clock.bias * clock.time(model) / clock.time(LitNet())


def run(path: Path, clock: FakeClock, ckpt: Path | None = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    files = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    fit = trainer(timed(clock, **given), files, max_epochs=EPOCHS, path=path)
    fit.fit(LitNet(), loader(), ckpt_path=ckpt)
    return fit


@pytest.mark.parametrize("compact", ["end", "each"])
@pytest.mark.parametrize("bias", [1.0, 1.1], ids=["as predicted", "slower"])
def test_fit_ends_in_a_model_whose_measured_latency_meets_the_target(
    bias: float, compact: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clock, model = FakeClock(lambda m: law(m, 1), bias), LitNet()
    fit = trainer(timed(clock, compact=compact, verbose=True))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit.fit(model, loader())
    assert not dynamic_ops(model)
    assert 0.5 < share(model, clock) <= 0.6
    assert fit.callback_metrics["pruning/latency"].item() == pytest.approx(share(model, clock))
    assert clock.tables == 3  # all units together, and each of the two
    pairs = len(clock.calls) - clock.tables
    assert pairs == 1 if bias == 1 else pairs > 1
    said = f"after {pairs - 1} correction"
    assert any("Latency: 0.5" in line and "quartiles of 5 rounds" in line and said in line for line in caplog.messages)


def test_milliseconds_and_multiply_adds_hold_together() -> None:
    clock, model = FakeClock(), LitNet()
    asked = 0.7 * law(LitNet())
    fit = trainer(timed(clock, {"latency_ms": asked, "macs": 0.6}, latency={"rounds": 7}))
    fit.fit(model, loader())
    assert law(model) <= asked
    assert fit.callback_metrics["pruning/macs"] <= 0.6
    assert clock.options["rounds"] == 7


def test_a_latency_below_the_floors_is_refused_before_training() -> None:
    model = LitNet()
    with pytest.raises(PlanError, match=r"0\.1 of the dense model's latency; the least that was measured is 0\.\d+ \["):
        trainer(timed(FakeClock(), {"latency": 0.1}, min_ratio=0.5)).fit(model, loader())
    assert not dynamic_ops(model)
    with pytest.raises(PlanError, match="macs of at most"):
        trainer(timed(FakeClock(), {"latency": 0.9, "macs": 0.01}, min_ratio=0.5)).fit(model, loader())
    assert not dynamic_ops(model)


def test_channels_are_ranked_by_what_they_take() -> None:
    """The second convolution takes all the time, so its channels go first."""
    clock, models = FakeClock(lambda m: 1 + m.conv2.out_channels), (LitNet(), LitNet())
    settings = {"importance": "random", "scope": "global"}
    trainer(timed(clock, {"channels": 0.7}, per_cost="latency", **settings)).fit(models[0], loader())
    trainer(pruning({"channels": 0.7}, **settings)).fit(models[1], loader())
    assert models[0].conv2.out_channels < models[1].conv2.out_channels
    assert clock.tables == len(clock.calls) == 3


def test_settings_without_a_latency_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"latency= with target=\{'macs': 0\.5\}, which asks for none"):
        PruningCallback({"macs": 0.5}, latency={"backend": "eager"})
    with pytest.raises(ConfigError, match=r"Got 'rouns' in latency\. Did you mean 'rounds'"):
        PruningCallback({"latency": 0.5}, latency={"rouns": 3})


def test_it_is_really_measured_where_nothing_is_said() -> None:
    model, callback = LitNet(), pruning({"latency_ms": 1e4, "macs": 0.5}, latency={"rounds": 2, "warm_up": 1})
    fit = trainer(callback)
    fit.fit(model, loader())
    low, high = sorted(callback.state_dict()["timed"]["measured"][1:])
    assert low <= fit.callback_metrics["pruning/latency"] <= high


# Resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    path = tmp_path_factory.mktemp("whole")
    return run(path, FakeClock(bias=1.1)), path


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_a_resumed_run_uses_the_table_of_the_first_one(epoch: int, whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    """Its clock runs otherwise, but for the plan at the end, which is measured anew if it was not made yet."""
    fit, path = whole
    clock = FakeClock(bias=1.1)
    truth = clock.time
    clock.time = lambda model: truth(model) if "pruned" in clock.calls[-1] else 1.0
    assert_same(fit, run(tmp_path, clock, path / f"epoch={epoch}.ckpt"))
    assert clock.tables == 0
    assert bool(clock.calls) is (epoch < 2)


def test_a_table_that_was_measured_otherwise_is_measured_anew(whole: tuple[Trainer, Path], tmp_path: Path) -> None:
    clock = FakeClock(bias=1.1)
    run(tmp_path, clock, whole[1] / "epoch=0.ckpt", latency={"backend": "compile"})
    assert clock.tables == 3
    assert clock.options["backend"] == "compile"


def test_a_target_that_shrinks_by_a_latency_leads_to_a_table_when_it_is_needed(tmp_path: Path) -> None:
    """The model is small when the fit starts, so it is measured once it is dense again."""
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(pruning({"macs": 0.8}, compact="each"), files, max_epochs=EPOCHS, path=tmp_path).fit(LitNet(), loader())
    clock, model = FakeClock(), LitNet()
    fit = trainer(timed(clock, {"macs": 0.8, "latency": 0.5}, compact="each"), files, max_epochs=EPOCHS, path=tmp_path)
    fit.fit(model, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert clock.tables == 3
    assert share(model, clock) <= 0.5


# Two processes

SCRIPT = """
import torch
from tests.lit import LitNet, loader, pruning, trainer
from tests.test_latency_fit import timed
from tests.timing import FakeClock

clock = FakeClock(bias=1.1)
callback = timed(clock)
fit = trainer(callback, strategy="ddp", devices=2)
torch.manual_seed(0)
model = LitNet()
fit.fit(model, loader())
state = callback.state_dict()
kept = {name: indices.tolist() for name, indices in state["kept"].items()}
found = {"kept": kept, "timed": state["timed"], "calls": clock.calls, "logged": dict(fit.callback_metrics)}
torch.save(found, f"rank{fit.global_rank}.pt")
"""


def test_rank_zero_measures_for_all(tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    assert first["timed"]["measured"] == second["timed"]["measured"] != []
    assert all(torch.equal(first["timed"]["table"][key], second["timed"]["table"][key]) for key in ("counts", "shares"))
    assert first["logged"]["pruning/latency"] == second["logged"]["pruning/latency"]
    assert len(first["calls"]) > 3
    assert second["calls"] == []
