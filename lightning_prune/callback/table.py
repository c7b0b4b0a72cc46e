"""What a person sees at the end: every unit before and after, and what it saves."""

from __future__ import annotations

from functools import lru_cache

from lightning.pytorch.utilities import rank_zero_info
from rich.console import Group, RenderableType
from rich.table import Table

from lightning_prune.graph import CostModel
from lightning_prune.latency import LatencyOutcome
from lightning_prune.mutator import ChannelMutator

__all__ = ["COSTS", "announce", "metrics_of", "remaining", "summary_of"]

COSTS = ("macs", "params", "channels")


def remaining(mutator: ChannelMutator) -> dict[str, float]:
    """Return cost key -> what remains of the dense model, in (0, 1]."""
    return dict(_remaining(mutator.graph.cost, tuple(mutator.counts().tolist())))


@lru_cache(maxsize=1)  # asked every epoch, of the same structure in nearly all of them
def _remaining(cost: CostModel, counts: tuple[int, ...]) -> dict[str, float]:
    return {key: cost.measure(key, counts) / max(cost.measure(key, cost.full), 1) for key in COSTS}


def metrics_of(mutator: ChannelMutator) -> dict[str, float]:
    """Return what to log: name -> what remains, in (0, 1]."""
    return {f"pruning/{key}": share for key, share in remaining(mutator).items()}


def announce(when: str, mutator: ChannelMutator, outcome: LatencyOutcome | None) -> None:
    """Say on rank 0 what a firing left.

    Args:
        when: The epoch or step, in words.
        mutator: Its masks say what remains.
        outcome: What was measured of it, if a latency was asked for.
    """
    shares = ", ".join(f"{key} {share:.1%}" for key, share in remaining(mutator).items())
    rank_zero_info(f"Pruned at {when}: {shares} remain.")
    if outcome is not None:
        rank_zero_info(f"Latency: {outcome}.")


def summary_of(mutator: ChannelMutator) -> RenderableType:
    """Return a table of the units and one of the costs, before and after.

    Args:
        mutator: Its masks say what remains; its model may be small already.
    """
    units = Table("unit", "axis", "before", "after", title="Pruned units", title_justify="left")
    units.columns[0].overflow = "fold"
    for unit in mutator.units:
        units.add_row(unit.name, unit.axis, str(unit.num_channels), str(unit.activated_channels))
    costs = Table("cost", "before", "after", "remains", title="Costs", title_justify="left")
    model, counts = mutator.graph.cost, mutator.counts()
    for key, share in remaining(mutator).items():
        before, after = model.measure(key, model.full), model.measure(key, counts)
        if key == "macs":
            before, after = before // model.batch_size, after // model.batch_size
        costs.add_row(key, f"{before:,}", f"{after:,}", f"{share:.1%}")
    for table in (units, costs):
        for column in table.columns:
            column.justify = "left" if column.header in ("unit", "axis", "cost") else "right"
    return Group(units, costs)
