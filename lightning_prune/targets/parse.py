"""What a user writes as a target -> a checked, frozen `Target`. Targets say what remains, never what is removed."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # PyYAML, which OmegaConf reads with, ships no types

from lightning_prune.errors import ConfigError, did_you_mean

__all__ = ["COST_KEYS", "LATENCY_KEYS", "Amount", "Target", "parse_target"]

Amount = int | float
"""An int is absolute (a cost, or a count of channels); a float is a fraction in (0, 1]."""

LATENCY_KEYS = ("latency", "latency_ms")
COST_KEYS = ("channels", "params", "macs", "flops", "memory", *LATENCY_KEYS)

_SUFFIXES = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([KMGT]?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What must remain: upper bounds on costs, or a choice for units. Exactly one of the two is not empty.

    Args:
        costs: Key of `COST_KEYS` -> upper bound; several hold at once. Of "latency" it is a fraction of the dense
            model's, of "latency_ms" milliseconds, both floats.
        choices: Unit name or glob -> what each matching unit keeps. A full name goes before a glob; among globs the
            last one that matches counts; a unit that nothing matches keeps all.
    """

    costs: Mapping[str, Amount] = field(default_factory=dict)
    choices: Mapping[str, Amount] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(dict(self.costs or self.choices))


def parse_target(target: object) -> Target:
    """Check a target and bring it into one form.

    Args:
        target: A float in (0, 1]: the ratio of channels that every unit keeps. A mapping (DictConfig too) of cost keys
            ("channels", "params", "macs", "flops", "memory", "latency", "latency_ms") or of unit names or globs; or the
            path of a YAML file with such a mapping, or of the form of `ChannelMutator.config_template`. In a mapping a
            value up to 1 is a fraction (1 and 1.0 keep all), a greater one a whole number: a count of channels, or a
            cost, of one example where the cost depends on the input; "2G", "500M" and "1.5K" too. But "latency" is
            always a fraction, and "latency_ms" any number of milliseconds.

    Returns:
        The target; one that is parsed already is returned as is.

    Raises:
        ConfigError: A value that is not positive, not finite, neither a fraction nor whole, or a bool; an unknown key;
            cost keys and unit names in one mapping; an empty mapping; a file that is missing or not of this form.

    Example:
        >>> parse_target({"macs": "1.5K", "params": 0.5}).costs
        {'macs': 1500, 'params': 0.5}
        >>> parse_target(0.25).choices
        {'*': 0.25}
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, Mapping):
        return _from_mapping(_plain(target), "target")
    if isinstance(target, str | os.PathLike):
        return _from_file(Path(target))
    return Target(choices={"*": _ratio(target)})


def _ratio(target: object) -> float:
    """Return a bare number as the ratio that every unit keeps."""
    expected = "expected a ratio in (0, 1], a mapping of costs or of units, or the path of a YAML file"
    if isinstance(target, bool) or not isinstance(target, Real):
        raise ConfigError(f"Got target={target!r}; {expected}.")
    if isinstance(target, int) and target > 1:
        raise ConfigError(
            f"Got target={target!r}, a count for every unit; {expected}. Write {{'macs': {target}}} or "
            f"{{'params': {target}}} for a cost, {{unit name or glob: {target}}} for a count of channels."
        )
    if not 0 < float(target) <= 1:
        raise ConfigError(f"Got target={target!r}; {expected}. A target says what remains: 0.3 keeps 30 %.")
    return float(target)


def _plain(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a plain dict; interpolations of a DictConfig are resolved."""
    if not isinstance(mapping, DictConfig):
        return dict(mapping)
    try:
        plain = OmegaConf.to_container(mapping, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"Got a target that OmegaConf cannot resolve: {error}") from error
    assert isinstance(plain, dict), "a DictConfig holds a mapping"
    return dict(plain)


def _from_mapping(mapping: dict[Any, Any], where: str) -> Target:
    """Tell costs from unit choices and check every value."""
    if not mapping:
        raise ConfigError(f"Got an empty {where}; expected at least one cost or unit, such as {{'macs': 0.5}}.")
    if "channel_unit" in mapping:
        return Target(choices=_template_choices(mapping["channel_unit"], where))
    for key in mapping:
        _check_key(key, where)
    costs = [key for key in mapping if key in COST_KEYS]
    if costs and len(costs) < len(mapping):
        other = next(key for key in mapping if key not in COST_KEYS)
        raise ConfigError(
            f"Got costs and units in one {where}: {costs[0]!r} and {other!r}; expected either. "
            f"{did_you_mean(other, COST_KEYS)}"
        )
    if costs:
        return Target(costs={key: _cost(key, value, f"{where}[{key!r}]") for key, value in mapping.items()})
    return Target(choices={key: _unit_choice(value, {}, f"{where}[{key!r}]") for key, value in mapping.items()})


