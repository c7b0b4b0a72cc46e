"""`ChannelMeans`: what criteria that watch training add up, over batches and over ranks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ChannelMeans"]


class ChannelMeans(Metric):
    """Weighted means per channel of many rows at once: ``sum of weight * value / sum of weight``.

    Both states are sums, and are reduced over ranks by "sum": the mean is that of all the ranks' data, however many
    batches each of them saw. A channel that was never seen has weight 0.

    Args:
        sizes: Row -> its number of channels.

    Example:
        >>> means = ChannelMeans({"conv": 2})
        >>> means.update({"conv": (torch.tensor([1.0, 6.0]), torch.tensor([1.0, 2.0]))})
        >>> means.update({"conv": (torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))})
        >>> means.rows()["conv"]
        (tensor([1.5000, 3.0000], dtype=torch.float64), tensor([2., 2.], dtype=torch.float64))
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, sizes: Mapping[Any, int]) -> None:
        super().__init__(compute_with_cache=False)
        self._places: dict[Hashable, slice] = {}
        end = 0
        for row, size in sizes.items():
            self._places[row] = slice(end, end := end + size)
        for state in ("total", "weight"):
            self.add_state(state, torch.zeros(end, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, rows: Mapping[Any, tuple[Tensor, Tensor]]) -> None:
        """Add sums of values, each already times its weight.

        Args:
            rows: Row -> sums float `[C]`, and their weights `[C]`, on any device.
        """
        for row, (sums, weight) in rows.items():
            place = self._places[row]
            self.total[place] += sums.to(self.total)
            self.weight[place] += weight.to(self.weight)

    def compute(self) -> Tensor:
        """Return the means, 0 where nothing was seen, and the weights: float64 `[2, total number of channels]`."""
        return torch.stack([self.total / torch.where(self.weight == 0, 1.0, self.weight), self.weight])

    def rows(self) -> dict[Any, tuple[Tensor, Tensor]]:
        """Return row -> means and weights over all ranks, float64 `[C]` on the CPU; a collective call."""
        if not self.update_called:
            self.update({})  # nothing was seen here: torchmetrics would warn
        means, weights = self.compute().cpu()
        return {row: (means[place], weights[place]) for row, place in self._places.items()}

    def share(self) -> None:
        """Give every rank the mean of all ranks' sums: a later `rows` is the same, and any rank can save for all.

        A collective call.
        """
        self.sync()
        if not self._is_synced:
            return  # one process
        total, weight = self.total, self.weight
        self.unsync()
        ranks = torch.distributed.get_world_size()
        self.total, self.weight = total / ranks, weight / ranks
