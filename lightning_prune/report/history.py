"""What happened in a run, as plain data: how the structure changed, and what was measured between the changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_prune.errors import CheckpointError

__all__ = ["Change", "History", "Reading"]

VERSION = 1


@dataclass(frozen=True)
class Change:
    """The structure changed: the schedule fired, or a guard restored an earlier one.

    Args:
        epoch: When, counted from zero.
        step: Optimizer steps that were done before it.
        progress: Share of the way to the target that the schedule has come, in [0, 1]; 1 where a guard ends it.
        kept: Channels that remain of each unit, in the order of `History.units`.
        why: What was restored and why; empty where the schedule fired.
    """

    epoch: int
    step: int
    progress: float
    kept: list[int]
    why: str = ""


@dataclass(frozen=True)
class Reading:
    """Metrics at one moment.

    Args:
        epoch: When, counted from zero.
        step: Optimizer steps that were done before it.
        structure: How many changes came before it: 0 is the structure that the run began with.
        metrics: Name -> value; NaN where the training diverged.
    """

    epoch: int
    step: int
    structure: int
    metrics: dict[str, float]


@dataclass
class History:
    """What happened in a run.

    Args:
        units: Names of the units.
        changes: In order.
        readings: In order.
        is_whole: Whether the run was watched from the dense model on.
    """

    units: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    is_whole: bool = True

    def note_change(self, kept: Mapping[str, int], *, epoch: int, step: int, progress: float, why: str = "") -> None:
        """Take note that the structure has changed.

        Args:
            kept: Unit name -> channels that remain, always of the same units.
            epoch: See `Change`.
            step: See `Change`.
            progress: See `Change`.
            why: See `Change`.
        """
        self.units = list(kept)
        self.changes.append(Change(epoch, step, progress, list(kept.values()), why))

    def note_reading(self, metrics: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Take note of metrics; of several at one step the first value of a name counts.

        Args:
            metrics: Name -> value; nothing is noted where there are none.
            epoch: See `Reading`.
            step: See `Reading`.
        """
        last = self.readings[-1] if self.readings else None
        if last is not None and (last.step, last.structure) == (step, len(self.changes)):
            metrics = {**last.metrics, **{n: v for n, v in metrics.items() if n not in last.metrics}}
            self.readings.pop()
        if metrics:
            self.readings.append(Reading(epoch, step, len(self.changes), dict(metrics)))

    def of_structure(self, structure: int, name: str) -> list[float]:
        """Return the values of a metric under one structure, in order.

        Args:
            structure: How many changes came before; 0 is what the run began with.
            name: Of the metric.
        """
        return [r.metrics[name] for r in self.readings if r.structure == structure and name in r.metrics]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in the order in which they were first read."""
        return list(dict.fromkeys(name for reading in self.readings for name in reading.metrics))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `torch.load(weights_only=True)` reads; nothing before anything happened."""
        if not self.changes and not self.readings and self.is_whole:
            return {}
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> History:
        """Return the history that `to_dict` gave.

        Raises:
            CheckpointError: It was written by a newer version, or is damaged.
        """
        if not saved:
            return cls()
        if saved.get("version") != VERSION:
            raise CheckpointError(
                f"Got the report of a run in version {saved.get('version')!r}; this library reads {VERSION}. Upgrade "
                "lightning-prune, or remove 'report' from the state of PruningCallback."
            )
        try:
            changes = [Change(**change) for change in saved["changes"]]
            readings = [Reading(**reading) for reading in saved["readings"]]
            return cls(list(saved["units"]), changes, readings, bool(saved["is_whole"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"Got a damaged report of a run in a checkpoint ({error}). Remove 'report' from the state of "
                "PruningCallback, or resume from another checkpoint."
            ) from error
