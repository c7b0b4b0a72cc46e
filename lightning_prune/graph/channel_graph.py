"""The result of the analysis, as frozen data: units, where they live, what follows them, what is frozen and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_prune.graph.closure import BoolArray, Closure, Strand
from lightning_prune.graph.cost import CostModel
from lightning_prune.graph.labels import Axis, IntArray, LabelSpace, is_labelled

__all__ = ["ChannelGraph", "Follower", "FrozenAxis", "Place", "Spans", "UnitSpec", "home_of", "unit_sets"]

# runs of an axis: (unit, start, end, channel of the unit at each position)
Spans = tuple[tuple["UnitSpec", int, int, IntArray], ...]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a unit lives on one axis of one layer.

    Args:
        layer: Qualified name of the module that owns the tensor.
        tensor: Qualified name of the parameter or buffer.
        dim: Axis of the tensor.
        positions: Int64 `[n]`, ascending positions along the axis that belong to the unit.
        channels: Int64 `[n]`, the unit's channel at each of them.
        is_output: The layer makes these channels.
        is_input: The layer reads these channels. A per-channel layer (norm, depthwise) does both.
    """

    layer: str
    tensor: str
    dim: int
    positions: IntArray
    channels: IntArray
    is_output: bool
    is_input: bool


@dataclass(frozen=True, eq=False)
class UnitSpec:
    """Channel axes that must keep the same channels.

    Args:
        name: `{first output layer}_({start}, {end})_out_{n}_in_{m}`, with the suffix of the axis.
        num_channels: C.
        axis: "channels", "heads", "head_dim" or "groups".
        kind: Equal for isomorphic units (same shapes and layer types, layer numbers aside).
        places: Every axis of every parameter and buffer that the unit runs through.
        classes: Int64 `[C]`, class of each channel in the closure.
        renormalizing: A mean, variance or norm runs over its channels, so that removing is not zeroing.
        rescaling: The scale of an attention derives from its length.
        divisor: Kept counts are multiples of it: a kernel takes no others.
    """

    name: str
    num_channels: int
    axis: str
    kind: str
    places: tuple[Place, ...]
    classes: IntArray
    renormalizing: bool = False
    rescaling: bool = False
    divisor: int = 1

    def layers(self, *, output: bool) -> list[Place]:
        """Return one place per layer and axis: the layers that make (or read) the channels, in model order."""
        chosen: dict[str, Place] = {}
        for place in self.places:
            if place.is_output if output else place.is_input:
                chosen.setdefault(home_of(place.layer), place)
        return list(chosen.values())


def home_of(layer: str) -> str:
    """Return the layer that a module is a part of: itself, or the layer whose weight a parametrisation makes.

    Example:
        >>> home_of("body.0.parametrizations.weight.0"), home_of("body.0")
        ('body.0', 'body.0')
    """
    return re.sub(r"(^|\.)parametrizations\..*", "", layer) if "parametrizations." in layer else layer


@dataclass(frozen=True, eq=False)
class Follower:
    """An integer of a module that must follow an axis.

    Args:
        module: Qualified name of the module.
        attribute: Name of the int, or of the tuple, list, dict or config object that holds it.
        element: Index, key or attribute in that; None for an int.
        labels: The axis whose living length it becomes.
    """

    module: str
    attribute: str
    element: int | str | None
    labels: IntArray


@dataclass(frozen=True)
class FrozenAxis:
    """An axis that cannot be pruned.

    Args:
        tensor: Qualified name of the parameter.
        dim: Axis.
        size: How many of its positions are frozen.
        reason: Why, in words, and where it arose.
    """

    tensor: str
    dim: int
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """Units of a model, certified, with their costs.

    Args:
        units: The units that may lose channels, in model order.
        axes: Tensor name -> labels of each axis.
        followers: Integers that follow.
        frozen: Axes that cannot be pruned.
        cost: Price of any structure.
        space: The labels.
        closure: Their classes.
        owner: Per class, the number of its unit, -1 for none.
        channel: Per class, its channel in that unit.
        caches: `(module, attribute) -> what it was` of lazy caches to reset whenever the structure changes.
        notes: What a person should know.
        unknown: Op without a rule -> how often it was met.
    """

    units: tuple[UnitSpec, ...]
    axes: Mapping[str, tuple[Axis, ...]]
    followers: tuple[Follower, ...]
    frozen: tuple[FrozenAxis, ...]
    cost: CostModel
    space: LabelSpace
    closure: Closure
    owner: IntArray
    channel: IntArray
    caches: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)
    _spans: dict[Strand, Spans] = field(default_factory=dict, init=False, repr=False)

    def alive(self, kept: Mapping[str, IntArray]) -> BoolArray:
        """Return per label whether it lives when the named units keep only the given channels."""
        dead = np.zeros(self.closure.count, np.bool_)
        for unit in self.units:
            if unit.name in kept:
                gone = np.ones(unit.num_channels, np.bool_)
                gone[np.asarray(kept[unit.name], np.int64)] = False
                dead[unit.classes[gone]] = True
        return self.closure.alive(dead)

    def spans(self, axis: Axis) -> Spans:
        """Say which units an axis is tiled from; positions in no unit are always kept.

        Args:
            axis: Labels of any axis of this graph.

        Returns:
            `(unit, start, end, channel per position)`. A product axis has one full span per factor.
        """
        if not is_labelled(axis):
            return ()
        strand = self.closure.along(axis)
        if strand not in self._spans:
            self._spans[strand] = tuple(
                (self.units[unit], int(run[0]), int(run[-1]) + 1, channels[np.searchsorted(positions, run)])
                for unit, positions, channels in runs_along(strand, self.owner, self.channel)
                for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
            )
        return self._spans[strand]


def runs_along(strand: Strand, owner: IntArray, channel: IntArray) -> list[tuple[int, IntArray, IntArray]]:
    """Return `(unit number, positions, channels)` of every unit that runs through an axis.

    Args:
        strand: The channels along the axis.
        owner: Per class, the number of its unit, -1 for none.
        channel: Per class, its channel in that unit.
    """
    units, channels = owner[strand.living], channel[strand.living]
    return [
        (unit, strand.positions[units == unit], channels[units == unit])
        for unit in np.unique(units).tolist()
        if unit >= 0
    ]


def unit_sets(strand: Strand, owner: IntArray) -> list[tuple[tuple[int, ...], int]]:
    """Return `(units, positions)`: how many positions of an axis live by each set of units; frozen ones are left out.

    Args:
        strand: The channels along the axis.
        owner: Per class, the number of its unit, -1 for none.
    """
    units = owner[strand.living]
    positions, units = strand.positions[units >= 0], units[units >= 0]
    if not strand.is_grid and (units == units[:1]).all():  # the usual case, at once
        return [((unit,), len(units)) for unit in units[:1].tolist()]
    starts = np.flatnonzero(np.diff(positions, prepend=-1))
    widths = np.diff(starts, append=len(positions))
    found: list[tuple[tuple[int, ...], int]] = []
    for width in np.unique(widths).tolist():  # positions that live by one unit, by two, ...
        sets = np.sort(units[starts[widths == width][:, None] + np.arange(width)])
        if (sets == sets[0]).all():  # to sort pairs takes long
            found.append((tuple(sets[0].tolist()), len(sets)))
            continue
        members, counts = np.unique(sets, axis=0, return_counts=True)
        found += zip(map(tuple, members.tolist()), counts.tolist(), strict=True)
    return found
