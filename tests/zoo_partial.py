"""Topologies of the zoo whose weights are made of other parameters."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo_models import conv_norm, pooled_head


def weight_normed() -> nn.Module:
    """Return a stem with batch norm and three layers with weight norm, one of them grouped and one transposed."""
    layers = OrderedDict(
        stem=conv_norm(3, 8),
        body=weight_norm(nn.Conv2d(8, 12, 3, padding=1)),
        act=nn.ReLU(),
        grouped=weight_norm(nn.Conv2d(12, 12, 3, padding=1, groups=12)),
        up=weight_norm(nn.ConvTranspose2d(12, 10, 2, stride=2), dim=1),
        head=pooled_head(10),
    )
    return nn.Sequential(layers)
