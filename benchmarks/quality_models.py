"""Four small networks as users write them, and the Lightning module that trains any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from benchmarks.quality_data import CLASSES, SIDE


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution and its batch norm."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv_norm(c_in, c_out, 3, stride), conv_norm(c_out, c_out, 3)
        self.shortcut = nn.Identity() if stride == 1 and c_in == c_out else conv_norm(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, a depthwise one, 1x1 back; beside a shortcut where shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = expand * c_in
        widen = [] if expand == 1 else [conv_norm(c_in, hidden, 1), nn.ReLU6()]
        self.layers = nn.Sequential(
            *widen, conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), conv_norm(hidden, c_out, 1)
        )
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


class DenseLayer(nn.Module):
    """Norm, 1x1 convolution, norm, 3x3 convolution to `growth` new channels behind those that were there."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class Attention(nn.Module):
    """Self-attention with one projection to queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class EncoderBlock(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of 7 x 7 pixels that overlap, learned positions, pre-norm blocks, mean over the tokens."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2 * patch - 1, patch, patch - 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def make_resnet(width: int = 16) -> nn.Module:
    """Return a ResNet-20: three stages of three blocks."""
    layers: list[nn.Module] = [conv_norm(1, width, 3), nn.ReLU()]
    c_in = width
    for stage in range(3):
        for index in range(3):
            layers.append(BasicBlock(c_in, width << stage, 2 if stage and not index else 1))
            c_in = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, CLASSES))


def make_mobilenet() -> nn.Module:
    """Return a MobileNetV2 of nine inverted residuals."""
    layers: list[nn.Module] = [conv_norm(1, 16, 3), nn.ReLU6()]
    c_in = 16
    for expand, c_out, repeats, stride in ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 3, 2), (4, 48, 3, 1)):
        for index in range(repeats):
            layers.append(InvertedResidual(c_in, c_out, 1 if index else stride, expand))
            c_in = c_out
    layers += [conv_norm(c_in, 128, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def make_densenet(growth: int = 12) -> nn.Module:
    """Return a DenseNet with bottlenecks: three blocks of four layers, halved in width and side between them."""
    layers: list[nn.Module] = [nn.Conv2d(1, 2 * growth, 3, 1, 1, bias=False)]
    width = 2 * growth
    for block in range(3):
        for _ in range(4):
            layers.append(DenseLayer(width, growth))
            width += growth
        if block < 2:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": make_resnet,
    "MobileNetV2": make_mobilenet,
    "DenseNet": make_densenet,
    "ViT": VisionTransformer,
}


class Classifier(LightningModule):
    """Any of them, with the optimizer of its kind and a one-cycle learning rate.

    Args:
        net: The network.
        learning_rate: Peak; that of AdamW for transformers, of SGD for the others.
    """

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    def configure_optimizers(self) -> Any:
        rate = self.learning_rate
        if isinstance(self.net, VisionTransformer):
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), rate, weight_decay=0.05)
        else:
            optimizer = torch.optim.SGD(self.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
