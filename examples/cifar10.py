"""CIFAR-10 from the files of its authors, https://www.cs.toronto.edu/~kriz/cifar.html, unpacked; nothing is downloaded.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the image
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)  # of the training images
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
ALLOWED = {  # what the batches for Python hold; `_codecs.encode` is how Python 3 writes bytes for Python 2
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class Cifar10(LightningDataModule):
    """60,000 images of 32 x 32 pixels in ten classes; as in the literature, validation is on the 10,000 test images.

    Args:
        root: Folder with `cifar-10-batches-bin` or `cifar-10-batches-py`, or that folder itself.
        batch_size: Images of a training batch, shifted by up to four pixels and flipped at random.
        workers: Processes that load images.
    """

    def __init__(self, root: Path = Path("data"), batch_size: int = 128, workers: int = 4) -> None:
        super().__init__()
        self.root, self.batch_size, self.workers = root, batch_size, workers

    def setup(self, stage: str) -> None:
        self.train, self.test = Images(*read(self.root, TRAIN), augment=True), Images(*read(self.root, TEST))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.test, 500, num_workers=self.workers, persistent_workers=self.workers > 0)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Normalized images with their labels.

    Args:
        images: Bytes `[N, 3, 32, 32]`.
        labels: Integers `[N]`.
        augment: Whether each image is padded by 4, cut out at a random place, and flipped half of the time (He et al.,
            2015, sec. 4.2).
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: bool = False) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = (self.images[index] / 255 - MEAN) / STD
        return crop_and_flip(image) if self.augment else image, self.labels[index]


def crop_and_flip(image: Tensor, padding: int = 4) -> Tensor:
    """Move an image `[C, H, W]` by up to `padding` pixels along both axes, and mirror it half of the time."""
    _, height, width = image.shape
    top, left = torch.randint(2 * padding + 1, (2,)).tolist()
    moved = F.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
    return moved.flip(2) if torch.rand(()) < 0.5 else moved


def read(root: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return images as bytes `[N, 3, 32, 32]` and labels `[N]` of some batches, in either format.

    Raises:
        FileNotFoundError: There is no folder with these batches.
        ValueError: A file is cut off.
        pickle.UnpicklingError: A pickle names something else than arrays.
    """
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for suffix, read_file in ((".bin", read_binary), ("", read_pickle)):
            paths = [folder / f"{name}{suffix}" for name in names]
            if all(path.is_file() for path in paths):
                images, labels = zip(*map(read_file, paths), strict=True)
                return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
    raise FileNotFoundError(
        f"Got root={str(root)!r} without {names[0]}.bin or {names[0]}; expected the folder that holds "
        "cifar-10-batches-bin or cifar-10-batches-py. Unpack the archive there, and set --data.root."
    )


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a label and an image, 3073 bytes each."""
    data = np.fromfile(path, np.uint8)
    if not data.size or data.size % RECORD:
        raise ValueError(f"Got {data.size} bytes in {path}; expected records of {RECORD}. Unpack the archive again.")
    records = data.reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64)


def read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a dict of images and labels, and run nothing that a file could bring."""
    with path.open("rb") as file:
        batch = ArraysOnly(file, encoding="bytes").load()
    return batch[b"data"].reshape(-1, *SHAPE), np.asarray(batch[b"labels"], np.int64)


class ArraysOnly(pickle.Unpickler):
    """An unpickler for arrays, numbers and text: it refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"Got {module}.{name} in a batch of CIFAR-10; expected arrays. Do not use it.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)  # the name since numpy 2
