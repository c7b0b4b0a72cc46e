"""An importance that watches training: which batches, that it changes nothing, and that it sees the loss as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune.errors import ConfigError, PlanError
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer
from tests.watching import WATCHING, spied_scores

pytestmark = QUIET


class Dropped(LitNet):
    """With random numbers in the forward, and a norm of its own for two readers."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.side = nn.Conv2d(16, 32, 1)

    def features(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.conv1(x))), 0.2, self.training)
        return (self.conv2(x) + self.side(x)).mean((2, 3))


class Everything(Callback):
    """Notes all that training is made of at each step, copied."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        noted = {
            **{f"weight {name}": p.detach().clone() for name, p in pl_module.named_parameters()},
            **{f"gradient {name}": p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None},
            **{f"buffer {name}": b.clone() for name, b in pl_module.named_buffers()},
            **{f"state {k} {n}": torch.as_tensor(v).clone() for k, one in state.items() for n, v in one.items()},
            "random": torch.get_rng_state(),
            "modes": torch.tensor([module.training for module in pl_module.modules()]),
        }
        self.steps.append(noted)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The scores of every firing, as they come."""
    return spied_scores(monkeypatch)


class Seen:
    """An importance that notes what it is shown, and scores as if it had seen nothing."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.batches: list[str] = []
        self.at: str = ""
        self.shared = 0

    def observer(self, units: Any) -> Any:
        return self

    def attach(self) -> list[Any]:
        self.batches.append(self.at)
        return []

    def after_backward(self, scale: Any) -> None:
        pass

    def before_step(self, parameters: Any, scale: Any) -> None:
        pass

    def share(self) -> None:
        self.shared += 1

    def reset(self) -> None:
        pass

    def scores(self, units: Iterable[Any], scope: str = "global") -> dict[str, Tensor]:
        self.batches.append("score")
        return {unit.name: torch.arange(unit.num_channels, 0.0, -1) for unit in units}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Where(Callback):
    """Tells the importance where training is; listed before the pruning."""

    def __init__(self, importance: Seen) -> None:
        self.importance = importance

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.importance.at = f"{trainer.current_epoch}.{batch_idx}"


def watched(window: int, schedule: Any, batches: Any = None, **arguments: Any) -> list[str]:
    """Return "epoch.batch" of what is watched and "score" where it fires; epochs of six batches."""
    importance = Seen(window)
    callback = pruning(importance=importance, schedule=schedule)
    fit = trainer(Where(importance), callback, **arguments)
    fit.fit(LitNet(), DataLoader(data(), 4) if batches is None else batches)
    assert callback.is_done
    assert importance.shared > 0
    return importance.batches


class Stream(IterableDataset[Any]):
    """Nobody knows how long it is."""

    def __iter__(self) -> Any:
        return iter([data()[k] for k in range(24)])


LATE = {"kind": "linear", "begin": 1, "end": 3}
EARLY = {"kind": "one_shot", "begin": 0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(
            {"window": 2, "schedule": LATE},
            ["0.4", "0.5", "score", "1.4", "1.5", "score"],
            id="the last of the epoch before",
        ),
        pytest.param(
            {"window": 2, "schedule": {"kind": "linear", "begin": 1, "end": 4, "every": 2}},
            ["0.4", "0.5", "score", "2.4", "2.5", "score"],
            id="of every other epoch",
        ),
        pytest.param({"window": 2, "schedule": EARLY}, ["0.0", "0.1", "score"], id="a firing at the start waits"),
        pytest.param(
            {"window": 4, "schedule": {"kind": "linear", "begin": 0, "end": 2}},
            ["0.0", "0.1", "0.2", "0.3", "score", "0.4", "0.5", "1.0", "1.1", "score"],
            id="with the structure of the moment",
        ),
        pytest.param(
            {"window": 8, "schedule": EARLY}, [*(f"0.{k}" for k in range(5)), "score"], id="short epochs wait"
        ),
        pytest.param(
            {"window": 8, "schedule": {"kind": "one_shot", "begin": 1}},
            [*(f"0.{k}" for k in range(6)), "score"],
            id="short epochs",
        ),
        pytest.param(
            {"window": 3, "schedule": EARLY, "accumulate_grad_batches": 2},
            ["0.0", "0.1", "0.2", "0.3", "score"],
            id="not in the middle of a step",
        ),
        pytest.param(
            {"window": 1, "schedule": EARLY, "accumulate_grad_batches": 4},
            ["0.0", "0.1", "0.2", "0.3", "score"],
            id="at least one step",
        ),
        pytest.param(
            {"window": 2, "schedule": LATE, "batches": DataLoader(Stream(), 4)},
            ["0.0", "0.1", "score", "1.0", "1.1", "score"],
            id="the first of a stream",
        ),
        pytest.param(
            {
                "window": 2,
                "schedule": {"kind": "linear", "begin": 0.25, "end": 0.5, "every": 4},
                "max_epochs": -1,
                "max_steps": 20,
            },
            ["0.3", "0.4", "score", "1.1", "1.2", "score"],
            id="steps",
        ),
    ],
)
def test_which_batches_are_watched(arguments: dict[str, Any], expected: list[str]) -> None:
    assert watched(**arguments) == expected


def test_a_fit_of_one_short_epoch_meets_its_target() -> None:
    callback = pruning(importance="taylor", schedule="cubic")
    model = LitNet()
    trainer(callback, max_epochs=1).fit(model, loader())
    assert callback.is_done
    assert not dynamic_ops(model)


# Nothing of the training changes


def noted(importance: Any, target: Any, **arguments: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    notes = Everything()
    callback = pruning(target, importance=importance, compact="never")
    trainer(callback, notes, **arguments).fit(Dropped(), DataLoader(data(), 4, shuffle=True), loader())
    return notes.steps


@pytest.mark.parametrize("name", WATCHING)
def test_watching_leaves_every_following_step_as_it_was(name: str) -> None:
    """A target of 1 keeps everything, so that both runs must be the same."""
    plain, seen = (
        noted(importance, 1.0, accumulate_grad_batches=2, gradient_clip_val=0.1) for importance in ("l1", name)
    )
    assert_same(plain, seen)


def test_watching_a_masked_model_leaves_every_following_step_as_it_was() -> None:
    of = {"l1": 1.0, **dict.fromkeys(WATCHING, 0.0)}
    plain, seen = noted("l1", 0.5), noted({"name": "mixture", "of": of}, 0.5)
    assert_same(plain, seen)


def assert_same(plain: list[dict[str, Any]], seen: list[dict[str, Any]]) -> None:
    assert len(plain) == len(seen) == 24
    for step, (one, other) in enumerate(zip(plain, seen, strict=True)):
        assert one.keys() == other.keys()
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == [], step


def test_validation_is_not_watched(scored: list[dict[str, Tensor]]) -> None:
    loud = DataLoader(TensorDataset(100 * torch.ones(8, 3, 6, 6), torch.zeros(8, dtype=torch.long)), 8)
    for validation in (None, loud):
        torch.manual_seed(0)
        fit = trainer(pruning(importance="activation"), val_check_interval=1)
        fit.fit(LitNet(), DataLoader(data(), 4), validation)
    first, second = scored[0], scored[2]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_exception_takes_the_hooks_out() -> None:
    class Stop(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            assert any(module._forward_pre_hooks for module in pl_module.modules())
            raise OSError("the power went")

    model = LitNet()
    before = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(OSError, match="the power went"):
        trainer(pruning(importance="fisher", schedule=EARLY), Stop()).fit(model, loader())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == before


# What is missing


@pytest.mark.parametrize(
    ("name", "match"),
    [
        pytest.param("taylor", r"no gradient for 'conv1.weight', 'conv1.bias'; importance 'taylor'", id="taylor"),
        pytest.param("fisher", r"no gradient at the inputs of 'conv2'; importance 'fisher'", id="fisher"),
    ],
)
def test_what_has_no_gradient_is_named(name: str, match: str) -> None:
    model = LitNet()
    for layer in (model.conv1, model.norm) if name == "fisher" else (model.conv1,):
        layer.requires_grad_(False)
    with pytest.raises(PlanError, match=match):
        trainer(pruning(importance=name)).fit(model, loader())


class Silent(LitNet):
    """Lightning 2.6 cannot log in a compiled step."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["fisher", "activation"])
