"""Running statistics of batch norms, estimated anew for the structure that pruning leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.errors import ConfigError
from lightning_prune.recovery.base import Recovery, Run

__all__ = ["Recalibration", "recalibrate_"]


class Recalibration(Recovery):
    """After each firing, estimate the running statistics of batch norms anew, on training batches.

    What a batch norm has learned about its input is wrong once channels before it are gone, and a momentum forgets it
    only slowly. Weights, modes, random numbers and the data order of the training stay as they are. See `recalibrate_`
    for the formula and what runs in which mode.

    Args:
        batches: How many training batches each process runs through the model, at least 1.

    Raises:
        ConfigError: `batches` is no whole number of at least 1.

    Source: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", 2019, arXiv:1903.05134,
        sec. 4 (statistics of each width after training); Li et al., "EagleEye", 2020, arXiv:2007.02491, sec. 3.4.
    """

    def __init__(self, batches: int = 16) -> None:
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise ConfigError(f"Got batches={batches!r} for Recalibration; expected a whole number of at least 1.")
        self.batches = batches
        self._has_said = False

    def after_firing(self, run: Run) -> None:
        """Estimate them anew."""
        if norms_of(run.module):
            recalibrate_(run.module, run.batches(self.batches), run.forward, run.mean)
        elif not self._has_said:
            from lightning.pytorch.utilities import rank_zero_info

            self._has_said = True
            rank_zero_info("Recalibration: the model has no batch norm that estimates statistics; nothing is done.")


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that estimate running statistics now: those in eval mode are frozen."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [n for n in norms if n.training and n.track_running_stats and n._buffers.get("running_mean") is not None]


@torch.no_grad()
def recalibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Set the running statistics of batch norms to those of some batches.

    ``running_mean = 1/n sum_i mean(x_i)`` and ``running_var = 1/n sum_i var(x_i)``, unbiased, over the inputs x_i of n
    batches. Only the norms run in train mode: at evaluation too there is no dropout. A norm that no batch reaches keeps
    what it has; so do weights, other buffers, modes, momenta and counters.

    Args:
        model: Its batch norms in train mode are estimated anew; those in eval mode are frozen and stay.
        batches: What to run.
        forward: Runs the model on one of them.
        mean: The mean of a float tensor over all processes; each has run batches of its own.

    Source: the average that `torch.nn.BatchNorm2d(momentum=None)` takes; Wu and Johnson, "Rethinking 'Batch' in
        BatchNorm", 2021, arXiv:2105.07576, sec. 3. We differ: variances are averaged, not pooled.
    """
    norms = norms_of(model)
    with _statistics_only(model, norms):
        for batch in batches:
            forward(batch)
        for norm in norms:
            counter = norm._buffers["num_batches_tracked"]
            for name in ("running_mean", "running_var"):
                statistic = norm._buffers[name]
                if statistic is not None and counter is not None and counter > 0:
                    statistic.copy_(mean(statistic))


@contextmanager
def _statistics_only(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let the norms average what they see, and leave everything else as it was."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    statistics = {id(norm._buffers[name]) for norm in norms for name in ("running_mean", "running_var")}
    buffers = [(buffer, buffer.clone()) for buffer in _held(model) if id(buffer) not in statistics]
    was_training = model.training
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
            norm._buffers["num_batches_tracked"].zero_()  # type: ignore[union-attr]  # there are statistics
        yield
    finally:
        model.train(was_training)  # models that cache something in eval mode drop it here
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum
        for buffer, before in buffers:
            buffer.copy_(before)


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Yield every buffer of its full size, also where a layer presents a part of it."""
    for module in model.modules():
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
