"""One tiny module per topology; `tests/zoo.py` says what each must give.

Channel sizes differ inside a model, so that no two axes agree by accident.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


def conv_norm(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU under the names `conv`, `norm`, `act`."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(c_out), act=nn.ReLU()))


def pooled_head(c_in: int) -> nn.Sequential:
    """Global pooling and a classifier under the names `pool`, `flatten`, `linear`."""
    return nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(c_in, CLASSES))
    )


def chain() -> nn.Module:
    return nn.Sequential(OrderedDict(one=conv_norm(3, 8), two=conv_norm(8, 12), head=pooled_head(12)))


class TwoConvolutions(nn.Module):
    """The two-convolution model of the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.feature(x)).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.one = conv_norm(8, 12)
        self.two = nn.Sequential(OrderedDict(conv=nn.Conv2d(12, 8, 3, padding=1, bias=False), norm=nn.BatchNorm2d(8)))
        self.head = pooled_head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.two(self.one(x))))


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.reduce = conv_norm(8, 6, 1)
        self.middle = conv_norm(6, 10, stride=2)
        self.expand = nn.Sequential(OrderedDict(conv=nn.Conv2d(10, 16, 1, bias=False), norm=nn.BatchNorm2d(16)))
        self.shortcut = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(8, 16, 1, stride=2, bias=False), norm=nn.BatchNorm2d(16))
        )
        self.head = pooled_head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.expand(self.middle(self.reduce(x))) + self.shortcut(x)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fuse = nn.Conv2d(16, 12, 3, padding=1)
        self.head = pooled_head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)))
        return self.head(F.relu(self.fuse(x)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(18), pooled_head(18)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], dim=1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], dim=1)
        return self.head(F.relu(self.norm3(x)))


class Halves(nn.Module):
    """Cuts the stem's 16 channels in two, gives each part its own convolution, and joins them."""

    def __init__(self, cut: int, left: int, right: int) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.left = nn.Conv2d(cut, left, 3, padding=1)
        self.right = nn.Conv2d(16 - cut, right, 3, padding=1)
        self.head = pooled_head(left + right)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.halves(self.stem(x))
        return self.head(F.relu(torch.cat([self.left(left), self.right(right)], dim=1)))


class Split(Halves):
    def __init__(self) -> None:
        super().__init__(6, 7, 9)
        self.sizes = (6, 10)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.split(self.sizes, dim=1)
        return left, right


class Chunk(Halves):
    def __init__(self) -> None:
        super().__init__(8, 7, 9)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.chunk(2, dim=1)
        return left, right


class Slice(Halves):
    def __init__(self) -> None:
        super().__init__(6, 7, 9)
        self.cut = 6

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.cut], x[:, self.cut :]


class SliceLiteral(Halves):
    def __init__(self) -> None:
        super().__init__(6, 7, 9)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :6], x[:, 6:]


def depthwise() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            expand=conv_norm(3, 12, 1),
            spatial=conv_norm(12, 12, groups=12),
            project=conv_norm(12, 10, 1),
            head=pooled_head(10),
        )
    )


def grouped() -> nn.Module:
    """4 groups of 6 channels in and 7 out."""
    return nn.Sequential(
        OrderedDict(stem=conv_norm(3, 24, 1), grouped=conv_norm(24, 28, groups=4), head=pooled_head(28))
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            down=conv_norm(3, 8, stride=2),
            up=nn.ConvTranspose2d(8, 12, 2, stride=2),
            norm=nn.BatchNorm2d(12),
            act=nn.ReLU(),
            out=nn.Conv2d(12, 3, 3, padding=1),
        )
    )


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 12)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.head = pooled_head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 12)
        self.hidden = nn.Linear(12, 20)
        self.back = nn.Linear(20, 12)
        self.decoder = nn.Linear(12, 23, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.back(F.relu(self.hidden(self.embedding(tokens)))))


def flatten_linear() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=conv_norm(3, 8),
            pool=nn.MaxPool2d(4),
            flatten=nn.Flatten(),
            hidden=nn.Linear(8 * 2 * 2, 10),
            norm=nn.BatchNorm1d(10),
            act=nn.ReLU(),
            head=nn.Linear(10, CLASSES),
        )
    )


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.squeeze = nn.Conv2d(16, 6, 1)
        self.excite = nn.Conv2d(6, 16, 1)
        self.head = pooled_head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(x * gate.sigmoid())


def group_norm() -> nn.Module:
    """4 groups of 6 channels."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 24, 3, padding=1),
            norm=nn.GroupNorm(4, 24),
            act=nn.ReLU(),
            conv=conv_norm(24, 10),
            head=pooled_head(10),
        )
    )


class TransformerMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 20)
        self.norm1 = nn.LayerNorm(20)
        self.hidden = nn.Linear(20, 28)
        self.back = nn.Linear(28, 20)
        self.norm2 = nn.LayerNorm(20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.back(F.gelu(self.hidden(self.norm1(x))))
        return self.head(self.norm2(x).mean(1))


class MultiInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = conv_norm(3, 8)
        self.table = nn.Linear(7, 12)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image).mean((2, 3)), F.relu(self.table(table))], dim=1))


class MultiOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = conv_norm(3, 8)
        self.classify = conv_norm(8, 6)
        self.locate = nn.Conv2d(8, 10, 3, padding=1)
        self.head = pooled_head(6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"logits": self.head(self.classify(x)), "boxes": self.locate(x)}


class UnusedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = conv_norm(3, 8)
        self.unused = conv_norm(8, 14)
        self.two = conv_norm(8, 12)
        self.head = pooled_head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


class AuxiliaryHead(nn.Module):
    """Like GoogLeNet: the second head runs only in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one = conv_norm(3, 8)
        self.two = conv_norm(8, 12)
        self.head = pooled_head(12)
        self.aux = conv_norm(8, 6)
        self.aux_head = pooled_head(6)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.one(x)
        logits = self.head(self.two(x))
        return (logits, self.aux_head(self.aux(x))) if self.training else logits
