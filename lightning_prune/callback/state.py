"""How far a run is: what a checkpoint carries for the callback, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from lightning_prune.callback.gone import alive_now
from lightning_prune.errors import CheckpointError
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops.removed import removed_entries
from lightning_prune.schedule import ResolvedSchedule

__all__ = ["RunState"]

VERSION = 1


@dataclass
class RunState:
    """How far a run is.

    Args:
        progress: Share of the way from dense to target, in [0, 1].
        last: Epoch or step of the last firing; -1 before the first.
        unit: What `last` counts, "epoch" or "step".
        kept: Unit name -> Int64 indices of the channels that remain; empty before the first firing.
        removed: Parameter name -> the values of its removed entries when they were removed.
        gone: Unit name -> bool `[C]`, False where a channel was removed before this run, for good.
    """

    progress: float = 0.0
    last: int = -1
    unit: str = "epoch"
    kept: dict[str, Tensor] = field(default_factory=dict)
    removed: dict[str, Tensor] = field(default_factory=dict)
    gone: dict[str, Tensor] = field(default_factory=dict)

    def count_in(self, unit: str, now: int | None = None) -> None:
        """Count in `unit`; forget the last firing if it was counted otherwise, or lies after `now`: a new run began."""
        if unit != self.unit or (now is not None and self.last >= now):
            self.unit, self.last = unit, -1

    @property
    def is_done(self) -> bool:
        """Whether the target is met."""
        return self.progress >= 1.0

    def is_due(self, schedule: ResolvedSchedule, time: int) -> bool:
        """Return whether a firing is due that has not happened: at its time, or at the first chance after it."""
        latest = None if self.is_done else schedule.latest(time)
        if latest is None:
            return False
        return latest > self.last or time > schedule.last  # a schedule that changed may be over already

    def fired(self, unit: str, time: int, progress: float, mutator: ChannelMutator) -> None:
        """Take note of a firing that has just happened."""
        self.unit, self.last, self.progress = unit, time, progress
        self.kept = {u.name: u.mutable.current_mask.nonzero().flatten() for u in mutator.units}
        self.removed = removed_entries(mutator.model)

    def end(self, mutator: ChannelMutator) -> None:
        """Take what remains for the target: no firing follows."""
        self.fired(self.unit, self.last, 1.0, mutator)
        self.removed = {}

    def reopen(self, mutator: ChannelMutator) -> None:
        """Begin again on the way to a smaller target; what left the tensors already has no values to come back with."""
        if not self.removed:
            self.gone = alive_now(mutator)
        self.progress, self.last = 0.0, -1

    def counts(self) -> dict[str, float | int]:
        """Return unit name -> how many channels remain."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def marks(self) -> dict[str, Any]:
        """Return the numbers alone."""
        return {"progress": self.progress, "last": self.last, "unit": self.unit}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `torch.load(weights_only=True)` reads; nothing before the first firing."""
        if not self.kept and not self.gone:
            return {}
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> RunState:
        """Return the state that `to_dict` gave.

        Raises:
            CheckpointError: It was written by a newer version, or is damaged.
        """
        names = [f.name for f in fields(cls)]
        version = saved.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise CheckpointError(
                f"Got the state of PruningCallback in version {version!r}; this library reads up to {VERSION}. Upgrade "
                "lightning-prune."
            )
        missing = [name for name in names if name not in saved]
        if missing:
            raise CheckpointError(f"Got a state of PruningCallback without {missing}; the checkpoint is damaged.")
        return cls(**{name: saved[name] for name in names})

    def choose_in(self, mutator: ChannelMutator) -> None:
        """Give the units of a mutator the masks of this state.

        Raises:
            CheckpointError: They are other units.
        """
        units = {unit.name: unit for unit in mutator.units}
        sizes = {name: int(kept[-1]) for name, kept in self.kept.items()}
        other = sorted(units.keys() ^ sizes.keys()) if self.kept else []
        if other or any(last >= units[name].num_channels for name, last in sizes.items()):
            what = f"the first difference is {other[0]!r}" if other else "their sizes differ"
            raise CheckpointError(
                f"Got a checkpoint with other units than this model has: {what}. Use the ignore, submodule and mutator "
                "of the run that wrote it."
            )
        for name, kept in self.kept.items():
            units[name].keep(kept.tolist())
