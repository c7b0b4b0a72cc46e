"""The recipes of the reference settings: loaders on files as their authors write them, and a run of a few steps."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cifar10
import imagenet
import numpy as np
import pytest
import torch
from classifier import Classifier
from PIL import Image
from resnets import ResNet50, ResNet56
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import load_pruned
from tests.torchvision_shim import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `examples/train.py` as a user does, in a directory that goes away."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def macs(model: nn.Module, size: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops() // 2)


# Files as they are on the net, but few images


def cifar_arrays(seed: int, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(256, size=(count, 3072), dtype=np.uint8), random.integers(10, size=count)


def write_binary(folder: Path, name: str, seed: int) -> None:
    images, labels = cifar_arrays(seed)
    records = np.concatenate([labels[:, None].astype(np.uint8), images], axis=1)
    (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_pickle(folder: Path, name: str, seed: int) -> None:
    """Write what Python 2 wrote: protocol 2, keys of bytes, labels in a list, and the module's name of that time."""
    images, labels = cifar_arrays(seed)
    batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"training batch"}
    written = pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core")
    (folder / name).write_bytes(written)


def write_cifar(root: Path, kind: str = "bin") -> Path:
    folder = root / f"cifar-10-batches-{kind}"
    folder.mkdir(parents=True)
    for seed, name in enumerate(cifar10.TRAIN + cifar10.TEST):
        (write_binary if kind == "bin" else write_pickle)(folder, name, seed)
    return root


def write_imagenet(root: Path) -> Path:
    """Write two classes of three images each for training, and one for validation; one of them is gray."""
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for wnid in ("n01440764", "n01443537"):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (40, 60) if number == 1 else (60, 40, 3)
                pixels = random.integers(256, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{number}.JPEG")
    return root


# CIFAR-10


@pytest.mark.parametrize("kind", ["bin", "py"])
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "folder itself"])
def test_cifar_is_read_from_both_formats(kind: str, inside: bool, tmp_path: Path) -> None:
    root = write_cifar(tmp_path, kind)
    images, labels = cifar10.read(root / f"cifar-10-batches-{kind}" if inside else root, cifar10.TRAIN)
    assert (images.shape, images.dtype, labels.shape) == ((40, 3, 32, 32), torch.uint8, (40,))
    expected = [cifar_arrays(seed) for seed in range(5)]
    assert np.array_equal(images.reshape(40, -1).numpy(), np.concatenate([data for data, _ in expected]))
    assert labels.tolist() == [int(label) for _, part in expected for label in part]


