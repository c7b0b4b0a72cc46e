"""ResNet-56 for CIFAR and ResNet-50 for ImageNet in plain torch; layers are named as in torchvision.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, sec. 4.1 and 4.2.
    We differ as torchvision and the pruning literature do: shortcuts that change shape are 1x1 convolutions (option B),
    and the stride of a bottleneck is in its 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from classifier import Classifier
from torch import Tensor, nn


class Block(nn.Module):
    """Convolutions with norms, beside a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.residual(x) + shortcut)


class BasicBlock(Block):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__(c_in, width, stride)
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        c_out = self.expansion * width
        super().__init__(c_in, c_out, stride)
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)

    def residual(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))


class ResNet(nn.Module):
    """A stem, stages that double the width and halve the image, and a linear head on the mean of what is left.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Blocks of each stage.
        width: Channels of the stem and of the blocks of the first stage.
        classes: Outputs of the head.
        small: Whether images are small: a 3x3 stem in place of a 7x7 one with stride and pooling.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], width: int, classes: int, *, small: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        c_in = width
        self.stages = [f"layer{index + 1}" for index in range(len(depths))]
        for index, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            layers = []
            for place in range(depth):
                layers.append(block(c_in, width << index, stride=2 if index and not place else 1))
                c_in = block.expansion * (width << index)
            self.add_module(name, nn.Sequential(*layers))
        self.fc = nn.Linear(c_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))


class ResNet56(Classifier):
    """Three stages of nine basic blocks, for images of 32 x 32 pixels.

    Args:
        classes: How many classes there are.
        weights: A state dict, or a checkpoint of this class; None starts from random weights.
    """

    def __init__(self, classes: int = 10, weights: Path | None = None) -> None:
        super().__init__(ResNet(BasicBlock, (9, 9, 9), 16, classes, small=True), classes, weights)


class ResNet50(Classifier):
    """Four stages of 3, 4, 6 and 3 bottlenecks, for images of 224 x 224 pixels.

    Args:
        classes: How many classes there are.
        weights: A state dict such as torchvision's, or a checkpoint of this class; None starts from random weights.
    """

    def __init__(self, classes: int = 1000, weights: Path | None = None) -> None:
        super().__init__(ResNet(Bottleneck, (3, 4, 6, 3), 64, classes, small=False), classes, weights)
