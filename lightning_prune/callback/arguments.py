"""The checks of PruningCallback's arguments, once, at construction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from lightning_prune.callback.planner import FLOOR
from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.importance.scorer import Scorer, is_priced
from lightning_prune.recovery import Guard
from lightning_prune.targets import Target, parse_target
from lightning_prune.targets.parse import COST_KEYS, LATENCY_KEYS

__all__ = [
    "AUTO",
    "COMPACT",
    "check_own_mutator",
    "checked_divisor",
    "checked_globs",
    "checked_grace",
    "checked_name",
    "checked_price",
    "checked_ratio",
    "checked_target",
]

AUTO = "auto"
COMPACT = ("end", "each", "never")


def checked_name(argument: str, value: Any, valid: Iterable[str]) -> str:
    """Return a name if it is a valid one.

    Raises:
        ConfigError: It is not; suggests the nearest.
    """
    names = list(valid)
    if value not in names:
        raise ConfigError(f"Got {argument}={value!r} for PruningCallback. {did_you_mean(value, names)}")
    return str(value)


def checked_target(target: Any, recovery: Sequence[Any]) -> Target:
    """Return a target; for "auto" the floors of all units, where a guard stops on the way.

    Raises:
        ConfigError: It is none; or "auto", and there is no guard.
    """
    if target != AUTO:
        return parse_target(target)
    if not any(isinstance(part, Guard) for part in recovery):
        raise ConfigError(
            "Got target='auto' without a Guard; expected recovery=[Guard(monitor, ...)] to stop the pruning, or a "
            "target such as {'macs': 0.5}."
        )
    return FLOOR


def checked_price(value: Any, importance: Scorer, target: Target) -> str | None:
    """Return the cost that scores are divided by; for "auto" that of the target, where the importance is meant so.

    Raises:
        ConfigError: It is none.
    """
    if value is None:
        return None
    if checked_name("per_cost", value, (*COST_KEYS, AUTO)) != AUTO:
        return str(value)
    if not is_priced(importance) or not target.costs:
        return None
    return next((key for key in target.costs if key not in LATENCY_KEYS), "macs")


def checked_divisor(value: Any) -> int:
    """Return a whole number of at least 1.

    Raises:
        ConfigError: It is none.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
    if number < 1 or not number.is_integer():
        raise ConfigError(f"Got divisor={value!r} for PruningCallback; expected a whole number of at least 1.")
    return int(number)


def checked_ratio(value: Any) -> float:
    """Return a ratio in [0, 1].

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ConfigError(
            f"Got min_ratio={value!r} for PruningCallback; expected what at least remains of a unit, in [0, 1]."
        )
    return float(value)


def checked_grace(value: Any) -> int:
    """Return a number of epochs.

    Raises:
        ConfigError: It is no whole number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"Got grace_epochs={value!r} for PruningCallback; expected a whole number of at least 0.")
    return value


def checked_globs(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return globs as a tuple.

    Raises:
        ConfigError: One is no text.
    """
    globs = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(glob, str) for glob in globs):
        raise ConfigError(f"Got ignore={value!r} for PruningCallback; expected globs over module and parameter names.")
    return globs


def check_own_mutator(mutator: Any, **given: Any) -> None:
    """Check that a mutator of the user comes without what it has itself.

    Raises:
        ConfigError: Something of `given` is given beside it.
    """
    for name, value in given.items():
        if mutator is not None and value is not None:
            raise ConfigError(f"Got mutator= together with {name}=; give {name} to the ChannelMutator instead.")
