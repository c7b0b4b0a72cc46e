"""Criteria from the activations: what the layers that read a channel are given.

A channel's activations are taken at the inputs of the convolutions and linear layers that read it, so behind whatever
norm, activation function or pooling comes between. They are those of training: in train mode, dropout included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PlanError
from lightning_prune.importance.axes import Reader, readers_of
from lightning_prune.importance.layers import by_channel, exact_dtype, position_rows
from lightning_prune.importance.observer import LossScale, MeansObserver, Row, listed

if TYPE_CHECKING:
    from lightning_prune.importance.scorer import Importance
    from lightning_prune.units import MutableChannelUnit

__all__ = ["ActivationObserver", "activation", "apoz", "checked_readers", "input_of", "wanda"]


def activation(values: Tensor) -> Tensor:
    """Score by the mean absolute activation: ``mean over examples and places of |x[c]|``.

    Args:
        values: Activations of any shape.

    Returns:
        What is averaged, of the same shape; then combined over the layers that read the channel.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017,
        arXiv:1611.06440, the mean activation. We differ: absolute values, at the readers' inputs.
    """
    return values.abs()


def apoz(values: Tensor) -> Tensor:
    """Score by the share of activations that are not zero: ``1 - APoZ``.

    It tells channels apart where the activation function has exact zeros, such as ReLU.

    Args:
        values: Activations of any shape.

    Returns:
        What is averaged, of the same shape; then combined over the layers that read the channel.

    Source: Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures",
        2016, arXiv:1607.03250. We differ: zeros count at the readers' inputs; higher = keep.
    """
    return values != 0


def wanda(values: Tensor) -> Tensor:
    """Score by weight times size of the activation: ``sum |w[:, c]| * sqrt(mean of x[c] ** 2)`` in each reader.

    Args:
        values: Activations of any shape.

    Returns:
        What is averaged under the root, of the same shape; then times the weights, then combined over the layers that
        read the channel.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024, arXiv:2306.11695.
        We differ: channels instead of single weights, so their scores are summed over the outputs of the reader;
        the root mean square instead of the norm, which would grow with the number of examples.
    """
    return values.square()


def checked_readers(importance: Importance, units: Iterable[MutableChannelUnit]) -> dict[Row, Reader]:
    """Return the convolutions and linear layers that read each unit.

    Raises:
        PlanError: None reads one of them.
    """
    found: dict[Row, Reader] = {}
    for unit in units:
        readers = readers_of(unit)
        if not readers:
            raise PlanError(
                f"Got unit {unit.name!r}, which no convolution or linear layer reads; importance {importance.name!r} "
                "expects one. Use 'taylor' or 'l1', or keep its layers with ignore=."
            )
        found.update({(unit.name, k): reader for k, reader in enumerate(readers)})
    return found


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a convolution or linear layer from what its forward was called with."""
    values = args[0] if args else kwargs["input"]
    assert isinstance(values, Tensor), "a convolution or linear layer takes a tensor"
    return values


class ReadersObserver(MeansObserver):
    """What the criteria share that look at what the readers of a unit are given."""

    def __init__(
        self, importance: Importance, units: Iterable[MutableChannelUnit], function: Callable[..., Tensor]
    ) -> None:
        units = list(units)
        self._readers = checked_readers(importance, units)
        self._by_module: dict[nn.Module, list[Row]] = {}
        for row, reader in self._readers.items():
            self._by_module.setdefault(reader.module, []).append(row)
        super().__init__(importance, units, function)


class ActivationObserver(ReadersObserver):
    """Means of a function of the activations, per unit and layer that reads it."""

    options = ("reduction",)

    def _rows(self) -> list[Row]:
        return list(self._readers)

    def attach(self) -> list[RemovableHandle]:
        """Hook into the readers for one batch."""
        return [module.register_forward_pre_hook(self._see, with_kwargs=True) for module in self._by_module]

    @torch.no_grad()
    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = self._by_module[module]
        values = input_of(args, kwargs).detach().movedim(self._readers[rows[0]].dim, -1)
        values = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(-1, values.shape[-1])
        sums = self.function(values, **self.importance.arguments).sum(0, dtype=exact_dtype(values.device))
        count = torch.full_like(sums, len(values))
        self._add(
            {row: (self._readers[row].per_channel(sums), self._readers[row].per_channel(count)) for row in rows},
            LossScale(),
        )

    def _covered(self, row: Row) -> Tensor:
        return self._readers[row].covered()

    def _combined(self, unit: MutableChannelUnit, means: list[Tensor], seen: list[Tensor]) -> Tensor:
        if self.function is wanda:
            readers = [self._readers[unit.name, k].module for k in range(len(means))]
            means = [m.sqrt() * _reading_weights(unit, r) for m, r in zip(means, readers, strict=True)]
        return super()._combined(unit, means, seen)

    def _missing(self, rows: Iterable[Row]) -> PlanError:
        names = list(dict.fromkeys(self._readers[row].name for row in rows))
        return PlanError(
            f"Got no activations at {listed(names)}; importance {self.importance.name!r} expects every layer that "
            "reads a unit to be called in training. Are they unused, or hidden inside a compiled or fused module? Keep "
            "what they read with ignore=, or use importance 'taylor' or 'l1'."
        )


def _reading_weights(unit: MutableChannelUnit, module: nn.Module) -> Tensor:
    """Return the sum of the absolute weights of a layer that read each channel, float64 `[C]` on the CPU."""
    spans = [span for span in unit.input_related if span.module is module]
    sums = [by_channel(span, position_rows(span).abs().sum(1), unit.num_channels)[0] for span in spans]
    return torch.stack(sums).sum(0).to("cpu", torch.float64)
