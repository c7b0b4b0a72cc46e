"""Gradients that are watched are those of the loss: accumulated, scaled, stepped by hand, and over processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune import PruningCallback
from lightning_prune.errors import PlanError
from tests.lit import QUIET, LitNet, data, pruning, trainer
from tests.processes import two_processes
from tests.watching import WATCHING, Smooth, spied_scores

pytestmark = QUIET


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The scores of every firing, as they come."""
    return spied_scores(monkeypatch)


def first_scores(scored: list[dict[str, Tensor]], name: Any, batch: int, **arguments: Any) -> dict[str, Tensor]:
    """Return the scores of the first firing, of one epoch of a model whose examples do not see one another."""
    scored.clear()
    torch.manual_seed(0)
    model = arguments.pop("model", Smooth)()
    once = {"kind": "one_shot", "begin": 1}
    fit = trainer(pruning(importance={"name": name, "batches": 24}, schedule=once), max_epochs=2, **arguments)
    fit.fit(model, DataLoader(data(), batch))
    return scored[0]


@pytest.mark.parametrize("name", WATCHING)
def test_accumulated_batches_count_as_one(name: str, scored: list[dict[str, Tensor]]) -> None:
    whole = first_scores(scored, name, 8, precision="64-true")
    parts = first_scores(scored, name, 4, precision="64-true", accumulate_grad_batches=2)
    for unit, row in whole.items():
        assert row.any()
        torch.testing.assert_close(parts[unit], row, rtol=1e-6, atol=0.0)


class Fused(Smooth):
    """An optimizer that unscales gradients by itself, after everybody has looked at them."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, fused=True)


class Plain(Smooth):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, fused=False)


def scaler(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


@pytest.mark.parametrize("model", [Plain, Fused], ids=["unscaled before", "unscaled by the optimizer"])
@pytest.mark.parametrize("name", ["taylor", "hessian", "fisher"])
def test_the_scale_of_a_scaler_is_divided_out(name: str, model: type[LitNet], scored: list[dict[str, Tensor]]) -> None:
    low, high = (first_scores(scored, name, 8, model=model, plugins=scaler(2.0**k)) for k in (8, 12))
    full = first_scores(scored, name, 8, model=Plain)
    for unit, row in full.items():
        torch.testing.assert_close(low[unit], high[unit], rtol=1e-2, atol=float(row.max()) * 1e-3)
        torch.testing.assert_close(high[unit], row, rtol=0.2, atol=float(row.max()) * 0.05)  # half precision


def test_a_step_that_a_scaler_skips_is_not_seen(scored: list[dict[str, Tensor]]) -> None:
    """The first scale is so large that gradients are not finite; the scaler halves it until they are."""
    plugin = scaler(2.0**20)
    row = first_scores(scored, "taylor", 4, plugins=plugin)
    assert plugin.scaler is not None
    assert 2.0**14 < plugin.scaler.get_scale() < 2.0**20
    assert all(scores.isfinite().all() and scores.any() for scores in row.values())


def test_only_steps_that_a_scaler_skips_are_no_reason_to_call_parameters_frozen(scored: Any) -> None:
    with pytest.raises(PlanError, match="not finite in all 3 steps that importance 'taylor' watched: the scaler"):
        first_scores(scored, "taylor", 8, plugins=scaler(2.0**40))


class TwoOptimizers(Smooth):
    """Each optimizer has some layers, and takes its own steps by hand."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *others = self.children()
        rest = [p for module in others for p in module.parameters()]
        return torch.optim.SGD(first.parameters(), 0.05), torch.optim.SGD(rest, 0.05)


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_optimizers_by_hand(name: str, scored: list[dict[str, Tensor]]) -> None:
    automatic = first_scores(scored, name, 8)
    by_hand = first_scores(scored, name, 8, model=TwoOptimizers)
    for unit, row in automatic.items():
        torch.testing.assert_close(by_hand[unit], row)


# Two processes


class Notes(Callback):
    """What rank 0 would save between the watched batches and the firing."""

    watched: dict[str, Tensor]

    def __init__(self, callback: PruningCallback) -> None:
        self.callback = callback

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self.watched = self.callback.state_dict()["watched"]["observer"]


def fitted(name: str, devices: int) -> dict[str, Any]:
    """Return what a fit on some processes decided, and on what grounds; together they see 8 images at each step."""
    torch.manual_seed(0)
    callback = pruning(importance=name, schedule={"kind": "one_shot", "begin": 1})
    scores: list[dict[str, Tensor]] = []
    collected = callback._collector.scores
    callback._collector.scores = lambda *args, **more: scores.append(collected(*args, **more)) or scores[-1]  # type: ignore
    notes = Notes(callback)
    options: Any = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    fit = trainer(callback, notes, max_epochs=2, precision="64-true", use_distributed_sampler=False, **options)
    turns: Any = DistributedSampler(data(), devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    fit.fit(Smooth(), DataLoader(data(), 8 // devices, sampler=turns))
    kept = {unit: indices.tolist() for unit, indices in callback.state_dict()["kept"].items()}
    return {"scores": scores[0], "kept": kept, "watched": notes.watched}


SCRIPT = """
import os
import torch
from tests.test_collect_gradients import fitted

torch.set_num_threads(1)
found = {name: fitted(name, 2) for name in ("taylor", "fisher", "activation")}
torch.save(found, f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
"""


def test_two_processes_score_as_one_does_on_all_the_data(tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name in ("taylor", "fisher", "activation"):
        alone = fitted(name, 1)
        assert alone["kept"] == first[name]["kept"] == second[name]["kept"]
        for unit, row in alone["scores"].items():
            assert torch.equal(first[name]["scores"][unit], second[name]["scores"][unit])
            torch.testing.assert_close(first[name]["scores"][unit], row, rtol=1e-6, atol=0.0)
        for state in ("total", "weight"):  # rank 0 saves for both
            assert torch.equal(first[name]["watched"][state], second[name]["watched"][state])
