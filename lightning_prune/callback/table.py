"""What a person sees at the end: every unit before and after, and what it saves."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from lightning_prune.mutator import ChannelMutator

__all__ = ["COSTS", "metrics_of", "remaining", "shares_of", "summary_of"]

COSTS = ("macs", "params", "channels")


def remaining(mutator: ChannelMutator) -> dict[str, float]:
    """Return cost key -> what remains of the dense model, in (0, 1]."""
    cost, counts = mutator.graph.cost, mutator.counts()
    return {key: cost.measure(key, counts) / max(cost.measure(key, cost.full), 1) for key in COSTS}


def metrics_of(mutator: ChannelMutator) -> dict[str, float]:
    """Return what to log: name -> what remains, in (0, 1]."""
    return {f"pruning/{key}": share for key, share in remaining(mutator).items()}


def shares_of(mutator: ChannelMutator) -> str:
    """Return what remains in words."""
    return ", ".join(f"{key} {share:.1%}" for key, share in remaining(mutator).items())


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
