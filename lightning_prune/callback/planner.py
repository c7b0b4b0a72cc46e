"""From scores to a plan: the target of a run with the limits, scopes and costs that it is met under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.callback.gone import alive_now, capped, ranked_last
from lightning_prune.callback.timed import Timing
from lightning_prune.graph import CostModel
from lightning_prune.latency import LatencyCosts, LatencyOutcome
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan, UnitLimits
from lightning_prune.targets import Target, make_plan
from lightning_prune.targets.planning import reachable_range

__all__ = ["FLOOR", "Planner"]

FLOOR = Target(costs={"macs": 1e-12})
"""As small as the floors of all units allow."""


@dataclass(frozen=True)
class Planner:
    """Plans for one target; the arguments are those of `PruningCallback`, checked.

    Args:
        target: What remains.
        scope: How channels compete.
        divisor: Kept counts are multiples of it.
        min_ratio: What at least remains of each unit.
        regrow: Whether a removed channel may come back.
        per_cost: What scores are divided by, or None.
        timing: Knows latencies, where they are asked for.
    """

    target: Target
    scope: str
    divisor: int
    min_ratio: float
    regrow: bool
    per_cost: str | None
    timing: Timing

    def limits(self, mutator: ChannelMutator) -> list[UnitLimits]:
        """Return what a plan may do with each unit."""
        return mutator.limits(self.divisor, self.min_ratio)

    def plan(
        self,
        mutator: ChannelMutator,
        scores: Mapping[str, Tensor],
        gone: Mapping[str, Tensor],
        progress: float,
        *,
        is_last: bool,
    ) -> tuple[KeepPlan, LatencyOutcome | None]:
        """Plan the structure of a firing.

        Args:
            mutator: Its units, costs and masks of the moment; it is not changed.
            scores: Unit name -> float `[C]`, higher = keep.
            gone: Unit name -> bool `[C]`, False where a channel was removed before this run.
            progress: Share of the way to the target, in [0, 1].
            is_last: Whether the target itself is to be met.

        Raises:
            PlanError: The limits leave nothing that meets it.
        """
        lost = gone if self.regrow else alive_now(mutator)
        ranked, limits = ranked_last(scores, lost), capped(self.limits(mutator), lost)
        kept = {unit.name: unit.activated_channels for unit in mutator.units}

        def plan_for(target: Target, cost: CostModel | LatencyCosts) -> KeepPlan:
            wanted = _floor(limits, cost) if target == FLOOR else target
            return make_plan(
                wanted,
                ranked,
                limits,
                cost,
                scope=self.scope,
                progress=progress,
                per_cost=self.per_cost,
                kept=kept,
            )

        return self.timing.plan(plan_for, mutator, limits, is_last=is_last)

    def check_reachable(self, mutator: ChannelMutator, gone: Mapping[str, Tensor]) -> None:
        """Raise what the last firing would raise.

        Raises:
            PlanError: The limits leave nothing that meets the target.
        """
        zeros = {unit.name: torch.zeros(unit.num_channels) for unit in mutator.units}
        self.plan(mutator, zeros, gone, progress=1.0, is_last=False)


def _floor(limits: Sequence[UnitLimits], cost: CostModel | LatencyCosts) -> Target:
    """Return the target that every unit at its floor meets."""
    least, dense = reachable_range("macs", limits, cost)[0], cost.measure("macs", cost.full)
    return Target(costs={"macs": min(1.0, (least + 0.5) / dense)})
