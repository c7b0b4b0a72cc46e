"""What the callback does not do in epochs in which it does not prune: there it shall cost next to nothing."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_prune.callback.collect import Collector
from lightning_prune.graph import CostModel
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET


class Calls(Callback):
    """Counts the calls of a method in each epoch; stands behind the callback that makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type[Any], name: str) -> None:
        self.counts: list[int] = []
        self.number = 0
        method = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.number += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.number = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.append(self.number)
        self.number = 0


def test_costs_are_worked_out_once_for_each_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, CostModel, "measure")
    trainer(pruning(), calls, max_epochs=6).fit(LitNet(), loader())
    assert [bool(count) for count in calls.counts] == [True, True, True, False, False, False]


@pytest.mark.parametrize(("importance", "watches"), [("l1", False), ("taylor", True)])
def test_an_importance_of_weights_asks_no_batch_whether_to_watch(
    importance: str, watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, Collector, "begin_batch")
    trainer(pruning(importance=importance), calls, max_epochs=3).fit(LitNet(), loader())
    assert any(calls.counts) == watches


def test_a_small_model_that_is_fitted_again_is_not_watched() -> None:
    callback, model, watched = pruning(), LitNet(), []

    class Hooks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            watched.append([name for name, layer in pl_module.named_modules() if layer._forward_pre_hooks])

    for _ in range(2):
        trainer(callback, Hooks()).fit(model, loader())
    assert watched == [["conv1"], []]  # nothing is cut of the images that the first layer reads
