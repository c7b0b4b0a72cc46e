"""Topologies of the zoo that convolutions alone do not show: attention, raw parameters, an op without a rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_models import CLASSES, conv_norm, pooled_head

DIM, HEADS, HEAD_DIM = 20, 4, 6


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HEAD_DIM
        self.scale = HEAD_DIM**-0.5
        self.qkv = nn.Linear(DIM, 3 * HEADS * HEAD_DIM)
        self.proj = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class SeparateAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HEAD_DIM
        self.scale = HEAD_DIM**-0.5
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.k = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.v = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.proj = nn.Linear(HEADS * HEAD_DIM, DIM)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class AttentionModel(nn.Module):
    """An embedding, one residual attention block, and a head over the mean token."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(7, DIM)
        self.attn = attn
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attn(x)).mean(1))


def fused_attention() -> nn.Module:
    return AttentionModel(FusedAttention())


def separate_attention() -> nn.Module:
    return AttentionModel(SeparateAttention())


class RawBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(10, 3, 3, 3) / 5)
        self.projection = nn.Parameter(torch.randn(CLASSES, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3)), self.projection)


def functional() -> nn.Module:
    """Functional calls with raw parameters; no layer of torch owns them."""
    model = nn.Sequential()
    model.add_module("body", RawBody())
    return model


class ScaledBlock(nn.Module):
    """Inverted bottleneck whose output is multiplied by a raw parameter per channel, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(14, 18, 1)
        self.project = nn.Conv2d(18, 14, 1)
        self.gamma = nn.Parameter(torch.rand(14, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.project(F.relu(self.expand(x)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 14)
        self.block = ScaledBlock()
        self.head = pooled_head(14)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


@torch.library.custom_op("lightning_prune_zoo::position_scale", mutates_args=())
def position_scale(x: Tensor) -> Tensor:
    """Multiply channel c by c + 1: it does not commute with a selection of channels, and no rule knows it."""
    weights = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return x * weights.view(1, -1, *[1] * (x.dim() - 2))


@position_scale.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


position_scale.register_autograd(lambda _, gradient: position_scale(gradient))


class UnknownOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = conv_norm(3, 8)
        self.two = conv_norm(8, 12)
        self.three = conv_norm(12, 10)
        self.head = pooled_head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(position_scale(self.two(self.one(x)))))


class PReLUChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.PReLU(8)
        self.two = nn.Conv2d(8, 12, 3, padding=1)
        self.single = nn.PReLU()
        self.head = pooled_head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.single(self.two(self.act(self.one(x)))))


def sequence() -> nn.Module:
    """One-dimensional convolutions, instance norm."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),
        nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.Conv1d(8, 12, 3, padding=1),
        nn.BatchNorm1d(12),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def volume() -> nn.Module:
    """Three-dimensional convolutions."""
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 12, 2, stride=2),
        nn.ReLU(),
        nn.Conv3d(12, 4, 1),
    )
