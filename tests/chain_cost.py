"""Costs of a chain of convolutions, worked out by hand, and random problems of planning on such chains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from lightning_prune.plan import UnitLimits


class ChainCost:
    """A chain of 1x1 convolutions 3 -> C0 -> C1 -> ... -> 10, each on a map of its own area."""

    def __init__(self, channels: Sequence[int], areas: Sequence[int] | None = None, batch_size: int = 1) -> None:
        self.names = tuple(f"conv{i}_(0, {c})_out_1_in_1" for i, c in enumerate(channels))
        self.full = np.array(channels, np.int64)
        self.areas = np.array(areas or [1] * (len(channels) + 1), np.int64)
        self.batch_size = batch_size

    def measure_many(self, key: str, counts: np.ndarray) -> np.ndarray:
        rows = len(counts)
        inputs = np.concatenate([np.full((rows, 1), 3), counts], 1)
        outputs = np.concatenate([counts, np.full((rows, 1), 10)], 1)
        return {
            "channels": counts.sum(1),
            "params": (inputs * outputs).sum(1),
            "macs": (inputs * outputs * self.areas).sum(1) * self.batch_size,
            "flops": (inputs * outputs * self.areas).sum(1) * self.batch_size * 2,
            "memory": (outputs * self.areas).sum(1) * self.batch_size * 4,
        }[key]

    def measure(self, key: str, counts: np.ndarray) -> int:
        return int(self.measure_many(key, np.asarray(counts)[None])[0])

    def of(self, plan: Any, key: str = "macs") -> int:
        return self.measure(
            key, np.array([plan.counts().get(n, c) for n, c in zip(self.names, self.full, strict=True)])
        )

    def limits(self, floor: int = 1, divisor: int = 1, kinds: Sequence[str] | None = None) -> list[UnitLimits]:
        kinds = kinds or [f"c{c}" for c in self.full]
        return [UnitLimits(n, int(c), k, floor, divisor) for n, c, k in zip(self.names, self.full, kinds, strict=True)]

    def scores(self, *rows: Sequence[float]) -> dict[str, torch.Tensor]:
        return {n: torch.tensor(row, dtype=torch.float32) for n, row in zip(self.names, rows, strict=True)}

    def random_scores(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(int(c), generator=generator) for n, c in zip(self.names, self.full, strict=True)}


@st.composite
def problems(draw: st.DrawFn, max_units: int = 5, max_channels: int = 40) -> tuple[ChainCost, list[UnitLimits], dict]:
    channels = draw(st.lists(st.integers(2, max_channels), min_size=1, max_size=max_units))
    areas = draw(st.lists(st.sampled_from([1, 4, 16, 49]), min_size=len(channels) + 1, max_size=len(channels) + 1))
    cost = ChainCost(channels, areas)
    limits = [
        UnitLimits(
            name,
            c,
            kind=f"c{c % 3}",
            floor=draw(st.integers(1, max(1, c // 2))),
            divisor=(divisor := draw(st.sampled_from([1, 2, 8]))) if c >= 16 else 1,
            ceiling=draw(st.sampled_from([None, None, max(c - 3, c // 2 + 1, divisor if c >= 16 else 1)])),
        )
        for name, c in zip(cost.names, channels, strict=True)
    ]
    # few distinct values, so that ties are common
    values = st.integers(0, draw(st.sampled_from([0, 3, 1000])))
    scores = {
        n: torch.tensor(draw(st.lists(values, min_size=c, max_size=c))).float()
        for n, c in zip(cost.names, channels, strict=True)
    }
    return cost, limits, scores


targets = st.fixed_dictionaries(
    {}, optional={k: st.floats(0.05, 1.0) for k in ("macs", "params", "channels", "memory")}
)


TWO = ChainCost([4, 8])
TWO_SCORES = TWO.scores([4, 1, 3, 2], [1, 8, 2, 7, 3, 6, 4, 5])
FIRST, SECOND = TWO.names
