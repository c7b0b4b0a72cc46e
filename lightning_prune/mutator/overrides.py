"""What a user says of single units or layers: a floor, a ceiling, a fixed choice, a divisor, or to leave them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.mutator.config import load_plain
from lightning_prune.plan import UnitLimits
from lightning_prune.units import MutableChannelUnit

__all__ = ["Override", "limits_of", "match_overrides", "parse_overrides"]

_KEYS = ("min", "max", "choice", "divisor", "ignore")
_EPSILON = 1e-9  # 0.29 * 100 is 28.999999999999996 in floats


@dataclass(frozen=True)
class Override:
    """What holds for the units that one glob matches, instead of what holds for all.

    Amounts are by value: up to 1 a ratio of the unit's channels (1 is all of them), above 1 a count.

    Args:
        pattern: The unit name or glob, for messages.
        min: What at least remains; instead of `min_ratio`.
        max: What at most remains.
        choice: What remains, whatever the target says.
        divisor: Kept counts are multiples of it, on any axis of any length.
        ignore: Whether everything remains.
    """

    pattern: str
    min: int | float | None = None
    max: int | float | None = None
    choice: int | float | None = None
    divisor: int | None = None
    ignore: bool = False


def parse_overrides(overrides: Any) -> dict[str, Override]:
    """Check overrides and bring them into one form.

    Args:
        overrides: Unit name or glob -> mapping of "min", "max", "choice", "divisor" and "ignore"; DictConfigs too; None
            for none. What is parsed already stays as it is.

    Returns:
        The same names and globs, in the same order.

    Raises:
        ConfigError: An unknown key, a value that does not fit, or entries that contradict one another.

    Example:
        >>> parse_overrides({"layer1*": {"min": 0.5}})["layer1*"].min
        0.5
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"Got overrides={overrides!r}; expected globs and mappings such as {{'layer1*': {{'min': 0.5}}}}."
        )
    return {pattern: _parsed(pattern, entry) for pattern, entry in load_plain(overrides).items()}


def _parsed(pattern: str, entry: Any) -> Override:
    """Check the entry of one glob."""
    if isinstance(entry, Override):
        return entry
    where = f"overrides[{pattern!r}]"
    if not isinstance(entry, Mapping) or not entry:
        raise ConfigError(f"Got {where}={entry!r}; expected a mapping with some of {', '.join(map(repr, _KEYS))}.")
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"Got key {key!r} in {where}. {did_you_mean(key, _KEYS)}")
    given = {key: _checked(key, value, f"{where}[{key!r}]") for key, value in entry.items() if value is not None}
    alone = next((key for key in ("ignore", "choice") if given.get(key)), None)
    others = [key for key in given if key not in (alone, "divisor") and given[key] is not False]
    if alone and others:
        raise ConfigError(f"Got {alone!r} together with {others[0]!r} in {where}; {alone!r} alone says what remains.")
    low, high = given.get("min"), given.get("max")
    if low is not None and high is not None and type(low) is type(high) and low > high:
        raise ConfigError(f"Got min={low} above max={high} in {where}; expected at most as much.")
    return Override(pattern, **given)


def _checked(key: str, value: Any, where: str) -> Any:
    """Return a bool for "ignore", a whole number for "divisor", else a ratio as float or a count as int."""
    if key == "ignore":
        if not isinstance(value, bool):
            raise ConfigError(f"Got {where}={value!r}; expected true or false.")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if key == "divisor":
        if not is_number or value < 1 or value != int(value):
            raise ConfigError(f"Got {where}={value!r}; expected a whole number of at least 1.")
        return int(value)
    if not is_number or value <= 0 or (value > 1 and value != int(value)):
        raise ConfigError(f"Got {where}={value!r}; expected a ratio in (0, 1] or a whole number of channels above 1.")
    return float(value) if value <= 1 else int(value)


