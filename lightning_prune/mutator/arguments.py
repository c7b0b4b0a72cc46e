"""Read the arguments of `ChannelMutator`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import ConfigError, PlanError, did_you_mean
from lightning_prune.graph.contents import named_tensors
from lightning_prune.mutator.config import load_plain
from lightning_prune.plan import KeepPlan
from lightning_prune.units import L1MutableChannelUnit, MutableChannelUnit, SequentialMutableChannelUnit

__all__ = [
    "check_model",
    "check_module",
    "check_plan",
    "check_unit_arguments",
    "make_unit",
    "parse_channel_unit",
    "split_input",
    "units_matching",
]

UNIT_TYPES: dict[str, type[MutableChannelUnit]] = {
    t.__name__: t for t in (MutableChannelUnit, L1MutableChannelUnit, SequentialMutableChannelUnit)
}


def parse_channel_unit(channel_unit: Any) -> tuple[type[MutableChannelUnit], dict[str, Any], dict[str, Any]]:
    """Return the class of the units, the arguments of all of them, and the entries of some by name.

    Raises:
        ConfigError: An unknown name, class or key.
    """
    arguments: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    if isinstance(channel_unit, Mapping):
        plain = load_plain(channel_unit)
        unknown = sorted(plain.keys() - {"type", "default_args", "units"})
        if unknown:
            raise ConfigError(
                f"Got channel_unit with {unknown}. {did_you_mean(unknown[0], ('type', 'default_args', 'units'))}"
            )
        arguments, entries = dict(plain.get("default_args") or {}), dict(plain.get("units") or {})
        channel_unit = plain.get("type", L1MutableChannelUnit)
    if isinstance(channel_unit, str):
        if channel_unit not in UNIT_TYPES:
            raise ConfigError(f"Got channel_unit {channel_unit!r}. {did_you_mean(channel_unit, UNIT_TYPES)}")
        channel_unit = UNIT_TYPES[channel_unit]
    if not (isinstance(channel_unit, type) and issubclass(channel_unit, MutableChannelUnit)):
        raise ConfigError(
            f"Got channel_unit={channel_unit!r}; expected a MutableChannelUnit class, its name or a mapping."
        )
    check_unit_arguments(channel_unit, arguments)
    return channel_unit, arguments, entries


def make_unit(
    unit_type: type[MutableChannelUnit],
    defaults: Mapping[str, Any],
    entries: Mapping[str, Any],
    num_channels: int,
    name: str,
) -> MutableChannelUnit:
    """Return a unit with the arguments of its entry: that of its name, else of the last glob that matches.

    Args:
        unit_type: Its class.
        defaults: Arguments of all units.
        entries: Unit name or glob -> choice, or mapping with "init_args".
        num_channels: Its size.
        name: Its name.

    Raises:
        ConfigError: An argument that the class does not have, or another size.
    """
    globbed = [entry for pattern, entry in entries.items() if fnmatchcase(name, pattern)]
    entry = entries.get(name, globbed[-1] if globbed else None)
    arguments = dict(entry.get("init_args") or {}) if isinstance(entry, Mapping) else {}
    size = arguments.pop("num_channels", num_channels)
    if size != num_channels:
        raise ConfigError(f"Got num_channels={size} for unit {name!r}, which has {num_channels}.")
    check_unit_arguments(unit_type, arguments)
    unit = unit_type(num_channels, **{**defaults, **arguments})
    unit.name = name
    return unit


def check_unit_arguments(unit_type: type[MutableChannelUnit], arguments: Mapping[str, Any]) -> None:
    """Check the names of constructor arguments.

    Raises:
        ConfigError: The class has no such argument.
    """
    valid = [name for name in inspect.signature(unit_type).parameters if name != "num_channels"]
    for name in arguments:
        if name not in valid:
            raise ConfigError(f"Got argument {name!r} for {unit_type.__name__}. {did_you_mean(name, valid)}")


def check_module(model: Any, purpose: str) -> None:
    """Check that a model is one.

    Args:
        model: What was given for it.
        purpose: What it is for, such as "to export".

    Raises:
        ConfigError: It is a class, or something else.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise ConfigError(f"Got the class {model.__name__} {purpose}; expected a module: {model.__name__}(...).")
    raise ConfigError(f"Got {model!r:.80} of type {type(model).__name__} {purpose}; expected a torch.nn.Module.")


def check_model(model: nn.Module) -> None:
    """Check that a model is a module with parameters, and that they have sizes.

    Raises:
        ConfigError: It is none, it has none, or some are lazy: made by the first forward.
    """
    check_module(model, "to prune")
    lazy = [name for name, tensor in named_tensors(model).items() if is_lazy(tensor)]
    if lazy:
        more = f" and {len(lazy) - 3} more" if len(lazy) > 3 else ""
        raise ConfigError(
            f"Got lazy parameters without sizes: {', '.join(lazy[:3])}{more}. Initialise them first: run the model "
            "once on an example input, `model(example_input)`."
        )
    if next(model.parameters(), None) is None:
        raise ConfigError(f"Got {type(model).__name__} without a parameter; expected a model with channels to prune.")


def split_input(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of an example input: a tensor, a tuple or a mapping."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input), {}) if isinstance(example_input, (tuple, list)) else ((example_input,), {})


def check_plan(plan: KeepPlan, sizes: Mapping[str, int]) -> None:
    """Check that a plan speaks of the units and channels that there are.

    Args:
        plan: The plan.
        sizes: Unit name -> channels.

    Raises:
        PlanError: It names an unknown unit or channel.
    """
    for name, indices in plan.kept.items():
        if name not in sizes:
            raise PlanError(f"Got a plan for unit {name!r}. {did_you_mean(name, sizes)}")
        if indices[-1] >= sizes[name]:
            raise PlanError(f"Got channel {indices[-1]} to keep for unit {name!r} of {sizes[name]} channels.")


def units_matching(units: Sequence[MutableChannelUnit], pattern: str) -> list[MutableChannelUnit]:
    """Return the unit of that name, else those whose name matches the glob.

    Raises:
        ConfigError: There is none.
    """
    exact = [unit for unit in units if unit.name == pattern]
    found = exact or [unit for unit in units if fnmatchcase(unit.name, pattern)]
    if not found:
        raise ConfigError(f"Got unit {pattern!r}, which matches none. {did_you_mean(pattern, [u.name for u in units])}")
    return found
