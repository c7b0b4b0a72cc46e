"""Penalties that are added to gradients train as if they stood in the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_prune.callback import RecoveryCallback
from lightning_prune.errors import ConfigError
from lightning_prune.recovery import BNScaleL1, GroupLasso, GroupNormSparsity, GrowingRegularization, Recovery
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET

LATE = {"kind": "one_shot", "begin": 2, "end": 3}


def groups(model: LitNet) -> list[Tensor]:
    """Every channel's entries as a row: those that make it, its norm, and those that read it."""
    first = (
        model.conv1.weight,
        model.conv1.bias,
        model.norm.weight,
        model.norm.bias,
        model.conv2.weight.transpose(0, 1),
    )
    second = (model.conv2.weight, model.conv2.bias, model.head.weight.t())
    return [torch.cat([t.reshape(len(t), -1) for t in parts], 1) for parts in (first, second)]  # type: ignore[union-attr]


def lasso(model: LitNet) -> Tensor:
    return sum(rows.norm(dim=1).sum() * rows.shape[1] ** 0.5 for rows in groups(model))  # type: ignore[return-value]


def group_norm(model: LitNet) -> Tensor:
    total = torch.zeros(())
    for rows in groups(model):
        norms = rows.norm(dim=1).detach()
        factor = 2 ** (3 * (norms.max() - norms) / (norms.max() - norms.min()))
        total = total + (factor * rows.square().sum(1)).sum()
    return total


class InTheLoss(LitNet):
    penalty: Callable[[LitNet], Tensor]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) + 0.01 * type(self).penalty(self)


class Scales(InTheLoss):
    penalty = lambda model: model.norm.weight.abs().sum()  # noqa: E731


class Lasso(InTheLoss):
    penalty = lasso  # type: ignore[assignment]


class Norms(InTheLoss):
    penalty = group_norm  # type: ignore[assignment]


class Notes(Callback):
    """Weights before the firing."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def trained(model: LitNet, *recovery: Recovery, **options: Any) -> dict[str, Tensor]:
    if options.pop("scaled", False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    else:
        options = {"precision": "64-true", **options}
    notes = Notes()
    trainer(pruning(schedule=LATE, recovery=list(recovery)), notes, max_epochs=3, **options).fit(model, loader())
    return notes.weights


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, id="accumulated and clipped"),
        pytest.param({"scaled": True}, id="scaled"),
    ],
)
@pytest.mark.parametrize(
    ("by_hand", "part"),
    [
        pytest.param(Scales, BNScaleL1(0.01), id="scales"),
        pytest.param(Lasso, GroupLasso(0.01), id="lasso"),
        pytest.param(Norms, GroupNormSparsity(0.01, alpha=3.0), id="norms"),
    ],
)
def test_it_trains_as_the_penalty_in_the_loss(by_hand: type[LitNet], part: Recovery, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start = LitNet("sgd")
    models = [by_hand("sgd"), LitNet("sgd"), LitNet("sgd")]
    for model in models:
        model.load_state_dict(start.state_dict())
    expected = trained(models[0], **options)
    found = trained(models[1], part, **options)
    plain = trained(models[2], **options)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if options.get("scaled") else {"rtol": 1e-9, "atol": 1e-12}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)
    far = max(float((plain[name] - value).abs().max()) for name, value in expected.items())
    assert far > 5 * max(float((found[name] - value).abs().max()) for name, value in expected.items())


class Watch(Callback):
    """Gradients after everybody has added to them."""

    def __init__(self) -> None:
        self.removed: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx > 0:  # those of the batch before
            mask = pl_module.conv2.get_mutable_attr("out_channels").current_mask
            self.removed.append(float(pl_module.conv2._parameters["weight"].grad[~mask].abs().max()))


@pytest.mark.parametrize(
    "part", [BNScaleL1(0.1), GroupLasso(0.1), GroupNormSparsity(0.1)], ids=["scales", "lasso", "norms"]
)
def test_removed_entries_have_no_gradient(part: Recovery) -> None:
    watch, model = Watch(), LitNet("sgd")
    trainer(pruning(recovery=[part]), watch, max_epochs=4).fit(model, loader())
    assert watch.removed
    assert max(watch.removed) == 0.0


def test_a_unit_of_one_channel_has_a_penalty_too() -> None:
    model = LitNet("sgd")
    schedule = {"kind": lambda share: 0.99 + 0.01 * (share == 1), "begin": 1, "end": 3}  # nearly all goes at the first
    few = pruning(0.05, recovery=[GroupNormSparsity()], schedule=schedule, min_ratio=0, divisor=1, compact="never")
    trainer(few).fit(model, loader())
    assert model.conv1.out_channels == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_schedule_of_the_strength() -> None:
    shares: list[float] = []
    trainer(RecoveryCallback([BNScaleL1(0.1, lambda share: shares.append(share) or 0.0)]), max_epochs=4).fit(  # type: ignore[func-returns-value]
        LitNet(), loader()
    )
    assert sorted(set(shares)) == [0.0, 0.25, 0.5, 0.75]


def test_growing_regularization_shrinks_what_will_go() -> None:
    part = GrowingRegularization(step=0.05, every=2, ceiling=0.5, share=0.25)
    torch.manual_seed(0)
    model = LitNet("sgd")
    chosen = [rows.detach().norm(dim=1).argsort()[: len(rows) // 4] for rows in groups(model)]
    before = [rows.detach().norm(dim=1) for rows in groups(model)]
    after: list[Tensor] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                assert part.strength == 0.05 * (3 // 2)
            if trainer.current_epoch == 7:
                after.extend(rows.detach().norm(dim=1) for rows in groups(pl_module))

    schedule = {"kind": "one_shot", "begin": 8, "end": 9}
    trainer(pruning(schedule=schedule, recovery=[part]), Look(), max_epochs=9).fit(model, loader())
    assert part.strength == 0.5  # after 24 steps 12 * 0.05, up to the ceiling
    for index, old, new in zip(chosen, before, after, strict=True):
        shares = new / old
        others = torch.ones(len(old), dtype=torch.bool)
        others[index] = False
        assert float(shares[index].max()) < float(shares[others].min())


def test_growing_regularization_resumes(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(*more: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        part = GrowingRegularization(0.05, every=2)
        fit = trainer(pruning(schedule=LATE, recovery=[part, GroupLasso(1e-2), BNScaleL1(1e-2)]), *more)
        fit.fit(LitNet(), loader(), ckpt_path=ckpt)
        return fit.lightning_module.state_dict()

    whole = run(Save())
    torch.load(tmp_path / "1.ckpt", weights_only=True)
    for epoch in (0, 1):
        resumed = run(ckpt=tmp_path / f"{epoch}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("part", [GroupLasso(), GroupNormSparsity(), GrowingRegularization()])
def test_groups_need_pruning(part: Recovery) -> None:
    with pytest.raises(ConfigError, match=f"{type(part).__name__} without pruning"):
        trainer(RecoveryCallback([part])).fit(LitNet(), loader())


@pytest.mark.parametrize(
    "make",
    [
        lambda: BNScaleL1(-1.0),
        lambda: GroupLasso(True),
        lambda: GroupLasso(schedule="square"),
        lambda: GrowingRegularization(every=0),
        lambda: GrowingRegularization(share=1.0),
    ],
    ids=["negative", "bool", "schedule", "every", "share"],
)
def test_arguments_that_do_not_fit(make: Callable[[], Recovery]) -> None:
    with pytest.raises(ConfigError, match=r"Got (strength|schedule|every|share)="):
        make()
