"""From the layers of a unit to one score per channel: reduce over layers, normalise over channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, did_you_mean

__all__ = ["NORMALIZERS", "REDUCTIONS", "SHARE", "normalize", "reduce_layers", "share_of_rest"]

SHARE = "share"


def _mean(scores: Tensor, is_covered: Tensor) -> Tensor:
    return torch.where(is_covered, scores, 0.0).sum(0) / is_covered.sum(0)


def _sum(scores: Tensor, is_covered: Tensor) -> Tensor:
    return torch.where(is_covered, scores, 0.0).sum(0)


def _max(scores: Tensor, is_covered: Tensor) -> Tensor:
    return torch.where(is_covered, scores, -torch.inf).amax(0)


def _prod(scores: Tensor, is_covered: Tensor) -> Tensor:
    return torch.where(is_covered, scores, 1.0).prod(0)


def _first(scores: Tensor, is_covered: Tensor) -> Tensor:
    return scores.gather(0, is_covered.int().argmax(0, keepdim=True))[0]


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "sum": _sum,
    "max": _max,
    "prod": _prod,
    "first": _first,
}

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().amax(),
    "sum": lambda scores: scores.abs().sum(),
    "std": lambda scores: scores.std(correction=0),
    "none": lambda scores: scores.new_ones(()),
}


def reduce_layers(scores: Sequence[Tensor], is_covered: Sequence[Tensor], reduction: str) -> Tensor:
    """Combine the scores of L layers into one per channel.

    Args:
        scores: Float `[C]` of each layer.
        is_covered: Bool `[C]` of each layer: whether the layer has this channel. A concat gives each layer a part of
            the unit; what a layer does not have counts for nothing.
        reduction: "mean", "sum", "max", "prod", or "first" (the first layer that has the channel).

    Returns:
        Float `[C]`; 0 for a channel that no layer has.

    Raises:
        ConfigError: Unknown reduction.

    Example:
        >>> layers = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 0.0, 0.0])]
        >>> reduce_layers(layers, [torch.tensor([True, True, True]), torch.tensor([True, False, False])], "mean")
        tensor([3., 2., 3.])
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"Got reduction={reduction!r}. {did_you_mean(reduction, REDUCTIONS)}")
    covered = torch.stack(list(is_covered))
    return torch.where(covered.any(0), REDUCTIONS[reduction](torch.stack(list(scores)), covered), 0.0)


def normalize(scores: Tensor, normalizer: str, over: Tensor | None = None) -> Tensor:
    """Divide the scores of one unit by a statistic of them, so that units become comparable.

    The statistic is of absolute values ("std" apart), so that the order never turns; a statistic of 0 divides by 1.
    "share" divides each score by the sum of those that are not lower: see `share_of_rest`.

    Args:
        scores: Float `[C]`.
        normalizer: "mean", "max", "sum", "std" (population standard deviation), "share" (for scores >= 0), or "none".
        over: Bool `[C]`, the channels that the statistic is of, at least one; None is all. The others have share 0.

    Returns:
        Float `[C]` in the same order.

    Raises:
        ConfigError: Unknown normalizer.

    Example:
        >>> normalize(torch.tensor([1.0, 2.0, 3.0]), "mean")
        tensor([0.5000, 1.0000, 1.5000])
    """
    if normalizer == SHARE:
        return share_of_rest(scores if over is None else scores * over.to(scores.device))
    if normalizer not in NORMALIZERS:
        raise ConfigError(f"Got normalizer={normalizer!r}. {did_you_mean(normalizer, (*NORMALIZERS, SHARE))}")
    statistic = NORMALIZERS[normalizer](scores if over is None else scores[over.to(scores.device)])
    return scores / torch.where(statistic == 0, 1.0, statistic)


def share_of_rest(energy: Tensor) -> Tensor:
    """Return each channel's share of the energy that is left once all weaker channels are gone.

    To remove the weakest first costs, to first order, this much of the logarithm of what is left: more and more, so
    that one threshold for all units empties none.

    Args:
        energy: Float `[C]`, >= 0; of equal channels the one with the lower index counts as the stronger.

    Returns:
        Float `[C]` in [0, 1]; 1 for the strongest, unless all are 0.

    Example:
        >>> share_of_rest(torch.tensor([1.0, 3.0, 0.0]))
        tensor([0.2500, 1.0000, 0.0000])

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, arXiv:2010.07611. Per cost, as
        "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv:1801.05787, does with its scores.
        We differ: any scores of channels, not the squares of single weights; a unit that R layers read counts R times.
    """
    strongest, order = energy.sort(descending=True, stable=True)
    left = strongest.cumsum(0)
    return torch.zeros_like(energy).index_copy_(0, order, strongest / torch.where(left == 0, 1.0, left))