def match_overrides(overrides: Mapping[str, Override], units: Sequence[MutableChannelUnit]) -> dict[str, Override]:
    """Return unit name -> its override.

    A glob matches a unit by its name, or by the name of a layer or parameter that makes its channels, or of a module
    that holds one. A full unit name goes before a glob; among globs the last one that matches counts.

    Raises:
        ConfigError: A glob that matches nothing.
    """
    names = {unit.name: _names_of(unit) for unit in units}
    exact, globbed = {}, {}
    for pattern, override in overrides.items():
        if pattern in names:
            exact[pattern] = override
            continue
        hits = [name for name, known in names.items() if any(fnmatchcase(one, pattern) for one in known)]
        if not hits:
            near = get_close_matches(pattern, sorted(set().union(*names.values())), n=3, cutoff=0.0)
            raise ConfigError(
                f"Got {pattern!r} in overrides, which matches none of {len(names)} units and no layer that makes "
                f"channels of one. The closest names: {', '.join(map(repr, near))}."
            )
        globbed.update(dict.fromkeys(hits, override))
    return {**globbed, **exact}


def _names_of(unit: MutableChannelUnit) -> set[str]:
    """Return what a glob may match: as `ignore`, layers by what they make."""
    found = {unit.name}
    for channel in unit.output_related:
        parts = f"{channel.name}.{channel.tensor}".split(".")
        found |= {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
    return found - {""}


def limits_of(unit: MutableChannelUnit, divisor: int, min_ratio: float, override: Override | None = None) -> UnitLimits:
    """Return what a plan may do with a unit (see `ChannelMutator.limits`).

    Args:
        unit: The unit; a fixed one stays at the count it has.
        divisor: Kept counts are multiples of it, on channel axes of at least twice as many channels.
        min_ratio: Floor of what remains, beside the unit's own.
        override: What holds for this unit instead.

    Raises:
        ConfigError: `divisor` or `min_ratio` is out of its range; the override leaves no count that the unit can have.
    """
    if divisor < 1 or not 0 <= min_ratio <= 1:
        raise ConfigError(
            f"Got divisor={divisor!r} and min_ratio={min_ratio!r}; expected a whole number of at least 1, and what at "
            "least remains of a unit, in [0, 1]."
        )
    size = unit.num_channels
    if not unit.is_mutable:
        count = unit.activated_channels
        return UnitLimits(unit.name, size, unit.kind, count, 1, count)
    own = override or Override("")
    applies = own.divisor is not None or (unit.axis == "channels" and size >= 2 * divisor)
    step = math.lcm(unit.divisor, own.divisor or divisor) if applies else unit.divisor
    if own.ignore:
        return UnitLimits(unit.name, size, unit.kind, size, step)
    if own.choice is not None:
        count = _rounded_down(own, "choice", unit, step)
        return UnitLimits(unit.name, size, unit.kind, count, step, goal=count)
    low = min_ratio * size if own.min is None else _channels(own, "min", unit)
    floor = max(unit.min_channels, math.ceil(low - _EPSILON))
    if own.max is None:
        return UnitLimits(unit.name, size, unit.kind, floor, step)
    goal = _rounded_down(own, "max", unit, step)
    if own.min is not None and min(-(-floor // step) * step, size) > goal:
        raise ConfigError(
            f"Got min={own.min} and max={own.max} in overrides[{own.pattern!r}], between which unit {unit.name!r} of "
            f"{size} channels in steps of {step} has no count. Move them apart, or set 'divisor' there."
        )
    return UnitLimits(unit.name, size, unit.kind, min(floor, goal), step, goal=goal)


def _channels(override: Override, key: str, unit: MutableChannelUnit) -> float:
    """Return how many of the unit's channels an amount stands for, not rounded."""
    amount: int | float = getattr(override, key)
    if isinstance(amount, float):
        return amount * unit.num_channels
    if amount > unit.num_channels:
        raise ConfigError(
            f"Got {key}={amount} in overrides[{override.pattern!r}] for unit {unit.name!r}, which has "
            f"{unit.num_channels} channels. Write a ratio in (0, 1], or a count up to {unit.num_channels}."
        )
    return amount


def _rounded_down(override: Override, key: str, unit: MutableChannelUnit, step: int) -> int:
    """Return the greatest count that a unit can have up to an amount."""
    wanted = math.floor(_channels(override, key, unit) + _EPSILON)
    count = wanted if wanted == unit.num_channels else wanted // step * step
    least = min(max(unit.min_channels, step), unit.num_channels)
    if count < least:
        raise ConfigError(
            f"Got {key}={getattr(override, key)} in overrides[{override.pattern!r}], which leaves {wanted} of "
            f"{unit.num_channels} channels of unit {unit.name!r}; it keeps at least {least}, in steps of {step}."
        )
    return count
