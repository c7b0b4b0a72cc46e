"""Latency as a target of a run: the table of its units, measured once, and what was measured of the last plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_prune.callback.ranks import from_rank_zero
from lightning_prune.callback.waiting import waiting
from lightning_prune.errors import ConfigError
from lightning_prune.graph import CostModel
from lightning_prune.latency import LatencyCosts, LatencyOutcome, LatencySettings, LatencyTable, build_table, meet
from lightning_prune.latency.meet import check_floor, within_reach
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan, UnitLimits
from lightning_prune.targets import Target
from lightning_prune.targets.parse import LATENCY_KEYS

__all__ = ["Timing"]

PlanFor = Callable[[Target, CostModel | LatencyCosts], KeepPlan]


class Timing:
    """What a run knows of latency; nothing where nothing asks for it.

    Args:
        settings: How to measure; None takes the defaults.
        target: Of the run.
        per_cost: Of the run.

    Raises:
        ConfigError: There are settings, and nothing asks for a latency.
    """

    def __init__(self, settings: LatencySettings | None, target: Target, per_cost: str | None) -> None:
        self.is_target = any(key in LATENCY_KEYS for key in target.costs)
        self.is_needed = self.is_target or per_cost in LATENCY_KEYS
        if settings is not None and not self.is_needed:
            raise ConfigError(
                f"Got latency= with target={target}, which asks for none; expected a target such as {{'latency': 0.6}}."
            )
        self.settings = settings or LatencySettings()
        self.target = target
        self.table: LatencyTable | None = None
        self.measured: list[float] = []

    def forget(self) -> None:
        """Begin with another model."""
        self.table, self.measured = None, []

    def prepare(
        self, trainer: Trainer, mutator: ChannelMutator, limits: Sequence[UnitLimits], *, verbose: bool = False
    ) -> None:
        """Measure the table on rank 0, if there is none.

        Raises:
            PlanError: The target is below what was measured with every unit at its floor.
        """
        if self.table is None:
            timed = self.settings.measure_with(mutator.example_input)
            with waiting("Measuring latencies", shown=verbose and trainer.is_global_zero):
                self.table = from_rank_zero(trainer, lambda: build_table(mutator, limits, timed))
        if self.is_target:
            check_floor(self.target, LatencyCosts(mutator.graph.cost, self.table))

    def plan(
        self, plan_for: PlanFor, mutator: ChannelMutator, limits: Sequence[UnitLimits], *, is_last: bool
    ) -> tuple[KeepPlan, LatencyOutcome | None]:
        """Plan by the table; the last plan of a run is measured and corrected too.

        Args:
            plan_for: Makes a plan for a target by costs.
            mutator: Its model is copied, not touched.
            limits: Those of `plan_for`.
            is_last: Whether the target itself is to be met.
        """
        if self.table is None:
            return plan_for(self.target, mutator.graph.cost), None
        costs = LatencyCosts(mutator.graph.cost, self.table)
        if not self.is_target:
            return plan_for(self.target, costs), None
        if not is_last:
            return plan_for(within_reach(self.target, limits, costs), costs), None
        timed = self.settings.measure_with(mutator.example_input)
        outcome = meet(self.target, plan_for, mutator, limits, costs, timed, self.settings.corrections)
        return outcome.plan, outcome

    def note(self, outcome: LatencyOutcome | None) -> None:
        """Remember what was measured of the plan that is in force, if it was."""
        if outcome is not None:
            self.measured = [1.0] * 3 if outcome.chosen is None else list(outcome.chosen.measured)

    def metrics(self) -> dict[str, float]:
        """Return what to log: the measured latency relative to the dense model, once there is one."""
        return {"pruning/latency": self.measured[0]} if self.measured else {}

    def _how(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in ("backend", "device", "batch_size", "threads")}

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: the table, how it was measured, and the latency of the last plan."""
        if self.table is None:
            return {}
        return {"table": self.table.to_dict(), "how": self._how(), "measured": list(self.measured)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on with the table of a saved run, so that its plans are the same; not if it was measured otherwise.

        Raises:
            CheckpointError: The table is damaged.
        """
        self.forget()
        if self.is_needed and saved.get("how") == self._how():
            self.table, self.measured = LatencyTable.from_dict(saved.get("table", {})), list(saved.get("measured", ()))
