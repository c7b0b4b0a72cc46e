"""What a checkpoint carries for `PruningCallback`: the state of the run, and what was seen on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_prune.callback.resumed import check_resumed
from lightning_prune.callback.state import RunState

if TYPE_CHECKING:
    from lightning_prune.callback.callback import PruningCallback

__all__ = ["carried_by", "go_on_"]

WATCHED, TIMED, ARGUMENTS, REPORT = BESIDE = "watched", "timed", "arguments", "report"
"""Beside the state of the run, where there is something."""


def carried_by(pruning: PruningCallback) -> dict[str, Any]:
    """Return plain data that `torch.load(weights_only=True)` reads."""
    beside = {
        WATCHED: pruning._collector.state_dict(),
        TIMED: pruning._timing.state_dict(),
        ARGUMENTS: pruning._arguments(),
        REPORT: pruning._reporting.remembered(),
    }
    return {**pruning._state.to_dict(), **{name: state for name, state in beside.items() if state}}


def go_on_(pruning: PruningCallback, carried: dict[str, Any]) -> None:
    """Make a callback go on from what `carried_by` returned.

    Args:
        pruning: After `setup`, where it has a model; the weights are loaded by now.
        carried: By a checkpoint.

    Raises:
        CheckpointError: It is damaged, of a newer version, or of another model.
        ConfigError: In `fit`, an argument differs from that of the saved run.
    """
    is_smaller = pruning._is_fitting and check_resumed(carried.get(ARGUMENTS, {}), pruning._arguments())
    saved = {name: value for name, value in carried.items() if name not in BESIDE}
    pruning._state = RunState.from_dict(saved) if saved else RunState()
    pruning._collector.load_state_dict(carried.get(WATCHED, {}))
    pruning._timing.load_state_dict(carried.get(TIMED, {}))
    pruning._reporting.load(carried.get(REPORT, {}), is_dense=not saved)
    if pruning._resolved is not None and pruning.mutator is not None:
        pruning._state.choose_in(pruning.mutator)
        pruning._state.count_in(pruning._resolved.unit)
        if is_smaller and pruning.is_done:
            pruning._state.reopen(pruning.mutator)