def test_cifar_images_are_normalized_and_only_those_for_training_move(tmp_path: Path) -> None:
    data = cifar10.Cifar10(write_cifar(tmp_path), batch_size=8, workers=0)
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    raw, expected = cifar_arrays(5)
    mean, std = (np.array(c).reshape(3, 1, 1) for c in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    wanted = (raw.reshape(-1, 3, 32, 32) / 255 - mean) / std
    np.testing.assert_allclose(images.numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == expected.tolist()
    assert len(data.train_dataloader()) == 5
    still = (data.train.images[0] / 255 - cifar10.MEAN) / cifar10.STD
    assert sum(torch.equal(data.train[0][0], still) for _ in range(20)) < 5


def test_a_cifar_image_moves_by_at_most_four_pixels_and_is_mirrored_half_of_the_time() -> None:
    image = torch.zeros(1, 32, 32)
    image[0, 10, 6] = 1
    places = [divmod(int(cifar10.crop_and_flip(image).argmax()), 32) for _ in range(400)]
    assert {row for row, _ in places} == set(range(6, 15))
    assert {column for _, column in places} == set(range(2, 11)) | set(range(21, 30))
    assert 140 < sum(column > 15 for _, column in places) < 260


@pytest.mark.parametrize(
    ("error", "text", "content"),
    [
        pytest.param(FileNotFoundError, "cifar-10-batches-bin", None, id="missing"),
        pytest.param(ValueError, "3072 bytes in .*data_batch_1.bin", b"\0" * 3072, id="cut off"),
    ],
)
def test_a_cifar_folder_that_is_none(error: type[Exception], text: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        for name in cifar10.TRAIN:
            (tmp_path / f"{name}.bin").write_bytes(content)
    with pytest.raises(error, match=text):
        cifar10.read(tmp_path, cifar10.TRAIN)


def test_a_pickle_that_brings_code_does_not_run_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        cifar10.read(tmp_path, cifar10.TEST)
    assert not (tmp_path / "ran").exists()


# ImageNet


def test_imagenet_folders_are_classes_in_order(tmp_path: Path) -> None:
    data = imagenet.ImageNet(write_imagenet(tmp_path), batch_size=2, size=32, resize=36, workers=0)
    data.setup("fit")
    assert [label for _, label in data.train.files] == [0, 0, 0, 1, 1, 1]
    images, labels = next(iter(data.val_dataloader()))
    assert (images.shape, labels.tolist()) == ((2, 3, 32, 32), [0, 1])
    assert [images.shape for images, _ in data.train_dataloader()] == [(2, 3, 32, 32)] * 3


def test_the_center_of_an_image_is_cut_out() -> None:
    pixels = np.zeros((80, 40, 3), np.uint8)
    pixels[36:44, 16:24] = 255  # 8 x 8 in the middle, of which a quarter of the size is 2 x 2
    found = np.array(imagenet.center(Image.fromarray(pixels), size=6, resize=10))
    assert found.shape == (6, 6, 3)
    assert found[2:4, 2:4].min() > 150
    assert found[0].max() == found[-1].max() == found[:, 0].max() == found[:, -1].max() == 0


def test_random_parts_are_of_the_stated_areas_and_mirrored_half_of_the_time() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 100, dtype=np.uint8), (100, 100))  # brighter to the right
    parts = [np.array(imagenet.random_part(Image.fromarray(ramp), 16)).astype(float) for _ in range(300)]
    spans = np.array([part[0, -1] - part[0, 0] for part in parts]) / 255
    assert 100 < (spans < 0).sum() < 200
    assert 0.2 < abs(spans).min() < 0.4  # 8 % of the area, at 3 / 4: 0.24 of the width
    assert 0.85 < abs(spans).max() <= 1


def test_an_image_that_no_part_fits_gives_its_middle() -> None:
    strip = np.zeros((10, 1000), np.uint8)
    strip[:, 480:520] = 255
    found = np.array(imagenet.random_part(Image.fromarray(strip), 8))
    assert found.min() == 255


def test_a_root_without_images_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"train.*--data\.root"):
        imagenet.ImageNet(tmp_path).setup("fit")


# Networks


def test_resnet50_takes_weights_of_torchvision(tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.models import resnet50

    theirs = resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours = ResNet50(weights=tmp_path / "resnet50.pth").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_networks_cost_what_their_paper_says() -> None:
    # 3x3 convolutions: 55 of them cost 125.5 million; then two 1x1 shortcuts, and the head
    stages = 32 * 32 * 9 * (3 * 16 + 18 * 16 * 16) + sum(
        side**2 * (9 * (c // 2 * c + 17 * c * c) + c // 2 * c) for side, c in ((16, 32), (8, 64))
    )
    assert macs(ResNet56(), 32) == stages + 640
    assert round(macs(ResNet50(), 224) / 1e9, 2) == 4.09


def test_a_checkpoint_of_a_classifier_is_a_start_too(tmp_path: Path) -> None:
    first, path = ResNet56(), tmp_path / "dense.ckpt"
    torch.save({"state_dict": first.state_dict()}, path)
    again = ResNet56(weights=path)
    for name, value in first.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])


# Runs


RECIPES = [
    pytest.param("cifar10_resnet56", ResNet56, write_cifar, 32, "--data.batch_size=8", 0.474, id="cifar10"),
    pytest.param("imagenet_resnet50", ResNet50, write_imagenet, 224, "--data.batch_size=2", 2e9, id="imagenet"),
]


@pytest.mark.parametrize(("recipe", "cls", "write", "size", "batch", "target"), RECIPES)
def test_a_recipe_ends_at_its_target(
    recipe: str, cls: type[Classifier], write: object, size: int, batch: str, target: float, tmp_path: Path
) -> None:
    torch.save(cls().net.state_dict(), tmp_path / "weights.pth")
    config = str(EXAMPLES / f"{recipe}.yaml")
    shorter = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--data.workers=0")
    brief = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false")
    inputs = (f"--data.root={write(tmp_path / 'data')}", "--model.weights=weights.pth", batch)
    result = train("fit", "--config", config, *inputs, *shorter, *brief, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    small = load_pruned(tmp_path / "runs" / recipe / "last.ckpt", cls)
    share = macs(small, size) / (macs(cls(), size) if target < 1 else 1)
    assert 0.98 * target < share <= target
    assert type(small.net.conv1) is nn.Conv2d