def test_hooks_into_a_compiled_module_are_refused(name: str) -> None:
    model = Silent()
    with pytest.raises(ConfigError, match=f"a compiled module with .*name='{name}'.* hooks into its layers"):
        trainer(pruning(importance=name)).fit(torch.compile(model, backend="eager"), loader())  # type: ignore[arg-type]
    assert not dynamic_ops(model)


def test_gradients_of_a_compiled_module_are_watched() -> None:
    callback = pruning(importance="taylor")
    trainer(callback).fit(torch.compile(Silent(), backend="eager"), loader())  # type: ignore[arg-type]
    assert callback.is_done


def test_an_ignored_layer_need_not_learn() -> None:
    model = LitNet()
    model.conv1.requires_grad_(False)
    callback = pruning({"macs": 0.9}, importance="taylor", ignore=["conv1"])
    trainer(callback).fit(model, loader())
    assert callback.is_done


# Small in between


class WithoutMomentum(LitNet):
    """A channel that comes back to a small model has lost its momentum."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("name", WATCHING)
def test_a_model_that_is_small_between_firings_is_scored_alike(name: str, scored: list[dict[str, Tensor]]) -> None:
    found = []
    for compact in ("never", "each"):
        scored.clear()
        torch.manual_seed(0)
        callback = pruning(importance=name, compact=compact, schedule={"kind": "linear", "begin": 1, "end": 4})
        trainer(callback, precision="64-true", max_epochs=5).fit(WithoutMomentum(), loader())
        found.append((list(scored), callback.state_dict()["kept"]))
    (masked, kept), (small, again) = found
    assert len(masked) == 3
    for one, other in zip(masked, small, strict=True):
        for unit, row in one.items():
            torch.testing.assert_close(other[unit], row, rtol=1e-5, atol=1e-12)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# Resume


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize(
    "importance", ["taylor", "wanda", {"name": "mixture", "of": {"l1": 1, "fisher": 0.5}}], ids=str
)
@pytest.mark.filterwarnings("ignore:.*Found keys that are not in the model state dict.*")
def test_a_run_resumes_with_what_was_watched(epoch: int, importance: Any, tmp_path: Path) -> None:
    from tests.test_resume import assert_same as assert_same_run
    from tests.test_resume import run

    given = {"importance": importance, "schedule": {"kind": "linear", "begin": 1, "end": 4}}
    whole = run(tmp_path / "a", **given)
    saved = torch.load(tmp_path / "a" / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"]["PruningCallback"]
    assert saved["watched"]["seen"] == 3
    assert_same_run(whole, run(tmp_path / "b", ckpt=tmp_path / "a" / f"epoch={epoch}.ckpt", **given))
