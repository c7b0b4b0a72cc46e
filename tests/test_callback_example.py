"""What the callback traces a module with, and which part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callback.example import forward_input
from lightning_prune.errors import ConfigError
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer, widths

pytestmark = QUIET


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


def test_an_exception_ends_the_watch_over_layers() -> None:
    model = Parted()
    model.reads_inside = True
    with pytest.raises(ConfigError, match="layer 'hidden'"):
        trainer(pruning({"macs": 0.6})).fit(model, loader())
    assert not any(module._forward_pre_hooks for module in model.modules())
