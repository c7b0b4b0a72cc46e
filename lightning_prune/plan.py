"""Frozen data that the rooms hand to one another: limits of a unit, a plan of kept channels, and reports."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_prune.errors import PlanError

__all__ = ["KeepPlan", "StructureReport", "UnitLimits", "UnitRow"]

_COSTS = ("current", "dense", "minimum", "maximum")  # what a report says of each cost


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
        goal: Most channels that may remain once the target is met, in [floor, C]; a goal at the floor is a fixed count.
            On the way to the target see `at`.
    """

    name: str
    num_channels: int
    kind: str
    floor: int = 1
    divisor: int = 1
    ceiling: int | None = None
    goal: int | None = None

    def at(self, progress: float) -> UnitLimits:
        """Return the limits on the way to the target, without a goal: its share of the way is a ceiling.

        Args:
            progress: How far to go from dense to the goal, in [0, 1].

        Example:
            >>> limit = UnitLimits("conv", 32, "k", floor=16, divisor=8, goal=16)
            >>> [limit.at(progress).allowed for progress in (0.0, 0.5, 1.0)]
            [(32,), (24,), (16,)]
        """
        if self.goal is None:
            return self
        most = math.floor(self.num_channels - progress * (self.num_channels - self.goal) + 1e-9)
        if most < self.num_channels:
            most = max(self.goal, most // self.divisor * self.divisor)
        ceiling = most if self.ceiling is None else min(most, self.ceiling)
        floor = ceiling if self.floor == self.goal else min(self.floor, ceiling)
        return replace(self, floor=floor, ceiling=ceiling, goal=None)

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


@dataclass(frozen=True)
class UnitRow:
    """One unit in a report.

    Args:
        name: Name of the unit.
        axis: "channels", "heads", "head_dim" or "groups".
        num_channels: Channels of the dense unit.
        kept: Channels that remain.
        layers: Layers that make or read the channels.
        macs_share: Share of the dense model's MACs that goes when the unit is cut to one channel, in [0, 1].
        remarks: "renormalizing", "rescaling".
    """

    name: str
    axis: str
    num_channels: int
    kept: int
    layers: tuple[str, ...]
    macs_share: float
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class StructureReport:
    """Every unit, and every axis that is frozen with the reason; `print` shows the table.

    Args:
        units: One row per unit.
        frozen: `(tensor, axis, positions, reason)`.
        costs: Cost key -> (current, dense, reachable minimum, reachable maximum), of the example input as it was given.
        notes: What a person should know.
        batch_size: Examples in that input. Targets are of one example.
    """

    units: tuple[UnitRow, ...]
    frozen: tuple[tuple[str, int, int, str], ...]
    costs: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    batch_size: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain containers, for JSON."""
        return {
            "units": [asdict(row) for row in self.units],
            "frozen": [dict(zip(("tensor", "axis", "size", "reason"), f, strict=True)) for f in self.frozen],
            "costs": {key: dict(zip(_COSTS, values, strict=True)) for key, values in self.costs.items()},
            "notes": list(self.notes),
            "batch_size": self.batch_size,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="Units", title_justify="left")
        for column in ("unit", "axis", "kept", "channels", "MACs share", "remarks"):
            table.add_column(
                column, overflow="fold", justify="left" if column in ("unit", "axis", "remarks") else "right"
            )
        for row in self.units:
            share, remarks = f"{row.macs_share:.1%}", ", ".join(row.remarks)
            table.add_row(row.name, row.axis, str(row.kept), str(row.num_channels), share, remarks)
        yield table
        batch = f" of a batch of {self.batch_size}" if self.batch_size > 1 else ""
        costs = Table(title=f"Costs{batch}", title_justify="left")
        for column in ("cost", "now", "dense", "reachable minimum", "reachable maximum"):
            costs.add_column(column, justify="left" if column == "cost" else "right")
        for key, values in self.costs.items():
            costs.add_row(key, *(f"{v:,}" for v in values))
        yield costs
        frozen = Table(title="Frozen axes", title_justify="left")
        for column in ("tensor", "axis", "positions", "reason"):
            frozen.add_column(column, overflow="fold")
        for tensor, dim, size, reason in self.frozen:
            frozen.add_row(tensor, str(dim), str(size), reason)
        yield frozen
        yield from self.notes

    def __str__(self) -> str:
        console = Console(width=140, file=io.StringIO(), force_terminal=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
