"""`sensitivity`: prune each unit alone, and look at a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.importance import Scorer, resolve_importance
from lightning_prune.importance.scorer import window_of
from lightning_prune.mutator import ChannelMutator
from lightning_prune.mutator.arguments import units_matching
from lightning_prune.ops import dynamic_ops, to_static_
from lightning_prune.plan import KeepPlan
from lightning_prune.sensitivity.table import SensitivityRow, SensitivityTable
from lightning_prune.sensitivity.untouched import untouched
from lightning_prune.units import MutableChannelUnit

__all__ = ["sensitivity"]

Metric = Callable[[], float]


def sensitivity(
    model: nn.Module,
    datamodule: Any = None,
    *,
    units: Sequence[str] | str | None = None,
    ratios: Sequence[float] = (0.75, 0.5, 0.25),
    monitor: str = "val_loss",
    mode: str = "min",
    importance: Scorer | Callable[..., Tensor] | Mapping[str, Any] | str = "l1",
    mutator: ChannelMutator | None = None,
    example_input: Any = None,
    trainer: Any = None,
    evaluate: Callable[[nn.Module, Any], float] | None = None,
) -> SensitivityTable:
    """Measure how much a metric suffers when each unit alone is pruned.

    The model runs with masks, there is no copy of it, and afterwards it is as it was, bit for bit: classes, masks,
    modes, BatchNorm statistics and whatever else its modules hold, and the random generators. Every run draws the same
    numbers.

    Args:
        model: A LightningModule; with `evaluate` any module.
        datamodule: What `Trainer.validate` takes: a LightningDataModule, dataloaders, or None for the model's own; with
            `evaluate` anything.
        units: Names or globs of those to prune; None is all.
        ratios: What remains of a unit, each in (0, 1]; a unit rounds it as it rounds any choice.
        monitor: Name of a metric that validation logs; with `evaluate` a name for what that returns.
        mode: "min" where lower is better, "max" where higher is.
        importance: Which channels go first; see `PruningCallback`. One that need not watch training.
        mutator: The mutator that the model was prepared with, for units that are pruned already or options of your own;
            one without a model prepares it for the time being.
        example_input: What to trace with; None is the model's `example_input_array`.
        trainer: Runs the validation; None is a quiet one on one device.
        evaluate: ``(model, datamodule) -> metric`` instead of a trainer; called in eval mode, without gradients.

    Returns:
        The table: print it, `plot()` it, or `save()` it for ``importance: {name: sensitivity, table: path}``.

    Raises:
        ConfigError: An argument that does not fit, or a `monitor` that validation does not log.
        TraceError: The model cannot be traced.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, sec. 3.2.
        We differ: a unit of coupled layers is pruned where the paper prunes one; the criterion and the metric are free.
    """
    wanted = _checked_ratios(ratios)
    if mode not in ("min", "max"):
        raise ConfigError(f"Got mode={mode!r}. {did_you_mean(mode, ('min', 'max'))}")
    scorer = resolve_importance(importance)
    if window_of(scorer):
        raise ConfigError(f"Got importance={importance!r}, which has to watch training; expected one of weights alone.")
    if evaluate is None:
        metric = _validation(model, datamodule, trainer, monitor)
    else:
        metric = _evaluation(model, datamodule, evaluate)
    with untouched(model), _prepared(model, mutator, example_input) as active:
        found = _units(active, units)
        scores, before = scorer.scores(active.units), active.current_plan().kept
        value_before, rows = _run(model, metric), []
        for unit in found:
            counts = tuple(unit.choice_to_count(ratio) for ratio in wanted)
            values = {}
            for count in dict.fromkeys(counts):
                best = scores[unit.name].argsort(descending=True, stable=True)[:count].sort().values
                active.apply(KeepPlan({**before, unit.name: tuple(best.tolist())}))
                values[count] = _run(model, metric)
            rows.append(SensitivityRow(unit.name, unit.num_channels, counts, tuple(values[n] for n in counts)))
    return SensitivityTable(monitor, mode, value_before, wanted, tuple(rows))


def _run(model: nn.Module, metric: Metric) -> float:
    """Return the metric; what running changes does not reach the next run."""
    with untouched(model):
        return metric()


def _checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Return the ratios, descending."""
    for ratio in ratios:
        if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise ConfigError(f"Got ratio {ratio!r} in ratios={ratios!r}; expected what remains of a unit, in (0, 1].")
    if not ratios:
        raise ConfigError("Got no ratios; expected some, such as (0.75, 0.5, 0.25).")
    return tuple(sorted({float(ratio) for ratio in ratios}, reverse=True))


@contextmanager
def _prepared(model: nn.Module, mutator: ChannelMutator | None, example_input: Any) -> Iterator[ChannelMutator]:
    """Yield the mutator of the model; masks, and the classes of a plain model, are as before afterwards."""
    was_plain = not dynamic_ops(model)
    example = getattr(model, "example_input_array", None) if example_input is None else example_input
    active = ChannelMutator(example_input=example) if mutator is None else mutator
    if active._model is None:
        active.prepare_from_supernet(model)
    elif active.model is not model:
        raise ConfigError(
            f"Got a mutator of another model, a {type(active.model).__name__}; expected that of this one."
        )
    before = active.current_plan()
    try:
        yield active
    finally:
        active.apply(before)
        if was_plain:
            to_static_(model)


def _units(mutator: ChannelMutator, patterns: Sequence[str] | str | None) -> list[MutableChannelUnit]:
    """Return the units that are asked for, in the order of the mutator."""
    globs = [patterns] if isinstance(patterns, str) else ["*"] if patterns is None else patterns
    names = {unit.name for glob in globs for unit in units_matching(mutator.units, glob)}
    found = [unit for unit in mutator.mutable_units if unit.name in names]
    if not found:
        raise ConfigError(f"Got units={patterns!r}, of which none can be pruned; see the mutator's report.")
    return found


def _evaluation(model: nn.Module, data: Any, evaluate: Callable[[nn.Module, Any], float]) -> Metric:
    """Return what calls a function of the user."""

    def metric() -> float:
        model.eval()
        with torch.no_grad():
            return float(evaluate(model, data))

    return metric


def _validation(model: nn.Module, data: Any, trainer: Any, monitor: str) -> Metric:
    """Return what validates with a Trainer and reads the metric."""
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    if not isinstance(model, LightningModule):
        raise ConfigError(
            f"Got a {type(model).__name__}, which is no LightningModule; expected one, or "
            "evaluate=(model, data) -> metric."
        )
    runner = trainer or Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    given = {"datamodule" if isinstance(data, LightningDataModule) else "dataloaders": data}

    def metric() -> float:
        runner.validate(model, verbose=False, **given)
        logged = runner.callback_metrics
        if monitor not in logged:
            raise ConfigError(f"Got monitor={monitor!r}, which validation did not log. {did_you_mean(monitor, logged)}")
        return float(logged[monitor])

    return metric
