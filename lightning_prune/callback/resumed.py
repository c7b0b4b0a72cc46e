"""What a resumed run may change: its schedule, and a target that shrinks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_prune.errors import ConfigError
from lightning_prune.schedule import ResolvedSchedule, Schedule
from lightning_prune.targets import Target

__all__ = ["LASTING", "check_resumed", "plain_arguments", "resolved_for"]

LASTING = (
    "importance", "scope", "ignore", "divisor", "min_ratio", "overrides", "submodule", "compact", "regrow", "per_cost"
)  # fmt: skip
"""The arguments of `PruningCallback` that a resumed run may not change, beside `recovery`.

Its objects must be the same, made with the same arguments, in the same order. That holds for those without a state as
well: with one more or one less of them the run would not end where the saved one would have ended.
"""

_WAY_OUT = (
    "A resumed run may change its schedule, and shrink its target. For anything else begin a new run with the weights: "
    "fit(load_pruned(path, Model)) without ckpt_path."
)


def resolved_for(trainer: Trainer, schedule: Schedule, *, verbose: bool) -> ResolvedSchedule:
    """Return a schedule in the epochs or steps of a run, and say if the run ends before it: another may go on.

    Args:
        trainer: Its `max_epochs` and `max_steps` are the length of the run.
        schedule: As it was asked for.
        verbose: Whether to say so.
    """
    resolved = schedule.resolve(trainer.max_epochs, trainer.max_steps)
    epochs = trainer.max_epochs
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        return replace(resolved, begin=0, end=1)  # such a run is to try everything
    if verbose and resolved.unit == "epoch" and epochs is not None and 0 <= epochs <= resolved.last:
        rank_zero_info(
            f"The pruning schedule fires last at epoch {resolved.last}, after the {epochs} of this run: its target is "
            "met when a longer one resumes it."
        )
    return resolved


def plain_arguments(target: Target, **others: Any) -> dict[str, Any]:
    """Return the arguments that decide what a run ends with, as data that a checkpoint can hold.

    Args:
        target: Checked.
        **others: Numbers and texts stay; of anything else its printed form counts, without addresses.
    """
    plain = {name: value if isinstance(value, int | float | str | None) else _text(value)
             for name, value in others.items()}  # fmt: skip
    return {"target": {"costs": dict(target.costs), "choices": dict(target.choices)}, **plain}


def _text(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def check_resumed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Compare the arguments of a saved run with those of the one that resumes it.

    Args:
        saved: What `plain_arguments` gave when the checkpoint was written; empty in files of before there was any.
        now: What it gives now.

    Returns:
        Whether the target is another, smaller one.

    Raises:
        ConfigError: Another argument differs, or the target grows or cannot be compared.

    Example:
        >>> check_resumed(plain_arguments(Target(costs={"macs": 0.5})), plain_arguments(Target(costs={"macs": 0.4})))
        True
    """
    for name, value in now.items():
        if name != "target" and name in saved and saved[name] != value:
            raise ConfigError(f"Got {name}={value!r} for a run that was saved with {name}={saved[name]!r}. {_WAY_OUT}")
    before, after = saved.get("target", now["target"]), now["target"]
    if before == after:
        return False
    if not (_at_most(before["costs"], after["costs"], more=True) and _at_most(before["choices"], after["choices"])):
        old, new = (target["costs"] or target["choices"] for target in (before, after))
        raise ConfigError(
            f"Got target={new} for a run that was saved with target={old}; expected the same costs or units, none "
            f"greater, each written in the same way (fraction or number). {_WAY_OUT}"
        )
    return True


def _at_most(before: Mapping[str, Any], after: Mapping[str, Any], *, more: bool = False) -> bool:
    """Whether every bound is there again, of the same type, and no greater; `more` of them may be, where some were."""
    if before.keys() != after.keys() and not (more and before and before.keys() < after.keys()):
        return False
    return all(type(after[key]) is type(value) and after[key] <= value for key, value in before.items())
