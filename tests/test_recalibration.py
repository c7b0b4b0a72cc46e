"""Recalibration moves running statistics to those of the pruned structure, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_prune import PruningCallback
from lightning_prune.callback import RecoveryCallback
from lightning_prune.errors import ConfigError
from lightning_prune.recovery import Recalibration, recalibrate_
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer

pytestmark = QUIET


class Dropping(LitNet):
    """Random numbers in training, and a counter in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(super().features(x))


class Noisy(Dataset[Any]):
    """Draws from every global source of random numbers."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        image, label = data()[index]
        return image + random.random() + float(np.random.rand()) + torch.rand(3, 6, 6), label


class Watch(Callback):
    """Everything that must not depend on recalibration, at every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.statistics: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: LitNet) -> None:
        self.statistics.append(pl_module.norm.running_mean.clone())

    def on_train_batch_start(self, trainer: Any, pl_module: LitNet, batch: Any, batch_idx: int) -> None:
        modes = [module.training for module in pl_module.modules()]
        rng = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]  # type: ignore[index]
        weights = [p.detach().clone() for p in pl_module.parameters()]
        others = [pl_module.calls.clone(), pl_module.norm.num_batches_tracked.clone(), torch.tensor(modes)]
        self.seen.append([*rng, torch.tensor(random.getstate()[1][:-1]), batch[0].clone(), *others, *weights])


def fitted(recovery: list[Any], loader: DataLoader[Any], **given: Any) -> tuple[Watch, PruningCallback]:
    seed_everything(1, verbose=False)
    watch, callback = Watch(), pruning(recovery=recovery, **given)
    trainer(callback, watch).fit(Dropping(), loader)
    return watch, callback


@pytest.mark.parametrize("compact", ["end", "each", "never"])
def test_the_training_is_bit_for_bit_what_it_is_without(compact: str) -> None:
    shuffled = lambda: DataLoader(Noisy(), 8, shuffle=True)  # noqa: E731
    plain, _ = fitted([], shuffled(), compact=compact)
    watch, _ = fitted([Recalibration(2)], shuffled(), compact=compact)
    assert len(plain.seen) == len(watch.seen) == 12
    for batch, again in zip(plain.seen, watch.seen, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(batch, again, strict=True))
    same = [torch.equal(one, other) for one, other in zip(plain.statistics, watch.statistics, strict=True)]
    assert same[0]
    assert not same[1]  # the first firing
    assert not same[2]


def test_a_loader_with_a_generator_of_its_own_is_left_alone() -> None:
    def ordered() -> DataLoader[Any]:
        return DataLoader(data(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))

    plain, _ = fitted([], ordered())
    watch, _ = fitted([Recalibration(2)], ordered())
    assert all(torch.equal(one[3], other[3]) for one, other in zip(plain.seen, watch.seen, strict=True))


def test_statistics_are_the_means_over_the_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.25), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    never, frozen = nn.BatchNorm2d(4), nn.BatchNorm2d(2).eval()
    model.append(frozen)
    model.append(nn.Identity())
    model.add_module("never", nn.ModuleList([never]))
    run: Any = lambda x: frozen(model[3](model[2](model[1](model[0](x)))))  # noqa: E731
    batches = [torch.randn(5, 3, 4, 4) + k for k in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    recalibrate_(model, batches, run)
    inputs = [model[0](x) for x in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert modes == [module.training for module in model.modules()]
    assert model[1].momentum == 0.25
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("1.running"), name


def test_statistics_are_of_the_pruned_structure() -> None:
    """In train mode a norm sees what recalibration has seen: then evaluating the same batches gives its mean."""
    found: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: LitNet, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 0:
                assert pl_module.norm.num_features < 16
                inputs = [pl_module.conv1(x) for x, _ in loader()]
                found.append(torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0) - pl_module.norm.running_mean)

    trainer(pruning(recovery=[Recalibration(3)]), Look()).fit(LitNet(), loader())
    assert float(found[0].detach().abs().max()) < 1e-6


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and not (tmp_path / "a.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(*more: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        fit = trainer(pruning(recovery=[Recalibration(2)]), *more)
        fit.fit(LitNet(), loader(), ckpt_path=ckpt)
        return fit.lightning_module.state_dict()

    whole = run(Save())
    resumed = run(ckpt=tmp_path / "a.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Stream(IterableDataset[Any]):
    def __init__(self, source: Any = None) -> None:
        self.source = source

    def __iter__(self) -> Any:
        return iter(data() if self.source is None else self.source)


def test_a_stream_is_copied_or_refused() -> None:
    fit = trainer(pruning(recovery=[Recalibration(2)], schedule={"kind": "one_shot", "begin": 1}), max_epochs=2)
    fit.fit(LitNet(), DataLoader(Stream(), 8))
    once = DataLoader(Stream(item for _ in range(2) for item in data()), 8)
    fit = trainer(
        pruning(recovery=[Recalibration(2)], schedule={"kind": "one_shot", "begin": 1}, example_input=data()[:2][0]),
        max_epochs=2,
        limit_train_batches=3,
    )
    with pytest.warns(UserWarning, match=r"cannot be read beside the training.*pickle"):
        fit.fit(LitNet(), once)


def test_a_model_without_batch_norm_is_told_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", said.append)
    model = LitNet()
    model.norm = nn.Identity()  # type: ignore[assignment]
    trainer(pruning(recovery=[Recalibration()])).fit(model, loader())
    assert [text for text in said if "no batch norm" in text] == said[:1]


class TwoLoaders(LitNet):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch["first"], index)


def test_batches_that_forward_cannot_take_are_told() -> None:
    model, loaders = TwoLoaders(), {"first": loader(), "second": loader()}
    callback = pruning(recovery=[Recalibration()], example_input=torch.zeros(2, 3, 6, 6))
    with pytest.raises(ConfigError, match=r"not what TwoLoaders\.forward takes.*recalibrate_ with a function"):
        trainer(callback).fit(model, loaders)


@pytest.mark.parametrize("batches", [0, -1, 1.5, True, "4"])
def test_a_number_of_batches_that_is_none(batches: Any) -> None:
    with pytest.raises(ConfigError, match=rf"batches={batches!r} for Recalibration"):
        Recalibration(batches)


def test_recovery_takes_one_object_of_a_kind() -> None:
    with pytest.raises(ConfigError, match="two Recalibration objects"):
        pruning(recovery=[Recalibration(), Recalibration(2)])
    with pytest.raises(ConfigError, match=r"expected objects of lightning_prune\.recovery"):
        pruning(recovery=["Recalibration"])
    with pytest.raises(ConfigError, match=r"expected a list: recovery=\[Recalibration"):
        pruning(recovery=Recalibration())
    with pytest.raises(ConfigError, match="RecoveryCallback beside"):
        trainer(pruning(recovery=[Recalibration()]), RecoveryCallback([Recalibration()])).fit(LitNet(), loader())
