"""The structure of a model as plain data: written by `config_template`, read by `from_config` without a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]  # PyYAML, which OmegaConf reads with, ships no types

from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannelContainer
from lightning_prune.ops import DynamicOp, convert_, dynamic_ops
from lightning_prune.units import MutableChannelUnit

__all__ = [
    "check_fingerprint",
    "entries_of",
    "fingerprint",
    "has_channels",
    "load_plain",
    "spans_of",
    "wire_from_config_",
]


def load_plain(config: Any) -> dict[str, Any]:
    """Return a config as plain containers.

    Args:
        config: Mapping, DictConfig, or path to a YAML file.

    Raises:
        ConfigError: The file is missing or no mapping.
    """
    if isinstance(config, (DictConfig, ListConfig)):
        config = OmegaConf.to_container(config, resolve=True)
    elif not isinstance(config, Mapping):
        try:
            config = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
        except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"Got structure file {str(config)!r} that cannot be read: {error}.") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"Got a structure of type {type(config).__name__}; expected a mapping of units.")
    return {str(key): value for key, value in config.items()}


def has_channels(config: Mapping[str, Any] | None) -> bool:
    """Return whether a structure carries its wiring, so that it needs no trace."""
    if config is None or "integers" not in config:
        return False
    entries = config["channel_unit"].get("units") or {}
    return all(isinstance(entry, Mapping) and entry.get("channels") for entry in entries.values())


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return `parameter name -> dense shape`, for example `{"conv.weight": "8x3x3x3"}`."""
    return {name: "x".join(map(str, p.shape)) or "scalar" for name, p in model.named_parameters()}


def check_fingerprint(expected: Mapping[str, str], model: nn.Module) -> None:
    """Check that a config was made for a model of these parameters.

    Raises:
        ConfigError: It was not; names the first difference.
    """
    found = fingerprint(model)
    for name in dict.fromkeys([*expected, *found]):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"Got a structure made for another model: parameter {name!r} is {expected.get(name, 'absent')} in the "
                f"structure and {found.get(name, 'absent')} in the model."
            )


def spans_of(model: nn.Module, units: Mapping[str, MutableChannelUnit]) -> dict[str, Any]:
    """Return the wiring of a model: per unit the spans of layers, and the integers that follow."""
    owners = {id(unit.mutable): name for name, unit in units.items()}
    members: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {"output_related": [], "input_related": []} for name in units
    }
    roles = dict.fromkeys(
        (name, c.name, c.tensor, c.dim, related)
        for name, unit in units.items()
        for related in ("output_related", "input_related")
        for c in getattr(unit, related)
    )
    integers = []
    for layer, op in dynamic_ops(model).items():
        for attr, container in op.mutable_attrs.items():
            for entry, name in _entries(container, owners):
                sides = [r for n, lay, t, d, r in roles if n == name and lay == layer and _is(op, attr, t, d)]
                for side in dict.fromkeys(sides or ["input_related"]):
                    item = {"name": layer, "attribute": attr, **entry, "is_output_channel": side == "output_related"}
                    if not sides:  # the mask of the axis needs it, but the layer is in the unit by another axis
                        item["is_member"] = False
                    members[name][side].append(item)
        own = {id(c) for c in op.mutable_attrs.values()}
        for attr, parts in op._dynamic.follows.items():
            for element, container in parts.items():
                if id(container) not in own:
                    spans = [{"unit": name, **entry} for entry, name in _entries(container, owners)]
                    integers.append(
                        {
                            "module": layer,
                            "attribute": attr,
                            "element": element,
                            "size": container.num_channels,
                            "spans": spans,
                        }
                    )
    return {"members": members, "integers": integers}


def _is(op: DynamicOp, attr: str, tensor: str, dim: int) -> bool:
    axes = op.tensor_axes.get(tensor, ())
    return dim < len(axes) and axes[dim] in (attr, f"{attr}_per_group")


def _entries(container: MutableChannelContainer, owners: Mapping[int, str]) -> list[tuple[dict[str, Any], str]]:
    found = []
    for span in container.spans:
        entry: dict[str, Any] = {"start": span.start, "end": span.end}
        if span.index is not None:
            entry["index"] = span.index.tolist()
        found.append((entry, owners[id(span.mutable)]))
    return found


def wire_from_config_(
    model: nn.Module, config: Mapping[str, Any], units: Mapping[str, MutableChannelUnit], ops: Any
) -> dict[tuple[str, str, str], tuple[bool, bool]]:
    """Convert and wire a model from its written structure; no trace.

    Args:
        model: A plain model that matches the fingerprint.
        config: The written structure.
        units: Unit name -> unit.
        ops: Dynamic ops of the user.

    Returns:
        `(layer, attribute, unit) -> (makes, reads)`.

    Raises:
        ConfigError: A layer or attribute that the structure names is missing.
    """
    modules = dict(model.named_modules())
    written = config["channel_unit"]["units"]
    integers = config.get("integers") or []
    touched = {m["name"] for u in written.values() for r in (u["channels"] or {}).values() for m in r}
    touched |= {i["module"] for i in integers}
    missing = sorted(touched - modules.keys())
    if missing:
        raise ConfigError(f"Got a structure with layers {missing} that the model does not have.")
    for name, module in list(model.named_modules()):
        convert_(module, ops, generic=name in touched)
    roles: dict[tuple[str, str, str], tuple[bool, bool]] = {}
    for unit, entry in written.items():
        for related, members in entry["channels"].items():
            for item in members:
                key = (item["name"], item["attribute"], unit)
                makes, reads = roles.get(key, (False, False))
                if not (makes or reads) or (related == "output_related") == makes:
                    _register(_container(modules[item["name"]], item["attribute"]), item, units[unit])
                if item.get("is_member", True):
                    roles[key] = (makes or related == "output_related", reads or related == "input_related")
    for item in integers:
        container = MutableChannelContainer(item["size"])
        for span in item["spans"]:
            _register(container, span, units[span["unit"]])
        op = modules[item["module"]]
        assert isinstance(op, DynamicOp), "every touched module was converted above"
        op.follow_integer(item["attribute"], container, item["element"])
    return roles


def _container(op: nn.Module, attribute: str) -> MutableChannelContainer:
    if not isinstance(op, DynamicOp):
        raise ConfigError(f"Got a structure for {type(op).__name__}, which cannot be converted.")
    if attribute not in op.mutable_attrs:
        tensor, _, dim = attribute.rpartition(".")
        return op.axis_container(tensor, int(dim))
    return op.get_mutable_attr(attribute)


def _register(container: MutableChannelContainer, item: Mapping[str, Any], unit: MutableChannelUnit) -> None:
    index = item.get("index")
    container.register_mutable(unit.mutable, item["start"], item["end"], None if index is None else torch.tensor(index))


def entries_of(
    units: Sequence[MutableChannelUnit], wires: Mapping[str, Any] | None, with_init_args: bool
) -> dict[str, dict[str, Any]]:
    """Return the entry of every unit in a structure file.

    Args:
        units: The units to write.
        wires: What `spans_of` returned, to add the wiring; None leaves it out.
        with_init_args: Add the constructor arguments; the wiring always comes with them.
    """
    entries = {}
    for unit in units:
        entry = entries[unit.name] = unit.config_template(with_init_args or wires is not None)
        if wires is not None:
            entry.update(axis=unit.axis, kind=unit.kind, channels=wires["members"][unit.name])
    return entries
