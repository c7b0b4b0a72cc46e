"""Criteria from the gradients of the weights: what the loss would change by if a channel were zero.

All of them start from the products of weights and their gradients, per layer and step of the optimizer: with
``v = w * dL/dw`` over the entries of channel c in the weight and bias of one layer, ``first[c] = sum v`` and
``second[c] = sum v ** 2``. The sum over a layer is that of a gate on the channel's output: of a norm
``gamma * dL/dgamma + beta * dL/dbeta``. A convolution that a batch norm follows has a first of 0, whatever its
gradients are, because the norm undoes its scale; the norm then speaks for the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_prune.errors import PlanError
from lightning_prune.importance.axes import DenseAxis, parameter_axes
from lightning_prune.importance.layers import all_spans, by_channel, exact_dtype
from lightning_prune.importance.observer import LossScale, MeansObserver, Row, listed

if TYPE_CHECKING:
    from lightning_prune.importance.scorer import Importance
    from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["GradientObserver", "hessian", "taylor", "taylor2"]


def taylor(first: Tensor, second: Tensor, *, joint: bool = True) -> Tensor:
    """Score by the square of the first-order change of the loss: ``(sum v) ** 2``, or ``sum v ** 2``.

    Args:
        first: Float `[C]`, sum of weight times gradient in one layer at one step.
        second: Float `[C]`, sum of the squares of weight times gradient.
        joint: Square the sum over the channel, as a gate would; else sum the squares of single weights.

    Returns:
        Float `[C]`, >= 0, in squared units of the loss; averaged over steps, then combined over layers.

    Example:
        >>> taylor(torch.tensor([3.0, 0.0]), torch.tensor([5.0, 2.0]))
        tensor([9., 0.])

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771,
        the first-order, joint form.
        We differ: a step is what the optimizer sees, all accumulated batches and ranks together; plain mean over steps
        instead of a moving average; a unit combines its layers.
    """
    return first.square() if joint else second


def hessian(first: Tensor, second: Tensor) -> Tensor:
    """Score by the second-order change of the loss at a minimum: ``1/2 sum h * w ** 2``, with ``h = (dL/dw) ** 2``.

    Args:
        first: Not used: at a minimum there is no first-order change.
        second: Float `[C]`, sum of the squares of weight times gradient in one layer at one step.

    Returns:
        Float `[C]`, >= 0, in units of the loss; averaged over steps, then combined over layers.

    Source: LeCun et al., "Optimal Brain Damage", 1989: the saliency.
        We differ: channels instead of single weights; the diagonal is that of the empirical Fisher information, from
        the gradients of steps instead of single examples. With it the order is that of `taylor` with joint=False.
    """
    return 0.5 * second


def taylor2(first: Tensor, second: Tensor) -> Tensor:
    """Score by the square of the change of the loss to second order: ``(sum v - 1/2 sum v ** 2) ** 2``.

    Removing changes w by -w, and the loss by ``-g w + 1/2 h w ** 2`` with ``h = g ** 2``.

    Args:
        first: Float `[C]`, sum of weight times gradient in one layer at one step.
        second: Float `[C]`, sum of the squares of weight times gradient.

    Returns:
        Float `[C]`, >= 0, in squared units of the loss; averaged over steps, then combined over layers.

    Source: Molchanov et al., arXiv:1906.10771, the second-order form.
        We differ: the Hessian is the diagonal of the empirical Fisher information, as in `hessian`.
    """
    return (first - 0.5 * second).square()


@dataclass(frozen=True, eq=False)
class _Layer:
    """One span of a unit, and the parameters that have its axis: tensor name -> dim and axis."""

    span: Channel
    parts: dict[str, tuple[int, DenseAxis]]


def _layers_of(spans: Iterable[Channel]) -> list[_Layer]:
    """Return each axis of a layer once: of a recurrent layer every weight has a span."""
    found: dict[tuple[object, ...], _Layer] = {}
    for span in spans:
        parts = parameter_axes(span)
        places = tuple((name, dim) for name, (dim, _) in parts.items())
        if parts:  # a norm may have statistics alone
            found.setdefault((id(span.module), places, span.start, span.end), _Layer(span, parts))
    return list(found.values())


class GradientObserver(MeansObserver):
    """Means of a function of `first` and `second` of every layer, over the steps of the optimizers.

    Gradients are those of the loss: what an AMP scaler multiplied them by is divided out, accumulated batches and the
    ranks of DDP count as one, clipping comes later. Entries of removed channels have a gradient of 0, so what remains
    is scored by what is left of its own weights.
    """

    def __init__(
        self, importance: Importance, units: Iterable[MutableChannelUnit], function: Callable[..., Tensor]
    ) -> None:
        units = list(units)
        self._layers: dict[Row, _Layer] = {
            (unit.name, k): layer
            for unit in units
            for k, layer in enumerate(_layers_of(all_spans(unit, input_related=importance.input_related)))
        }
        self._without: set[int] = set()  # parameters that had no gradient when an optimizer used them
        super().__init__(importance, units, function)

    def _rows(self) -> list[Row]:
        bare = self.units.keys() - {unit for unit, _ in self._layers}
        if bare:
            raise PlanError(f"Got unit {min(bare)!r} without a weight to score; use importance 'random' or ignore= it.")
        return list(self._layers)

    def before_step(self, parameters: Collection[int], scale: LossScale) -> None:
        """Take the gradients of the layers whose parameters are all the optimizer's."""
        rows = {}
        for row, layer in self._layers.items():
            held = [layer.span.module._parameters[name] for name in layer.parts]
            blind = {id(p) for p in held if p is None or p.grad is None}
            self._without |= blind
            if not blind and all(id(p) in parameters for p in held):
                rows[row] = self._seen(row, layer, scale.factor)
        self._add(rows, scale)

    @torch.no_grad()
    def _seen(self, row: Row, layer: _Layer, factor: float) -> tuple[Tensor, Tensor]:
        """Return the criterion of one layer at this step, `[C]`, and 1 for each channel of it that remains."""
        unit, span = self.units[row[0]], layer.span
        sums = [self._sums(span, name, dim, axis, factor) for name, (dim, axis) in layer.parts.items()]
        first, second = (torch.stack(parts).sum(0)[span.start : span.end] for parts in zip(*sums, strict=True))
        (first, is_covered), (second, _) = (by_channel(span, values, unit.num_channels) for values in (first, second))
        score = self.function(first, second, **self.importance.arguments)
        weight = (is_covered & unit.mutable.current_mask.to(score.device)).to(score)
        return score * weight, weight

    @staticmethod
    def _sums(span: Channel, name: str, dim: int, axis: DenseAxis, factor: float) -> tuple[Tensor, Tensor]:
        """Return the sums of weight times gradient, and of its square, at each position of an axis, `[size]`."""
        parameter = span.module._parameters[name]
        assert parameter is not None
        assert parameter.grad is not None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        product = parameter.to(dtype) * (gradient.to(dtype) / factor)
        rows = product.movedim(dim, 0).reshape(product.shape[dim], -1)
        exact = exact_dtype(rows.device)
        return axis.spread(rows.sum(1, dtype=exact)), axis.spread(rows.square().sum(1, dtype=exact))

    def _covered(self, row: Row) -> Tensor:
        span = self._layers[row].span
        return by_channel(span, torch.zeros(span.num_channels), self.units[row[0]].num_channels)[1]

    def _missing(self, rows: Iterable[Row]) -> PlanError:
        held: dict[str, bool] = {}
        for layer in (self._layers[row] for row in rows):
            for name in layer.parts:
                parameter = layer.span.module._parameters[name]
                held[f"{layer.span.name}.{name}".lstrip(".")] = id(parameter) in self._without
        names = [name for name, without in held.items() if without] or list(held)
        return PlanError(
            f"Got no gradient for {listed(names)}; importance {self.importance.name!r} expects one for every parameter "
            "of the units. Are they frozen, unused, or stepped around Lightning's optimizers? Let them learn, keep "
            "their layers with ignore=, or use importance 'l1'."
        )
