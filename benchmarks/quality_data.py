"""Digits that a small network does not solve: twice the resolution, few training images, noise, and shifts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
SIDE = 16
TRAIN = 500
SHIFT = 3
NOISE = 0.6
DRAWS = 2

Batch = tuple[Tensor, Tensor]


class HardDigits(LightningDataModule):
    """scikit-learn's 1797 digits, enlarged to 16 x 16 pixels.

    Each time an image is drawn it is shifted by up to 3 pixels along both axes, and Gaussian noise is added. Those of
    the test set are drawn twice, the same for all, and then stay.

    Args:
        seed: Of the split into 500 training images and 1297 test images.
        batch_size: Of training.
    """

    def __init__(self, seed: int, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        images = F.interpolate(images, size=SIDE, mode="bilinear", align_corners=False)
        labels = torch.tensor(digits.target)
        train, test = train_test_split(range(len(labels)), train_size=TRAIN, stratify=labels, random_state=seed)
        self.train = TensorDataset(images[train], labels[train])
        generator = torch.Generator().manual_seed(1000 + seed)
        self.test = [(spoiled(images[test], generator), labels[test]) for _ in range(DRAWS)]

    def on_after_batch_transfer(self, batch: Batch, index: int) -> Batch:
        """Draw shifts and noise anew, from the global random state."""
        return spoiled(batch[0]), batch[1]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches, all of one size."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)


def training_batches(data: HardDigits, seed: int, count: int = 8) -> list[Batch]:
    """Return the first batches of a seed, as training draws them."""
    torch.manual_seed(300 + seed)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    return batches[:count]


def spoiled(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image and add noise; what comes in is background.

    Args:
        images: `[N, 1, H, W]`, background -1.
        generator: Of the randomness; None is the global one.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, value=-1.0)
    starts = torch.randint(2 * SHIFT + 1, (2, batch, 1), generator=generator)
    rows, columns = starts[0] + torch.arange(height), starts[1] + torch.arange(width)
    picked = padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return picked.unsqueeze(1) + NOISE * torch.randn(images.shape, generator=generator)
