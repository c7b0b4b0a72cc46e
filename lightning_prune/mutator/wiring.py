"""Wire a model to its graph: dynamic ops whose masks are tiled from the mutables of the units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.errors import ConfigError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.contents import named_tensors
from lightning_prune.graph.labels import IntArray
from lightning_prune.graph.memos import CONTAINERS
from lightning_prune.graph.snapshot import Absent
from lightning_prune.mutables import MutableChannelContainer
from lightning_prune.ops import DynamicOp, convert_, dynamic_ops
from lightning_prune.ops.caches import EMPTY, GONE, is_cache_entry, remember_caches_
from lightning_prune.units import Channel, MutableChannelUnit

__all__ = ["adopt_units", "convert_model_", "find_units", "members", "roles_of", "wire_"]

OpTable = Mapping[type[nn.Module], type[DynamicOp]]
Run = tuple[str, int, int, IntArray]  # unit, start, end, channel at each position


def convert_model_(model: nn.Module, graph: ChannelGraph, ops: OpTable | None) -> None:
    """Convert every layer that has a dynamic op, and any other module that owns a pruned tensor or integer."""
    touched = {p.layer for unit in graph.units for p in unit.places}
    touched |= {f.module for f in graph.followers if graph.spans(f.labels)}
    for name, module in model.named_modules():
        convert_(module, ops, generic=name in touched)


def wire_(model: nn.Module, graph: ChannelGraph, units: Mapping[str, MutableChannelUnit]) -> None:
    """Tile the mask of every axis from the mutables of its units, and let integers follow.

    Args:
        model: The converted model.
        graph: Its graph.
        units: Unit name -> unit.

    Raises:
        ConfigError: A module that had to be converted was not.
    """
    _remember_lazy_caches_(model, graph)
    modules = dict(model.named_modules())
    first = {id(tensor): name for name, tensor in named_tensors(model).items()}
    ops = {name: module for name, module in modules.items() if isinstance(module, DynamicOp)}
    for op in ops.values():
        wired: set[int] = set()
        for container, runs in _axis_runs(op, graph, first):
            if runs and id(container) not in wired:
                wired.add(id(container))
                register(container, runs, units)
    native = {(name, attr) for name, op in ops.items() for attr in op._integer_names()}
    for follower in graph.followers:
        module, runs = modules[follower.module], _runs(graph, follower.labels)
        if not runs:
            continue
        if not isinstance(module, DynamicOp):
            raise ConfigError(f"Got module {follower.module!r} of {type(module).__name__}, which cannot be converted.")
        if (follower.module, follower.attribute) in native:
            own = module.follower(follower.attribute, follower.element)
            if own is not None and not own.spans:  # of a layer without weights
                register(own, runs, units)
        else:
            container = MutableChannelContainer(len(follower.labels))
            register(container, runs, units)
            module.follow_integer(follower.attribute, container, follower.element)


def _runs(graph: ChannelGraph, axis: Any) -> list[Run]:
    return [(unit.name, start, end, index) for unit, start, end, index in graph.spans(axis)]


def _axis_runs(
    op: DynamicOp, graph: ChannelGraph, names: Mapping[int, str]
) -> Iterator[tuple[MutableChannelContainer, list[Run]]]:
    """Yield the container of every axis of a layer, and the runs of units along it."""
    for tensor, value in (*op._parameters.items(), *op._buffers.items()):
        axes = graph.axes.get(names.get(id(value), ""), ()) if value is not None else ()
        if axes and tensor == "weight" and isinstance(op, _ConvNd) and op.__dict__["groups"] > 1:
            yield _group_runs(op, graph, axes)
        for dim, axis in enumerate(axes):
            known = op.tensor_axes.get(tensor)
            attr = known[dim] if known else None
            runs = _runs(graph, axis)
            if runs and (attr is None or attr in op.mutable_attrs):
                yield op.axis_container(tensor, dim), runs


def _group_runs(op: DynamicOp, graph: ChannelGraph, axes: Sequence[Any]) -> tuple[MutableChannelContainer, list[Run]]:
    """Return the side of a grouped convolution that its weight counts per group, as groups x channels of a group."""
    groups = op.__dict__["groups"]
    side = "out_channels" if op.__dict__["transposed"] else "in_channels"
    inner = op.__dict__[side] // groups
    outer_axis = graph.space.split(axes[0], (groups, op._parameters["weight"].shape[0] // groups))[0]  # type: ignore[union-attr]
    runs = [(n, a * inner, b * inner, np.repeat(index, inner)) for n, a, b, index in _runs(graph, outer_axis)]
    for name, start, end, index in _runs(graph, axes[1]):
        runs += [(name, g * inner + start, g * inner + end, index) for g in range(groups)]
    return op.get_mutable_attr(side), runs


def register(container: MutableChannelContainer, runs: Sequence[Run], units: Mapping[str, MutableChannelUnit]) -> None:
    """Register runs on a container, cut where they overlap in part: a product axis has several per position."""
    edges = sorted({edge for _, start, end, _ in runs for edge in (start, end)})
    for name, start, end, index in runs:
        cuts = [start, *(e for e in edges if start < e < end), end]
        for a, b in pairwise(cuts):
            part = np.ascontiguousarray(index[a - start : b - start])
            mutable = units[name].mutable
            identity = b - a == mutable.num_channels and bool((part == np.arange(b - a)).all())
            container.register_mutable(mutable, a, b, None if identity else torch.from_numpy(part))


def roles_of(model: nn.Module, graph: ChannelGraph) -> dict[tuple[str, str, str], tuple[bool, bool]]:
    """Return `(layer, attribute, unit name) -> (makes, reads)` of the places that the units of a graph have.

    Args:
        model: The converted model.
        graph: Its graph.
    """
    modules = dict(model.named_modules())
    roles: dict[tuple[str, str, str], tuple[bool, bool]] = {}
    for unit, place in [(u, p) for u in graph.units for p in u.places]:
        op = modules[place.layer]
        if isinstance(op, DynamicOp):
            key = (place.layer, attribute_of(op, place.tensor.rpartition(".")[2], place.dim), unit.name)
            makes, reads = roles.get(key, (False, False))
            roles[key] = makes or place.is_output, reads or place.is_input
    return roles


def members(
    model: nn.Module, units: Mapping[str, MutableChannelUnit], role: Callable[[str, str, str], tuple[bool, bool]]
) -> None:
    """List on every unit the spans of the layers that make and read its channels, in model order.

    Args:
        model: The wired model.
        units: Unit name -> unit.
        role: `(layer, attribute, unit name) -> (makes, reads)`.
    """
    owners = {id(unit.mutable): name for name, unit in units.items()}
    for layer, op in dynamic_ops(model).items():
        for attr, container in op.mutable_attrs.items():
            for tensor, dim in _places(op, attr):
                held = op._parameters.get(tensor, op._buffers.get(tensor))
                size = held.shape[dim] if held is not None else container.num_channels
                for span in container.spans:
                    name = owners.get(id(span.mutable))
                    if name is None or span.end > size:  # counted per group: the first group speaks for all
                        continue
                    makes, reads = role(layer, attr, name)
                    place = (layer, op, tensor, dim, span.start, span.end)
                    if makes:
                        units[name].output_related.append(Channel(*place, True, span.index))
                    if reads:
                        units[name].input_related.append(Channel(*place, False, span.index))


def _places(op: DynamicOp, attr: str) -> list[tuple[str, int]]:
    """Return `(tensor, axis)` of the weights along an axis: a recurrent layer has several; of vectors the first."""
    found = [(tensor, dim) for tensor, axes in op.tensor_axes.items() for dim, a in enumerate(axes) if a == attr]
    wide = [place for place in found if len(op.tensor_axes[place[0]]) > 1]
    return wide or found[:1] or [("weight", 1)]


def find_units(model: nn.Module, make: Callable[[int], MutableChannelUnit]) -> list[MutableChannelUnit]:
    """Return the units of a model whose dynamic ops already share mutables, one per mutable.

    Args:
        model: A model that holds wired dynamic ops.
        make: Channels -> a new unit.
    """
    found: dict[int, MutableChannelUnit] = {}
    for op in dynamic_ops(model).values():
        for container in op.mutable_attrs.values():
            for span in container.spans:
                if id(span.mutable) not in found and span.mutable.num_channels > 1:
                    unit = found[id(span.mutable)] = make(span.mutable.num_channels)
                    unit.mutable = span.mutable
    return list(found.values())


def adopt_units(model: nn.Module, make: Callable[[int], MutableChannelUnit]) -> list[MutableChannelUnit]:
    """Return the units that the dynamic ops of a model already share, members listed; certified when they were made.

    Args:
        model: A model that holds wired dynamic ops.
        make: Channels -> a new unit.
    """
    units = find_units(model, make)
    by_name = {unit.mutable.name or f"unit {k}": unit for k, unit in enumerate(units)}
    ops = dynamic_ops(model)
    members(model, by_name, lambda layer, attr, name: sides_of(ops[layer], attr))
    for name, unit in by_name.items():
        if unit.mutable.name:
            unit.name = name
    return units


def attribute_of(op: DynamicOp, tensor: str, dim: int) -> str:
    """Return the attribute of an axis; channels counted per group belong to the whole channel axis."""
    axes = op.tensor_axes.get(tensor)
    attr = axes[dim] if axes else None
    return (attr or f"{tensor}.{dim}").removesuffix("_per_group")


def sides_of(op: DynamicOp, attr: str) -> tuple[bool, bool]:
    """Return whether an axis of a layer is the one it makes, and the one it reads; a norm's is both."""
    own = op.mutable_attrs[attr]
    known = {*op.mutable_attrs, *op.aliases}
    makes, reads = (
        side in known and op.mutable_attrs.get(op.aliases.get(side, side)) is own
        for side in ("out_channels", "in_channels")
    )
    if not makes and not reads:  # an axis beside the two: the rows of a weight are made, its columns read
        dims = {dim for tensor, dim in _places(op, attr) if len(op.tensor_axes.get(tensor, ())) > 1}
        makes, reads = 0 in dims, 1 in dims
    return makes, reads


def _remember_lazy_caches_(model: nn.Module, graph: ChannelGraph) -> None:
    """Let a model know its lazy caches as a file can hold them: those that were empty, or held a number."""
    found: dict[str, Any] = {}
    for (module, name), value in graph.caches.items():
        before = GONE if value is Absent else EMPTY if isinstance(value, CONTAINERS) and not value else value
        if is_cache_entry(before):
            found[f"{module}.{name}" if module else name] = before
    remember_caches_(model, found)
