"""Twelve networks of torchvision as they are: every unit certified, dynamic == exported, and the price exact."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops, to_static_
from tests.compare import double, macs_of, outputs, scattered
from tests.torchvision_shim import import_torchvision

# name -> side of the image (the least that the network takes), and its units
MODELS = {
    "resnet18": (32, 12),
    "resnet50": (32, 37),
    "vgg16_bn": (32, 15),
    "mobilenet_v2": (32, 25),
    "mobilenet_v3_small": (32, 27),
    "densenet121": (32, 120),
    "googlenet": (96, 61),
    "inception_v3": (299, 96),
    "efficientnet_b0": (32, 40),
    "squeezenet1_1": (32, 25),
    "mnasnet1_0": (32, 25),
    "convnext_tiny": (32, 22),
}


def build(name: str) -> nn.Module:
    models = import_torchvision().models
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's own, on initial weights
        model: nn.Module = getattr(models, name)(weights=None, num_classes=7, **extra)
    return model.double()


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_certified_exported_and_priced(name: str) -> None:
    side, units = MODELS[name]
    model, inputs = build(name), double((torch.randn(2, 3, side, side),))
    before = outputs(model, inputs)
    dense = sum(p.numel() for p in model.parameters())
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    assert len(mutator.units) == units
    assert not mutator.graph.unknown
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), before, strict=True))
    mutator.apply(scattered(mutator.units))
    small = to_static_(copy.deepcopy(model))
    assert not dynamic_ops(small)
    assert sum(p.numel() for p in small.parameters()) == mutator.cost().params < dense
    for train in (True, False):
        pairs = zip(outputs(model, inputs, train=train), outputs(small, inputs, train=train), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for key, value in small.state_dict().items():
        if "running" in key:
            layer, _, own = key.rpartition(".")
            torch.testing.assert_close(getattr(model.get_submodule(layer), own), value, rtol=1e-9, atol=1e-9)
    assert mutator.cost().macs == macs_of(small, inputs)
