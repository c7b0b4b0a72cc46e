"""The two sides of the comparison: each prunes a copy of one trained network to a share of its multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality_data import CLASSES, SIDE
from benchmarks.torch_pruning_settings import attention_of, write_sizes_
from tests.compare import macs_of
from tests.torchvision_shim import import_torch_pruning

TOLERANCE = 0.02
MIN_RATIO = 0.1
EXAMPLE = (2, 1, SIDE, SIDE)

Batches = list[tuple[Tensor, Tensor]]


def count_macs(net: nn.Module) -> int:
    """Return the multiply-adds of one image, counted by torch."""
    return macs_of(net, [torch.zeros(1, *EXAMPLE[1:])])


def prune_ours(net: nn.Module, share: float, criterion: str, scope: str, batches: Batches, **options: Any) -> nn.Module:
    """Return a plain small copy, with the defaults of the callback, the divisor apart.

    Args:
        net: Stays as it is.
        share: Of the multiply-adds that remains, as an upper bound.
        criterion: Name of an importance.
        scope: See `PruningCallback`.
        batches: Training batches for criteria that watch gradients.
        options: For other than the defaults of the importance.
    """
    from lightning_prune.export import export_pruned
    from lightning_prune.importance import Importance
    from lightning_prune.mutator import ChannelMutator
    from lightning_prune.targets import make_plan

    net = copy.deepcopy(net)
    mutator = ChannelMutator(example_input=torch.zeros(EXAMPLE))
    mutator.prepare_from_supernet(net)
    min_ratio, per_cost = options.pop("min_ratio", MIN_RATIO), options.pop("per_cost", None)
    importance = Importance(criterion, **options)
    observer = importance.observer(mutator.mutable_units)
    scorer = importance if observer is None else watched(observer, net, batches)
    limits = mutator.limits(1, min_ratio)
    scores = scorer.scores(mutator.mutable_units, scope)
    if importance.is_priced:
        per_cost = "macs"
    cost = mutator.graph.cost
    mutator.apply(make_plan({"macs": share}, scores, limits, cost, scope=scope, per_cost=per_cost))
    return export_pruned(net)


def watched(observer: Any, net: nn.Module, batches: Batches) -> Any:
    """Let an observer see the gradients of some batches, as the callback does; no step is taken."""
    from lightning_prune.importance.observer import LossScale

    net.eval()
    ids = {id(parameter) for parameter in net.parameters()}
    for images, labels in batches:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        observer.before_step(ids, LossScale())
    net.zero_grad()
    return observer


class Pruned(NamedTuple):
    """A network that Torch-Pruning made, and what it was asked for."""

    net: nn.Module
    macs: int
    ratio: float


def prune_theirs(net: nn.Module, macs: int, criterion: str, scope: str, batches: Batches, **options: Any) -> Pruned:
    """Return what Torch-Pruning makes, with the ratio whose multiply-adds are nearest to ours.

    Args:
        net: Stays as it is.
        macs: Multiply-adds of ours.
        criterion: "magnitude" or "taylor": GroupMagnitudeImportance or GroupTaylorImportance, as they are.
        scope: "global", "isomorphic" or "local".
        batches: For gradients.
        options: Further arguments of its pruner.
    """
    tried: list[Pruned] = []

    def distance(ratio: float) -> float:
        tried.append(_step(net, ratio, criterion, scope, batches, options))
        return tried[-1].macs / macs - 1

    find_zero(distance, TOLERANCE / 4)
    return min(tried, key=lambda found: abs(found.macs - macs))


def find_zero(distance: Callable[[float], float], tolerance: float, rounds: int = 10, grid: int = 10) -> None:
    """Look for the lowest ratio of distance 0: between two points of a grid, by bisection.

    Bisection alone may miss it: a group that would vanish stays whole, so that costs rise again at high ratios.

    Args:
        distance: Of a ratio in (0, 1); above 0 at 0, and falls up to its first zero.
        tolerance: A distance up to it ends the search.
        rounds: Of bisection.
        grid: Parts of the range.
    """
    low = 0.0
    for index in range(1, grid):
        found = distance(index / grid)
        if abs(found) < tolerance:
            return
        if found < 0:
            break
        low = index / grid
    high = low + 1 / grid
    for _ in range(rounds):
        ratio = (low + high) / 2
        found = distance(ratio)
        if abs(found) < tolerance:
            return
        low, high = (ratio, high) if found > 0 else (low, ratio)


def _step(
    net: nn.Module, ratio: float, criterion: str, scope: str, batches: Batches, options: dict[str, Any]
) -> Pruned:
    torch_pruning = import_torch_pruning()
    net = copy.deepcopy(net).eval()
    if criterion == "taylor":
        for images, labels in batches:
            F.cross_entropy(net(images), labels).backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    attentions = attention_of(net)
    heads = {projection: a.heads for a in attentions for projection in a.projections}
    pruner = torch_pruning.pruner.MetaPruner(
        net,
        torch.zeros(EXAMPLE),
        importance=importance,
        global_pruning=scope != "local",
        isomorphic=scope == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=[layer for layer in net.modules() if getattr(layer, "out_features", None) == CLASSES],
        num_heads=heads,
        **options,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    write_sizes_(net, attentions, pruner.num_heads)
    net.zero_grad()
    return Pruned(net, count_macs(net), ratio)