def _check_key(key: object, where: str) -> None:
    """Refuse what is not a name, or is a misspelt cost: no unit or glob looks like one."""
    if not isinstance(key, str) or not key:
        raise ConfigError(
            f"Got key {key!r} in {where}; expected one of {', '.join(COST_KEYS)}, or a unit name or glob."
        )
    if key not in COST_KEYS and key.isalpha() and get_close_matches(key, COST_KEYS, n=1):
        raise ConfigError(f"Got key {key!r} in {where}. {did_you_mean(key, COST_KEYS)} Or write a unit name or glob.")


def _cost(key: str, value: object, where: str) -> Amount:
    """Return the bound of one cost; those of latency are floats."""
    if key not in LATENCY_KEYS:
        return _amount(value, where)
    number, has_suffix = _number(value, where)
    if has_suffix or not 0 < number <= (1 if key == "latency" else sys.float_info.max):
        expected = "milliseconds, any number above 0" if key == "latency_ms" else "a fraction in (0, 1]"
        hint = "" if key == "latency_ms" else f" Write {{'latency_ms': {value}}} for milliseconds."
        raise ConfigError(f"Got {where}={value!r}; expected {expected}.{hint}")
    return float(number)


def _amount(value: object, where: str) -> Amount:
    """Return a fraction in (0, 1] as float, or a whole number as int."""
    number, is_absolute = _number(value, where)
    if not math.isfinite(number) or number <= 0:
        raise ConfigError(f"Got {where}={value!r}; expected a fraction in (0, 1] or a whole number above 1.")
    if number <= 1 and not is_absolute:
        return float(number)
    if number != int(number):
        raise ConfigError(
            f"Got {where}={value!r}; expected a fraction in (0, 1] or a whole number. A fraction says what remains: "
            "write 0.3 to keep 30 %."
        )
    return int(number)


def _number(value: object, where: str) -> tuple[Decimal | float, bool]:
    """Return the value of a number or a text, and whether a suffix says that it is absolute."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return (value if isinstance(value, int) else float(value)), False
    match = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"Got {where}={value!r}; expected a number, or a text such as '2G', '500M' or '1.5K'.")
    suffix = match[2].upper()
    return Decimal(match[1]) * 10 ** _SUFFIXES[suffix], bool(suffix)


def _template_choices(section: object, where: str) -> dict[str, Amount]:
    """Read `channel_unit: {default_args: {...}, units: {name: {choice, init_args}}}`."""
    if not isinstance(section, Mapping) or not isinstance(section.get("units"), Mapping) or not section["units"]:
        raise ConfigError(f"Got no 'units' in 'channel_unit' of {where}; expected {{name: {{'choice': value}}}}.")
    defaults = section.get("default_args") or {}
    units = section["units"].items()
    return {str(name): _unit_choice(entry, defaults, f"{where}[{name!r}]") for name, entry in units}


def _unit_choice(entry: object, defaults: Mapping[str, Any], where: str) -> Amount:
    """Return a unit's choice as a count or a ratio; in choice mode "bucket" a whole number k stands for k x divisor."""
    if not isinstance(entry, Mapping):
        return _amount(entry, where)
    if "choice" not in entry:
        raise ConfigError(f"Got no 'choice' for {where}; expected {{'choice': a ratio in (0, 1] or a count}}.")
    arguments = {**defaults, **(entry.get("init_args") or {})}
    amount = _amount(entry["choice"], f"{where}['choice']")
    if isinstance(amount, float) or arguments.get("choice_mode") != "bucket":
        return amount
    divisor = int(arguments.get("divisor", 1))
    # the last bucket of a unit may be smaller than the others
    return min(amount * divisor, int(arguments.get("num_channels", amount * divisor)))


def _from_file(path: Path) -> Target:
    """Read a target from a YAML file; JSON is YAML."""
    if not path.is_file():
        raise ConfigError(
            f"Got target={str(path)!r}, which is not a file; expected the path of a structure YAML, a ratio in (0, 1], "
            "or a mapping of costs or of units."
        )
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"Got target file {str(path)!r}, which is not readable as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"Got target file {str(path)!r} without a mapping; expected costs or units and their values.")
    return _from_mapping(_plain(content), f"target file {str(path)!r}")
