"""ImageNet from folders of JPEG files, `train/<class>/*.JPEG` and `val/<class>/*.JPEG`; nothing is downloaded.

Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015, arXiv:1409.0575.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # those that torchvision's weights were trained with
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SUFFIXES = {".jpeg", ".jpg", ".png"}


class ImageNet(LightningDataModule):
    """Images in folders, a folder for each class; classes are numbered in the order of their names.

    Args:
        root: Folder with `train` and `val`.
        batch_size: Images of a training batch in each process: random part of a random shape, flipped at random.
        size: Pixels of a side that the network sees.
        resize: Pixels that the shorter side of a validation image has before its center is cut out.
        workers: Processes that load images.
    """

    def __init__(
        self, root: Path = Path("data"), batch_size: int = 64, size: int = 224, resize: int = 256, workers: int = 8
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.workers = root, batch_size, workers
        self.size, self.resize = size, resize

    def setup(self, stage: str) -> None:
        self.train = Images(self.root / "train", lambda image: random_part(image, self.size))
        self.val = Images(self.root / "val", lambda image: center(image, self.size, self.resize))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader(self.val, shuffle=False)

    def _loader(self, images: Images, *, shuffle: bool) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            images,
            self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class Images(Dataset[tuple[Tensor, int]]):
    """Normalized images with the numbers of their classes.

    Args:
        folder: Holds a folder for each class.
        transform: Makes an image of the size that the network sees.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.transform = transform
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        self.files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted(name.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(
                f"Got {str(folder)!r} without images; expected a folder of JPEG files for each class. Set --data.root."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            pixels = np.array(self.transform(image.convert("RGB")))
        return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN) / STD, label


def random_part(image: Image.Image, size: int) -> Image.Image:
    """Cut out 8 to 100 % of the area at a ratio of sides from 3/4 to 4/3, resize it, and mirror it half of the time.

    Source: Szegedy et al., "Going Deeper with Convolutions", 2014, arXiv:1409.4842, sec. 6. What does not fit after
        ten tries is, as in torchvision, the largest part in the middle with an allowed ratio.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * uniform(0.08, 1.0)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if uniform(0, 1) < 0.5 else part


def center(image: Image.Image, size: int, resize: int) -> Image.Image:
    """Resize the shorter side to `resize` pixels and cut `size` x `size` pixels out of the middle."""
    scale = resize / min(image.size)
    width, height = (max(resize, int(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def uniform(low: float, high: float) -> float:
    """Return a random number of torch's generator, which Lightning seeds in every worker."""
    return low + (high - low) * float(torch.rand(()))
