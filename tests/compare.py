"""Run models side by side: outputs in eval and train mode, masks at random, and removed channels set to zero."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.graph.sandbox import Sandbox
from lightning_prune.ops import dynamic_ops, static_view
from lightning_prune.ops.caches import empty_caches_, lazy_caches
from lightning_prune.plan import KeepPlan
from lightning_prune.units import MutableChannelUnit

DIRECTIONS = ("original1", "weight_v")  # of weight norm: without a direction that is 0; its length becomes 0 instead

LARGEST = 1e12  # output of a network without training that can be compared


def double(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def outputs(model: nn.Module, inputs: Sequence[Tensor], *, train: bool = False, **keywords: Any) -> list[Tensor]:
    """Return every output of one forward without gradients, but for the cache that a language model hands itself.

    Dropout and masks draw the same every time.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with torch.no_grad():
        return Sandbox(model).outputs(model.train(train)(*inputs, **keywords))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers as the layers present them."""
    found = {}
    for name, _ in model.named_buffers():
        layer, _, own = name.rpartition(".")
        found[name] = getattr(model.get_submodule(layer), own).clone()
    return found


def scattered(units: Sequence[MutableChannelUnit], seed: int = 0) -> KeepPlan:
    """Keep a random subset of every unit: at least 2 channels where there are so many, never all of them."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for unit in units:
        size = unit.num_channels
        count = int(torch.randint(min(2, size - 1), size, (), generator=generator))
        count = max(count // unit.divisor, 1) * unit.divisor
        kept[unit.name] = tuple(sorted(torch.randperm(size, generator=generator)[:count].tolist()))
    return KeepPlan(kept)


def full(units: Sequence[MutableChannelUnit]) -> KeepPlan:
    return KeepPlan({unit.name: tuple(range(unit.num_channels)) for unit in units})


def zeroed_outputs(model: nn.Module, inputs: Sequence[Tensor], *, train: bool = False, **keywords: Any) -> list[Tensor]:
    """Return the outputs of the dense model in which every removed entry of every parameter is 0."""
    dense = copy.deepcopy(model)
    empty_caches_(dense, lazy_caches(dense))
    with torch.no_grad():
        for op in dynamic_ops(dense).values():
            for name, parameter in op._parameters.items():
                if name in DIRECTIONS:
                    continue
                for dim, kept in enumerate(op.kept_indices_of(name) if parameter is not None else ()):
                    if kept is not None:
                        removed = torch.ones(parameter.shape[dim], dtype=torch.bool)
                        removed[kept] = False
                        parameter.index_fill_(dim, removed.nonzero().flatten(), 0.0)
    with static_view(dense):
        return outputs(dense, inputs, train=train, **keywords)


@torch.no_grad()
def calibrate_(model: nn.Module, inputs: Sequence[Tensor], **keywords: Any) -> None:
    """Give the norms of a network whose outputs are too large to compare the statistics of their inputs.

    Without training those of a deep network grow from block to block: of outputs of 1e13, as of `efficientnet_v2_l`, no
    comparison of rounded numbers says anything.

    Args:
        model: In eval mode.
        inputs: What to call it on.
        keywords: The same by name.
    """
    if max(float(t.abs().max()) for t in outputs(model, inputs, **keywords) if t.numel()) < LARGEST:
        return
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(*inputs, **keywords)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


def macs_of(model: nn.Module, inputs: Sequence[Tensor], **keywords: Any) -> int:
    """Return the multiply-adds that torch itself counts, with attention as plain products: fused kernels hide them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.eval()(*inputs, **keywords)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def assert_same(found: Any, expected: Any) -> None:
    """Assert equality bit for bit, shapes and number included."""
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True)), [
        float((a - b).abs().max()) if a.shape == b.shape else (a.shape, b.shape)
        for a, b in zip(found, expected, strict=True)
    ]
