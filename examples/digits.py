"""Prune a ResNet to half its multiply-adds while it trains on scikit-learn's handwritten digits.

Usage: `python examples/digits.py --config configs/digits_resnet.yaml`, or `make demo`.

Two networks start from the same weights and see the same batches: one trains dense, one with the `PruningCallback`
of the configuration. Every figure of the pruned one is measured on the model that is read back from its checkpoint.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import load_pruned

CLASSES = 10


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(LightningModule):
    """A ResNet-20 for images of 8 x 8 pixels: three stages of `blocks` blocks, each twice as wide as the last.

    Args:
        width: Channels of the first stage.
        blocks: Blocks per stage; 3 make twenty layers with weights.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: L2 penalty of SGD.
        scale_penalty: L1 penalty on the scales of the norms, which makes some of them small (Network Slimming).
    """

    def __init__(
        self,
        width: int = 16,
        blocks: int = 3,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        scale_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        c_in = width
        for stage in range(3):
            for index in range(blocks):
                layers.append(Block(c_in, width << stage, stride=2 if stage and not index else 1))
                c_in = width << stage
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, CLASSES)
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(images), digits, label_smoothing=0.1)
        if penalty := self.hparams["scale_penalty"]:
            norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
            loss = loss + penalty * sum(norm.weight.abs().sum() for norm in norms)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.test_accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        rate = self.hparams["learning_rate"]
        optimizer = torch.optim.SGD(
            self.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=self.hparams["weight_decay"]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Digits(LightningDataModule):
    """The 1797 digits of scikit-learn in a fixed stratified split: 40 % train, 10 % validation, 50 % test.

    Args:
        batch_size: Images of a training batch; shifted by up to one pixel each time they are drawn.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(digits.target)
        train, rest = train_test_split(range(len(labels)), train_size=0.4, stratify=labels, random_state=0)
        val, test = train_test_split(rest, train_size=1 / 6, stratify=labels[rest], random_state=0)
        self.parts = {
            name: TensorDataset(images[index], labels[index])
            for name, index in (("train", train), ("val", val), ("test", test))
        }

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], index: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = shift(images)
        return images, labels

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts["val"], 256)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts["test"], 256)


def shift(images: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixels along both axes; what comes in is background."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    rows = torch.randint(3, (batch, 1)) + torch.arange(height)
    columns = torch.randint(3, (batch, 1)) + torch.arange(width)
    picked = padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return picked.unsqueeze(1)


def main() -> None:
    """Train both networks of the configuration, compare them, and write what they are to the output folder."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # 718 images are in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
    torch.set_num_threads(1)  # tensors this small gain little from a second core, and one thread repeats bit for bit
    cli = LightningCLI(
        DigitsResNet,
        Digits,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        parser_kwargs={"parser_mode": "omegaconf"},
    )
    folder = Path(cli.trainer.default_root_dir)
    dense = copy.deepcopy(cli.model)
    dense_trainer = cli.instantiate_trainer(callbacks=[], logger=CSVLogger(folder, name="dense"))
    trainers = {"dense": dense_trainer, "pruned": cli.trainer}
    for (name, trainer), model in zip(trainers.items(), (dense, cli.model), strict=True):
        seed_everything(cli.config["seed_everything"], verbose=False)
        trainer.fit(model, cli.datamodule)
        trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=False)  # with the optimizer: it can resume
    models = {
        "dense": DigitsResNet.load_from_checkpoint(folder / "dense.ckpt", map_location="cpu"),
        "pruned": load_pruned(folder / "pruned.ckpt", DigitsResNet),
    }
    for name, trainer in trainers.items():
        trainer.test(models[name], cli.datamodule, verbose=False)
    report = compare(models, trainers, folder, cli.datamodule.parts["test"].tensors[0][:256])
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_channels(models, folder / "channels.png")
    Console().print(table_of(report))
    print(f"Wrote report.json, pruned.ckpt and channels.png to {folder}.")


def compare(
    models: dict[str, DigitsResNet], trainers: dict[str, Trainer], folder: Path, images: Tensor
) -> dict[str, dict[str, float]]:
    """Give accuracy as the trainers tested it, multiply-adds, parameters, checkpoint bytes and latency."""
    latency = interleaved_latency_ms(models, images)
    return {
        name: {
            "accuracy": float(trainers[name].callback_metrics["test_accuracy"]),
            "macs": count_macs(model, images[:1]),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": (folder / f"{name}.ckpt").stat().st_size,
            "latency_ms": latency[name],
        }
        for name, model in models.items()
    }


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of one example with torch's own counter, which counts each as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() // 2


def interleaved_latency_ms(models: dict[str, DigitsResNet], images: Tensor, rounds: int = 60) -> dict[str, float]:
    """Return each model's median milliseconds; they take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for index in range(rounds + 10):
            for name, model in models.items():
                model.eval()
                start = time.perf_counter()
                model(images)
                if index >= 10:  # the first rounds warm up
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def table_of(report: dict[str, dict[str, float]]) -> Table:
    """Lay the two models side by side."""
    rows = {
        "test accuracy": ("accuracy", "{:.2%}"),
        "MACs per image": ("macs", "{:,}"),
        "parameters": ("params", "{:,}"),
        "checkpoint bytes": ("bytes", "{:,}"),
        "ms / 256 images, one core": ("latency_ms", "{:.2f}"),
    }
    table = Table("", "dense", "pruned", "pruned / dense", title="ResNet-20 on digits")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, (key, form) in rows.items():
        dense, pruned = report["dense"][key], report["pruned"][key]
        table.add_row(title, form.format(dense), form.format(pruned), f"{pruned / dense:.3f}")
    return table


def draw_channels(models: dict[str, DigitsResNet], path: Path) -> None:
    """Draw the output channels of every convolution, dense behind pruned."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for (name, model), color in zip(models.items(), ("lightgray", "tab:blue"), strict=True):
        layers = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        axes.bar(range(len(layers)), list(layers.values()), color=color, label=name)
        axes.set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=7)
    axes.set_ylabel("output channels")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
