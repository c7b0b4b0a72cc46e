"""Twelve networks of torchvision as they are: every unit certified, dynamic == exported, and the price exact."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops, to_static_
from tests.compare import assert_same, macs_of, outputs, scattered
from tests.torchvision_shim import import_torchvision
from tests.zoo_case import randomize_norms_

# name -> units found by reading its code, side of the image (small, where the network takes it) in eval and train mode
MODELS = {
    "resnet18": (12, 32, 32),
    "resnet50": (37, 32, 32),
    "vgg16_bn": (15, 32, 32),
    "mobilenet_v2": (25, 32, 32),
    "mobilenet_v3_small": (27, 32, 32),
    "densenet121": (120, 32, 32),
    "googlenet": (61, 64, 96),
    "inception_v3": (96, 80, 299),
    "efficientnet_b0": (40, 32, 32),
    "squeezenet1_1": (25, 32, 32),
    "mnasnet1_0": (25, 32, 32),
    "convnext_tiny": (22, 32, 32),
}


def build(name: str) -> nn.Module:
    """Return a network with weights of one drawing: torchvision's own initialization takes longer than the test."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's own, on initial weights
        model: nn.Module = getattr(import_torchvision().models, name)(weights=None, num_classes=7)
    model.double().to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                bound = (6 * len(tensor) / tensor.numel()) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.uniform_(-bound, bound)
            else:
                tensor.zero_()
    return randomize_norms_(model)


def image(side: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, side, side, dtype=torch.float64),)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers as the layers present them."""
    found = {}
    for name, _ in model.named_buffers():
        layer, _, own = name.rpartition(".")
        found[name] = getattr(model.get_submodule(layer), own).clone()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_certified_exported_and_priced(name: str) -> None:
    units, small_side, side = MODELS[name]
    model, inputs, example = build(name), image(small_side), image(side)
    before, dense = outputs(model, inputs), sum(p.numel() for p in model.parameters())
    mutator = ChannelMutator(example_input=example)
    mutator.prepare_from_supernet(model)
    assert_same(outputs(model, inputs), before)
    assert len(mutator.units) == units
    assert not mutator.graph.unknown
    # nothing but the image and the outputs is frozen
    assert {f.size for f in mutator.graph.frozen if f.reason != "model output"} == {3}

    mutator.apply(scattered(mutator.units))
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    found = [outputs(model, inputs), outputs(model, example, train=True), statistics(model)]
    for buffer, value in saved:
        buffer.copy_(value)
    small = to_static_(model)
    assert not dynamic_ops(small)
    expected = [outputs(small, inputs), outputs(small, example, train=True), statistics(small)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    assert sum(p.numel() for p in small.parameters()) == mutator.cost().params < dense
    assert macs_of(copy.deepcopy(small).to("meta"), [x.to("meta") for x in example]) == mutator.cost().macs
