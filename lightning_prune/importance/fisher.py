"""Group Fisher information: how much the loss of each example depends on a channel, over all layers that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PlanError
from lightning_prune.importance.activation import ReadersObserver, input_of
from lightning_prune.importance.axes import Reader
from lightning_prune.importance.layers import exact_dtype
from lightning_prune.importance.observer import LossScale, Row, listed

if TYPE_CHECKING:
    from lightning_prune.importance.scorer import Importance
    from lightning_prune.units import MutableChannelUnit

__all__ = ["FisherObserver", "fisher"]


def fisher(gates: Tensor) -> Tensor:
    """Score by the squared gradient of a gate on the channel: ``mean over examples of (sum over readers of g) ** 2``.

    One gate multiplies the channel in every layer that reads it; its gradient in a reader is ``g = sum over places of
    x[c] * dL/dx[c]``, for the loss of one example. The paper's normalisation, by what a channel costs, is the argument
    `per_cost` of the callback: "macs" or "memory".

    Args:
        gates: Float `[N, C]`, gradients of the gate, of N examples.

    Returns:
        What is averaged over examples, `[N, C]`, >= 0, in squared units of the loss.

    Source: Liu et al., "Group Fisher Pruning for Practical Network Compression", 2021, arXiv:2108.00708.
        We differ: mean over examples instead of a sum. The first axis of what a layer is given counts as the examples,
        and the loss as their mean.
    """
    return gates.square()


class FisherObserver(ReadersObserver):
    """Means of the squared gradients of the gates, per unit.

    An input goes into its reader through an alias, on which a hook finds the gradient through that reader alone: the
    gradients that flow are the same, bit for bit.
    """

    options = ()

    def __init__(
        self, importance: Importance, units: Iterable[MutableChannelUnit], function: Callable[..., Tensor]
    ) -> None:
        self._gates: dict[str, list[Tensor]] = {}  # of the backward at work: unit -> [examples, C] of each reader
        super().__init__(importance, units, function)

    def _rows(self) -> list[Row]:
        return [(unit, 0) for unit in self.units]

    def attach(self) -> list[RemovableHandle]:
        """Hook into the readers for one batch."""
        self._gates.clear()
        return [module.register_forward_pre_hook(self._watch, with_kwargs=True) for module in self._by_module]

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = input_of(args, kwargs)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return None
        alias = values.view_as(values)
        alias.register_hook(partial(self._see, module, values.detach()))
        return ((alias, *args[1:]), kwargs) if args else ((), {**kwargs, "input": alias})

    @torch.no_grad()
    def _see(self, module: nn.Module, values: Tensor, gradient: Tensor) -> None:
        reader: Reader = self._readers[self._by_module[module][0]]
        dtype = torch.promote_types(values.dtype, torch.float32)  # a product of half precision may overflow
        product = (values.to(dtype) * gradient.to(dtype)).movedim(reader.dim, -1)
        gates = product.reshape(len(product) if product.dim() > 1 else 1, -1, product.shape[-1])
        gates = gates.sum(1, dtype=exact_dtype(gates.device))
        for row in self._by_module[module]:
            self._gates.setdefault(row[0], []).append(self._readers[row].per_channel(gates))

    def after_backward(self, scale: LossScale) -> None:
        """Square the gates of this backward, summed over the readers of each unit."""
        gates, self._gates = self._gates, {}
        if not gates:
            return
        examples = min(len(part) for parts in gates.values() for part in parts)
        rows = {}
        for name, parts in gates.items():
            total = torch.stack([self._per_example(name, part, examples) for part in parts]).sum(0)
            # the loss is a mean: of its examples' own losses each has the share 1 / examples
            squares = self.function(total * (examples / scale.factor)).sum(0)
            weight = self.units[name].mutable.current_mask.to(squares) * examples
            rows[name, 0] = squares, weight
        self._add(rows, scale)

    def _per_example(self, unit: str, part: Tensor, examples: int) -> Tensor:
        """Fold windows or patches, which a reader may have on its first axis behind the examples."""
        if len(part) % examples:
            raise PlanError(
                f"Got {len(part)} and {examples} entries on the first axes of layers that read unit {unit!r} and "
                "others; importance 'fisher' expects the examples of a batch there. Use 'taylor'."
            )
        return part.view(examples, -1, part.shape[-1]).sum(1)

    def _covered(self, row: Row) -> Tensor:
        readers = [reader.covered() for (unit, _), reader in self._readers.items() if unit == row[0]]
        return torch.stack(readers).any(0)

    def _missing(self, rows: Iterable[Row]) -> PlanError:
        units = {unit for unit, _ in rows}
        names = list(dict.fromkeys(reader.name for (unit, _), reader in self._readers.items() if unit in units))
        return PlanError(
            f"Got no gradient at the inputs of {listed(names)}; importance {self.importance.name!r} expects every unit "
            "to be read by a layer through which the loss flows back. Are they unused, or hidden inside a compiled or "
            "fused module? Keep what they read with ignore=, or use importance 'taylor' or 'l1'."
        )
