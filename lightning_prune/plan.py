"""Frozen data that the rooms hand to one another: limits of a unit, and a plan of kept channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.errors import PlanError

__all__ = ["KeepPlan", "UnitLimits"]


@dataclass(frozen=True)
class UnitLimits:
    """What a plan may do with one unit.

    Args:
        name: Name of the unit.
        num_channels: C, the channels of the dense unit.
        kind: Units of the same kind are isomorphic (same shapes and layer types, layer numbers aside).
        floor: Fewest channels that may remain, in [1, C].
        divisor: The kept count is a multiple of it, or C.
        ceiling: Most channels that may remain, in [floor, C].
    """

    name: str
    num_channels: int
    kind: str
    floor: int = 1
    divisor: int = 1
    ceiling: int | None = None

    @property
    def allowed(self) -> tuple[int, ...]:
        """Every allowed count of kept channels, ascending.

        Example:
            >>> UnitLimits("conv", 20, "k", floor=3, divisor=8).allowed
            (8, 16, 20)
        """
        top = self.num_channels if self.ceiling is None else self.ceiling
        low = max(1, self.floor)
        counts = {n for n in range(self.divisor, top + 1, self.divisor) if n >= low}
        if top == self.num_channels or not counts:
            counts.add(top)
        return tuple(sorted(counts))


@dataclass(frozen=True)
class KeepPlan:
    """The kept channels of every unit it names; units it does not name keep all.

    Args:
        kept: Unit name -> sorted indices of the channels that remain.
    """

    kept: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, indices in self.kept.items():
            if not indices:
                raise PlanError(f"Got no kept channel for unit {name!r}; at least one must remain.")
            if list(indices) != sorted(set(indices)) or indices[0] < 0:
                raise PlanError(f"Got kept={indices!r} for unit {name!r}; expected ascending indices without repeats.")

    def counts(self) -> dict[str, int]:
        """Return the number of kept channels per unit.

        Example:
            >>> KeepPlan({"conv1": (0, 2)}).counts()
            {'conv1': 2}
        """
        return {name: len(indices) for name, indices in self.kept.items()}
