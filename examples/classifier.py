"""What the recipes have in common: a network of images, its loss, its accuracy, and weights to start from."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Classifier(LightningModule):
    """Learn classes of images by cross-entropy; optimizer and learning rate are those of the configuration.

    Args:
        net: Images `[N, C, H, W]` -> scores `[N, classes]`.
        classes: How many classes there are.
        weights: A state dict of `net`, or a checkpoint of Lightning of this class; None starts from random weights.
    """

    def __init__(self, net: nn.Module, classes: int, weights: Path | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net", "weights"])  # a checkpoint has weights of its own
        self.net = net
        if weights is not None:
            net.load_state_dict(read_weights(weights))
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy, prog_bar=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a net; of a checkpoint of `Classifier`, that of its net. No pickled code runs."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found)
    parts = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    return parts or state
