"""From classes to units: classes that touch the same axes the same number of times form one unit."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from torch import nn

from lightning_prune.graph.channel_graph import Place, UnitSpec, home_of, runs_along, unit_sets
from lightning_prune.graph.closure import BoolArray, Closure, Strand
from lightning_prune.graph.contents import named_tensors
from lightning_prune.graph.cost import CostModel, Expression, Polynomial
from lightning_prune.graph.labels import Axis, IntArray, is_labelled
from lightning_prune.graph.trace import DenseTrace

__all__ = ["Layers", "Partition", "partition", "price"]


@dataclass(frozen=True)
class Layers:
    """Which module owns which tensor.

    Args:
        modules: Layer -> the module.
        names: `id(parameter or buffer) -> tensor name`.
        owners: Tensor name -> layers that own it, several when it is tied.
        order: Tensor name -> position in the model.
    """

    modules: Mapping[str, nn.Module]
    names: Mapping[int, str]
    owners: Mapping[str, tuple[str, ...]]
    order: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, tensors: Mapping[str, object]) -> Layers:
        """Look up the owners of the named tensors."""
        modules, names = dict(model.named_modules()), {id(t): name for name, t in named_tensors(model).items()}
        owners: dict[str, dict[str, None]] = {}
        for layer, module in modules.items():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and names[id(tensor)] in tensors:
                    owners.setdefault(names[id(tensor)], {})[layer] = None
        order = {name: k for k, name in enumerate(tensors)}
        return cls(modules, names, {name: tuple(layers) for name, layers in owners.items()}, order)


@dataclass(frozen=True)
class Partition:
    """Units and the map from class to unit."""

    units: tuple[UnitSpec, ...]
    owner: IntArray
    channel: IntArray


def partition(trace: DenseTrace, closure: Closure, parameters: frozenset[str], layers: Layers) -> Partition:
    """Group the free classes into units.

    Args:
        trace: The dense trace.
        closure: Its classes.
        parameters: Names of the tensors that are parameters: a unit must run through one.
        layers: Owners of the tensors.

    Returns:
        Units in model order, with unique names.
    """
    groups = _group(trace, closure, parameters)
    owner = np.full(closure.count, -1, np.int64)
    channel = np.zeros(closure.count, np.int64)
    for number, classes in enumerate(groups):
        owner[classes] = number
        channel[classes] = np.arange(len(classes))
    roles = _Roles.of(trace, closure)
    places: list[list[tuple[Place, bool]]] = [[] for _ in groups]
    strands = closure.strands(axis for axes in trace.axes.values() for axis in axes)
    runs = {strand: runs_along(strand, owner, channel) for strand in strands}
    for name, axes in trace.axes.items():
        for dim, axis in enumerate(axes):
            if is_labelled(axis):
                for number, positions, channels in runs[closure.along(axis)]:
                    places[number] += _places(roles, layers, name, dim, axis, positions, channels)
    units = [_unit(classes, found, roles, layers) for classes, found in zip(groups, places, strict=True)]
    order = sorted(range(len(units)), key=lambda k: _first(units[k], layers))
    rank = np.zeros(len(units) + 1, np.int64)
    rank[-1] = -1
    rank[order] = np.arange(len(order))
    return Partition(_unique_names([units[k] for k in order]), rank[owner], channel)


def _group(trace: DenseTrace, closure: Closure, parameters: frozenset[str]) -> list[IntArray]:
    """Return the classes of every unit, ordered by where they first appear."""
    axes = [(a, name in parameters) for name, axes in trace.axes.items() for a in axes if is_labelled(a)]
    # the axes of grids and of priced ops tell classes apart too: heads from head_dim, halves that cost on their own
    further = [a for p in closure.products for a in p.axes]
    further += {id(a): a for e in trace.events["eval"] for c in e.costs for _, a in c if is_labelled(a)}.values()
    axes += [(a, False) for a in further]
    if not axes:
        return []
    salts: dict[Strand, int] = {}
    inside: dict[Strand, bool] = {}
    for (axis, is_parameter), salt in zip(axes, _salts(len(axes)), strict=True):
        strand = closure.along(axis)
        salts[strand] = salts.get(strand, 0) + salt
        inside[strand] = inside.get(strand, False) or is_parameter
    signature, hit = np.zeros(closure.count, np.uint64), np.zeros(closure.count, np.bool_)
    for strand, salt in salts.items():
        np.add.at(signature, strand.living, np.uint64(salt % 2**64))
        hit[strand.living] |= inside[strand]
    classes = np.concatenate([strand.classes for strand in salts])
    free = ~closure.frozen & ~closure.derived & hit
    first = np.full(closure.count, len(classes), np.int64)
    np.minimum.at(first, classes, np.arange(len(classes)))
    first = _first_through_factors(closure, first)
    candidates = np.flatnonzero(free)
    signature, first = signature[candidates], first[candidates]
    starts = np.flatnonzero(np.diff(signature, prepend=~signature[:1]))  # few, and less to sort: neighbours are alike
    kind = np.unique(signature[starts], return_inverse=True)[1].repeat(np.diff(starts, append=len(signature)))
    order = np.lexsort((first, kind))
    groups = np.split(candidates[order], np.flatnonzero(np.diff(kind[order])) + 1)
    return [g for g in groups if len(g) > 1]


def _salts(count: int) -> list[int]:
    """Return numbers of which no two sets have the same sum, but by chance."""
    salts: list[int] = np.random.default_rng(0).integers(1, 2**63, size=count).tolist()
    return salts


def _first_through_factors(closure: Closure, first: IntArray) -> IntArray:
    """A factor appears where the first element of its grid does."""
    result = first.copy()
    grid = closure.factors.tocoo()
    np.minimum.at(result, grid.col, first[grid.row])
    return result


@dataclass(frozen=True)
class _Roles:
    """Which labels and classes have which role, and of what the kept counts of each class are a multiple."""

    labels: Mapping[str, BoolArray]
    classes: Mapping[str, BoolArray]
    in_grid: BoolArray
    steps: IntArray

    @classmethod
    def of(cls, trace: DenseTrace, closure: Closure) -> _Roles:
        labels, classes = {}, {}
        marks = {**trace.space.marks, "renormalized": trace.space.renormalized}
        for role in ("in", "out", "both"):
            labels[role] = np.zeros(trace.space.size, np.bool_)
            for axis in {id(axis): axis for axis in marks.get(role, ())}.values():
                labels[role][axis] = True
        for role in ("groups", "heads", "head_dim", "rescaled", "renormalized"):
            classes[role] = np.zeros(closure.count, np.bool_)
            for strand in closure.strands(marks.get(role, ())):
                # the role of a grid element is not that of its factors, but for sums over all of it
                classes[role][strand.living if role in ("rescaled", "renormalized") else strand.classes] = True
        grid = np.zeros(closure.count, np.bool_)
        for strand in closure.strands(axis for product in closure.products for axis in product.axes):
            grid[strand.classes] = True
        steps = np.ones(closure.count, np.int64)
        for axis, step in trace.space.steps:
            own = closure.along(axis).living
            steps[own] = np.lcm(steps[own], step)
        return cls(labels, classes, grid, steps)


def _places(
    roles: _Roles, layers: Layers, name: str, dim: int, axis: IntArray, positions: IntArray, channels: IntArray
) -> list[tuple[Place, bool]]:
    """Return the place in every layer that owns the tensor, and whether it runs over the groups of a convolution."""
    found = []
    label = axis[positions[0]]
    reads, makes, both = (bool(roles.labels[r][label]) for r in ("in", "out", "both"))
    owners = layers.owners[name]
    for layer in owners:
        is_table = isinstance(layers.modules[layer], nn.Embedding)
        has_table = any(isinstance(layers.modules[o], nn.Embedding) for o in owners)
        out, into = (makes and (is_table or not has_table or not reads)), (reads and not is_table)
        found.append((Place(layer, name, dim, positions, channels, out, into), both))
    return found


def _unit(classes: IntArray, places: Sequence[tuple[Place, bool]], roles: _Roles, layers: Layers) -> UnitSpec:
    """Settle roles per layer, then name the unit."""
    axis = "channels"
    if roles.in_grid[classes].all():
        axis = next((r for r in ("groups", "heads", "head_dim") if roles.classes[r][classes].any()), "channels")
    by_layer: dict[str, list[tuple[Place, bool]]] = {}
    for place, both in places:
        by_layer.setdefault(home_of(place.layer), []).append((place, both))
    settled = []
    for group in by_layer.values():
        per_channel = not any(p.is_output or p.is_input for p, _ in group)
        whole_groups = axis == "groups" and any(both for _, both in group)
        for place, _ in group:
            sides = (True, True) if per_channel or whole_groups else (place.is_output, place.is_input)
            settled.append(Place(place.layer, place.tensor, place.dim, place.positions, place.channels, *sides))
    if not any(p.is_output for p in settled):  # a product of weights reads both: one of them makes
        settled = [replace(p, is_output=True) for p in settled]
    settled.sort(key=lambda p: (layers.order[p.tensor], p.dim))
    unit = UnitSpec(
        "",
        len(classes),
        axis,
        _kind(axis, len(classes), settled, layers),
        tuple(settled),
        classes,
        bool(roles.classes["renormalized"][classes].any()),
        bool(roles.classes["rescaled"][classes].any()),
        int(np.lcm.reduce(roles.steps[classes])),
    )
    return replace(unit, name=_name(unit))


def _name(unit: UnitSpec) -> str:
    makers, readers = unit.layers(output=True), unit.layers(output=False)
    place = (makers or readers)[0]
    layer = home_of(place.layer) or place.tensor
    suffix = "" if unit.axis == "channels" else f"_{unit.axis}"
    span = f"({int(place.positions[0])}, {int(place.positions[-1]) + 1})"
    return f"{layer}_{span}_out_{len(makers)}_in_{len(readers)}{suffix}"


def _unique_names(units: Sequence[UnitSpec]) -> tuple[UnitSpec, ...]:
    total, met, result = Counter(u.name for u in units), Counter[str](), []
    for unit in units:
        met[unit.name] += 1
        name = unit.name if total[unit.name] == 1 else f"{unit.name}_{met[unit.name]}"
        result.append(replace(unit, name=name))
    return tuple(result)


def _first(unit: UnitSpec, layers: Layers) -> tuple[int, int, str]:
    place = (unit.layers(output=True) or unit.layers(output=False))[0]
    return layers.order[place.tensor], int(place.positions[0]), unit.axis


def _kind(axis: str, size: int, places: Sequence[Place], layers: Layers) -> str:
    """Digest of the unit with every layer number taken out."""
    parts = {
        (re.sub(r"\d+", "#", p.tensor), type(layers.modules[p.layer]).__name__, p.dim, len(p.positions)) for p in places
    }
    return hashlib.sha1(repr((axis, size, sorted(parts))).encode(), usedforsecurity=False).hexdigest()[:12]


def price(
    trace: DenseTrace,
    closure: Closure,
    found: Partition,
    constant_params: int,
    parameters: Mapping[str, Sequence[int]],
    batch_size: int,
) -> CostModel:
    """Turn the op log into polynomials in the kept counts."""
    full = np.array([u.num_channels for u in found.units], np.int64)
    memo: dict[Strand, Expression] = {}

    def size(length: int, axis: Axis) -> Expression:
        if not is_labelled(axis):
            return (length, ())
        strand = closure.along(axis)
        if strand not in memo:
            memo[strand] = _expression(strand, found, full)
        return memo[strand]

    count = len(full)
    by_op: dict[str, list[tuple[int, list[Expression]]]] = {}
    memory: list[tuple[int, list[Expression]]] = []
    for event in trace.events["eval"]:
        for cost in event.costs:
            by_op.setdefault(event.name, []).append((1, [size(n, a) for n, a in cost]))
        for width, shape, axes in zip(event.widths, event.out_shapes, event.out_axes, strict=True):
            if width:
                memory.append((width, [size(n, a) for n, a in zip(shape, axes, strict=True)]))
    params = [
        (1, [size(n, a) for n, a in zip(shape, trace.axes[name], strict=True)]) for name, shape in parameters.items()
    ]
    return CostModel(
        [u.name for u in found.units],
        full,
        {op: Polynomial(terms, count) for op, terms in by_op.items()},
        Polynomial([*params, (constant_params, [])], count),
        Polynomial(memory, count),
        batch_size,
    )


def _expression(strand: Strand, found: Partition, full: IntArray) -> Expression:
    """Return the living length of an axis as a constant plus products of kept counts."""
    terms: list[tuple[int, int, tuple[int, ...]]] = []
    constant = len(strand.classes)
    for members, count in unit_sets(strand, found.owner):
        share = Fraction(count, int(np.prod(full[list(members)])))  # a part of a unit only where nothing is priced
        terms.append((share.numerator, share.denominator, members))
        constant -= count
    return constant, tuple(sorted(terms))
