"""Distillation changes the loss by a number that can be computed by hand, and leaves nothing of the teacher behind."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_prune.callback import RecoveryCallback
from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.recovery import Distillation, distillation_loss
from tests.lit import QUIET, LitNet, loader, pruning, trainer

pytestmark = QUIET


def test_the_loss_is_that_of_the_formula() -> None:
    student, teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    low, high = 1 / (1 + math.e), math.e / (1 + math.e)  # with T = 2
    expected = 4 * (high * math.log(high / low) + low * math.log(low / high)) / 2
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)
    images = [t.t().unsqueeze(0) for t in (student, teacher)]  # [1, classes, places]
    assert float(distillation_loss(*images, temperature=2.0, dim=1)) == pytest.approx(expected, rel=1e-6)


class ByHand(LitNet):
    """The same loss, written into `training_step`."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        logits = self(batch[0])
        with torch.no_grad():
            soft = F.softmax(self.teacher(batch[0]) / 3.0, 1)
        kl = F.kl_div(F.log_softmax(logits / 3.0, 1), soft, reduction="batchmean")
        return 0.6 * F.cross_entropy(logits, batch[1]) + 0.4 * 9.0 * kl


class ByLayer(LitNet):
    """Calls a part of itself."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("options", [
    pytest.param({}, id="plain"),
    pytest.param({"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, id="accumulated and clipped"),
    pytest.param({"plugins": "scaler"}, id="scaled"),
])  # fmt: skip
def test_it_trains_as_the_loss_written_by_hand(options: dict[str, Any]) -> None:
    def fit(model: LitNet, *callbacks: Callback) -> dict[str, Tensor]:
        given = dict(options)
        if "plugins" in given:
            given["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        else:
            given["precision"] = "64-true"
        trainer(*callbacks, max_epochs=2, **given).fit(model, loader())
        return weights(model)

    torch.manual_seed(0)
    start = LitNet("sgd")
    teacher, by_hand, student = LitNet("sgd"), ByHand("sgd"), copy.deepcopy(start)
    teacher = teacher.double() if "plugins" not in options else teacher
    by_hand.load_state_dict(start.state_dict())
    by_hand.__dict__["teacher"] = copy.deepcopy(teacher).eval()
    expected = fit(by_hand)
    found = fit(student, RecoveryCallback([Distillation(3.0, 0.4, teacher=teacher)]))
    plain = fit(copy.deepcopy(start))
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if "plugins" not in options else {"rtol": 2e-2, "atol": 2e-3}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)
    far = max(float((plain[name] - value).abs().max()) for name, value in expected.items())
    assert far > 5 * max(float((found[name] - value).abs().max()) for name, value in expected.items())


def test_the_teacher_is_the_dense_model_of_the_start_and_nowhere_else() -> None:
    model = LitNet()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    names = list(model.state_dict())
    part = Distillation()
    fit = trainer(pruning(recovery=[part]))
    fit.fit(model, loader())
    assert part.teacher is not None
    assert all(torch.equal(value, start[name]) for name, value in part.teacher.state_dict().items())
    assert not any(module.training for module in part.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in part.teacher.parameters())
    assert list(model.state_dict()) == names
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for group in fit.optimizers[0].param_groups for p in group["params"])
    assert len(model.head.weight[0]) < 32
    assert not model._forward_hooks


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_has_the_same_teacher(epoch: int, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(seed: int, *more: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        fit = trainer(pruning(recovery=[Distillation(alpha=0.9)]), *more)
        fit.fit(LitNet(), loader(), ckpt_path=ckpt)
        return fit.lightning_module.state_dict()

    whole = run(0, Save())
    torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)
    resumed = run(1, ckpt=tmp_path / f"{epoch}.ckpt")  # built with other weights
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_teacher_from_a_file(tmp_path: Path) -> None:
    teacher = LitNet()
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "dense.ckpt")
    part = Distillation(teacher=str(tmp_path / "dense.ckpt"))
    trainer(pruning(recovery=[part])).fit(LitNet(), loader())
    assert part.teacher is not None
    assert torch.equal(part.teacher.get_parameter("head.weight"), teacher.head.weight)
    assert part.state_dict() == {}
    for state, match in ((ByLayer().state_dict(), "another model for the teacher"), (None, "cannot be read")):
        path = tmp_path / "other.ckpt"
        torch.save({"state_dict": state}, path) if state else path.write_text("no")
        with pytest.raises(CheckpointError, match=match):
            trainer(pruning(recovery=[Distillation(teacher=str(path))])).fit(LitNet(), loader())


def test_a_loss_of_ones_own_sees_outputs_and_batch() -> None:
    seen: list[Any] = []

    def loss(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        seen.append((student.requires_grad, teacher.requires_grad, batch[0].shape))
        return F.mse_loss(student, teacher)

    trainer(RecoveryCallback([Distillation(loss=loss)]), max_epochs=1).fit(LitNet(), loader())
    assert seen == [(True, False, torch.Size([8, 3, 6, 6]))] * 3


def test_a_part_that_training_step_calls() -> None:
    with pytest.raises(ConfigError, match=r"does not call ByLayer\.forward.*layer="):
        trainer(RecoveryCallback([Distillation()]), max_epochs=1).fit(ByLayer(), loader())
    with pytest.raises(ConfigError, match="Got layer='nets' for Distillation"):
        trainer(RecoveryCallback([Distillation(layer="nets")]), max_epochs=1).fit(ByLayer(), loader())
    seen: list[Tensor] = []
    part = Distillation(layer="net", loss=lambda s, t, batch: seen.append(t) or F.mse_loss(s, t))  # type: ignore[func-returns-value]
    trainer(RecoveryCallback([part]), max_epochs=1).fit(ByLayer(), loader())
    assert len(seen) == 3


class BehindPruned(LitNet):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.head(self.features(batch[0])), batch[1])


def test_a_part_that_reads_pruned_channels_has_no_dense_teacher() -> None:
    with pytest.raises(ConfigError, match=r"a teacher that cannot answer what 'head' is called with.*It is dense"):
        trainer(pruning(recovery=[Distillation(layer="head")])).fit(BehindPruned(), loader())


def test_a_teacher_with_objects_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"state_dict": LitNet().state_dict(), "hyper_parameters": {"path": tmp_path}}, tmp_path / "own.ckpt")
    with pytest.raises(CheckpointError, match=r"Python objects, hyperparameters.*Distillation\(teacher=module\)"):
        trainer(pruning(recovery=[Distillation(teacher=str(tmp_path / "own.ckpt"))])).fit(LitNet(), loader())


class Tuples(LitNet):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])


class Manual(LitNet):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("model", "match"),
    [
        pytest.param(Tuples, r"Got a tuple from forward.*Distillation\(loss=", id="no logits"),
        pytest.param(Manual, "manual optimization.*distillation_loss", id="manual"),
    ],
)
def test_what_cannot_be_distilled_is_said(model: type[LitNet], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        trainer(RecoveryCallback([Distillation()]), max_epochs=1).fit(model(), loader())


@pytest.mark.parametrize("given", [{"temperature": 0}, {"alpha": 1.5}, {"alpha": True}])
def test_arguments_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Got {next(iter(given))}="):
        Distillation(**given)
