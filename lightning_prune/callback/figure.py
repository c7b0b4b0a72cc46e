"""A picture of what remains of each unit, for the loggers that take figures."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lightning.pytorch import Trainer

from lightning_prune.mutator import ChannelMutator

__all__ = ["log_figure"]

NAME = "pruning/kept_channels"
TALLEST = 40.0  # inches


def log_figure(trainer: Trainer, mutator: ChannelMutator) -> None:
    """Give the kept and removed channels of each unit to TensorBoard, if it is there and matplotlib is.

    Args:
        trainer: Its loggers whose experiment has `add_figure` get the figure, on rank 0.
        mutator: Its masks say what remains.
    """
    experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    takers = [experiment for experiment in experiments if callable(getattr(experiment, "add_figure", None))]
    if not takers or not trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    for experiment in takers:
        experiment.add_figure(NAME, _draw(mutator), global_step=trainer.global_step)


def _draw(mutator: ChannelMutator) -> Any:
    from matplotlib.figure import Figure  # optional, and slow to import

    units = list(reversed(mutator.units))
    names, full = [unit.name for unit in units], [unit.num_channels for unit in units]
    figure = Figure(figsize=(8.0, min(1.0 + 0.25 * len(units), TALLEST)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, full, color="lightgray", label="dense")
    axes.barh(names, [unit.activated_channels for unit in units], label="kept")
    axes.set_xlabel("channels")
    axes.legend()
    return figure
