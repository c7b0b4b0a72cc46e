"""Closure proposes, the certificate disposes: refine by counterexample until every unit is certified."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.graph.attributes import registered_followers
from lightning_prune.graph.certify import Mismatch, run_lockstep
from lightning_prune.graph.channel_graph import UnitSpec
from lightning_prune.graph.closure import BoolArray, Closure, close
from lightning_prune.graph.integers import Integers, known_followers
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.partition import Layers, Partition, find_vital, partition
from lightning_prune.graph.trace import DenseTrace

__all__ = ["Refinement", "refine"]

_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, _NormBase, nn.LayerNorm, nn.GroupNorm)
_CUTS = frozenset(f"aten::{n}" for n in ("split", "split_with_sizes", "unsafe_split", "tensor_split"))


@dataclass
class Refinement:
    """What is known so far; constraints only grow, so refining ends.

    Args:
        trace: The dense trace.
        parameters: Names of the tensors that are parameters.
        layers: Owners of the tensors.
        reasons: Why labels are frozen.
        frozen: `(labels, reason index)`.
        pairs: Bindings, those of the trace and those that counterexamples taught.
        refused: Reasons of the freezes that counterexamples taught.
    """

    trace: DenseTrace
    parameters: frozenset[str]
    layers: Layers
    integers: Integers
    reasons: list[str] = field(default_factory=list)
    frozen: list[tuple[IntArray, int]] = field(default_factory=list)
    pairs: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    mended: set[tuple[str, int]] = field(default_factory=set)

    def freeze(self, labels: IntArray, reason: str) -> None:
        """Add a freeze."""
        self.frozen.append((labels, len(self.reasons)))
        self.reasons.append(reason)

    def close(self) -> tuple[Closure, Partition]:
        """Work out classes and units from all constraints."""
        while True:
            closure = close(self.trace.space, self.pairs, self.frozen)
            vital = find_vital(self.trace, closure)
            if not len(vital):
                return closure, partition(self.trace, closure, self.parameters, self.layers)
            self.freeze(vital, "without it a whole tensor would be empty")

    def tie(self, closure: Closure, units: Partition) -> bool:
        """Bind all units of a kind, channel by channel; say whether there were any."""
        first: dict[str, UnitSpec] = {}
        others = [unit for unit in units.units if first.setdefault(unit.kind, unit) is not unit]
        self.pairs += [(_labels(closure, first[unit.kind]), _labels(closure, unit)) for unit in others]
        return bool(others)


def refine(
    trace: DenseTrace, parameters: frozenset[str], ignored: Callable[[str], str | None], tie_kinds: bool = False
) -> tuple[Refinement, Closure, Partition]:
    """Certify every unit; what fails is mended by an integer, a binding or a freeze.

    Args:
        trace: The dense trace.
        parameters: Names of the tensors that are parameters.
        ignored: Tensor name -> the pattern that ignores it, None when nothing does.
        tie_kinds: Make one unit of all units of a kind.

    Returns:
        All constraints, and the classes and units that they leave.
    """
    registered = registered_followers(trace)
    named = {(f.module, f.attribute) for f in registered}
    table = [f for f in known_followers(trace) if (f.module, f.attribute) not in named]
    integers = Integers(trace, table, registered)
    known = Refinement(trace, parameters, Layers.of(trace.sandbox.model, trace.axes), integers)
    known.pairs = trace.space.pairs
    for labels, reason in trace.space.frozen:
        known.freeze(labels, reason)
    _freeze_unread(known, except_for=_bind_layers(known))
    _freeze_lists(known)
    _freeze_ignored(known, ignored)
    while True:
        closure, units = known.close()
        if any(_find_counterexamples(known, closure, units, sampler) for sampler in _samples(known, closure, units)):
            continue
        if not (tie_kinds and known.tie(closure, units)):
            return known, closure, units


def _samples(known: Refinement, closure: Closure, units: Partition) -> Iterator[Sampler]:
    """Yield the structures to certify, each only when those before it hold."""
    first = Sampler(known.trace, closure, units.units)
    yield first
    if _takes_parts(known.trace):
        yield Sampler(known.trace, closure, units.units, "opposite")
    if first.has_twins and (
        known.integers.learned or known.integers.registered
    ):  # one integer may follow two units that only happen to agree
        yield Sampler(known.trace, closure, units.units, "alternate")


def _takes_parts(trace: DenseTrace) -> bool:
    """Return whether some op takes a part of labelled channels: it may hold by luck for one choice of kept ones."""
    return any(
        event.entry.index and event.name not in ("aten::cat", "aten::chunk") and any(map(is_labelled, axes))
        for events in trace.events.values()
        for event in events
        for axes in event.in_axes
    )


def _bind_layers(known: Refinement) -> set[str]:
    """A layer of torch is cut as one, though the model may read its parts alone; return what follows a weight."""
    model, axes = known.trace.sandbox.model, known.trace.axes
    first = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    followers = set()
    for module in model.modules():
        weight = dict(module._parameters).get("weight")  # scripted modules have no plain dict
        if not isinstance(module, _LAYERS) or weight is None or first[id(weight)] not in axes:
            continue
        transposed = isinstance(module, _ConvNd) and module.transposed
        if isinstance(module, _ConvNd) and transposed and module.groups > 1:
            continue
        name, out = first[id(weight)], 1 if transposed else 0
        for part in (module._parameters.get("bias"), *module._buffers.values()):
            own = axes.get(first.get(id(part), ""), ())
            like = axes[name] if len(own) == len(axes[name]) else axes[name][out : out + 1]
            pairs = [(a, b) for a, b in zip(own, like, strict=False) if is_labelled(a) and is_labelled(b)]
            if pairs and all(len(a) == len(b) for a, b in pairs):
                known.pairs += pairs
                if name in known.trace.read:
                    followers.add(first[id(part)])
    return followers


def _freeze_lists(known: Refinement) -> None:
    """An RNN reads its weights from a list that no dynamic op presents."""
    for prefix, module in known.trace.sandbox.model.named_modules():
        if isinstance(module, nn.RNNBase):
            for name in module._parameters:
                for axis in known.trace.axes.get(f"{prefix}.{name}" if prefix else name, ()):
                    if is_labelled(axis):
                        known.freeze(axis, f"{type(module).__name__} reads its weights from a list")


def _freeze_unread(known: Refinement, except_for: set[str]) -> None:
    for name in known.trace.axes.keys() - known.trace.read - except_for:
        for axis in known.trace.axes[name]:
            if is_labelled(axis):
                known.freeze(axis, "no traced op reads it")


def _freeze_ignored(known: Refinement, ignored: Callable[[str], str | None]) -> None:
    """A layer that is ignored keeps its outputs; its inputs follow."""
    reads = np.zeros(known.trace.space.size, np.bool_)
    for axis in known.trace.space.marks.get("in", ()):
        reads[axis] = True
    for name, axes in known.trace.axes.items():
        pattern = ignored(name)
        for axis in axes if pattern is not None else ():
            if is_labelled(axis) and not reads[axis[0]]:
                known.freeze(axis, f"ignore={pattern!r}")


def _find_counterexamples(known: Refinement, closure: Closure, units: Partition, sampler: Sampler) -> bool:
    """Certify all units together, by halves on failure; mend every kind that fails and say whether one did."""
    kinds: dict[str, list[UnitSpec]] = {}
    for unit in units.units:
        kinds.setdefault(unit.kind, []).append(unit)
    accepted: list[UnitSpec] = []
    mended = False
    before = frozenset(known.mended)

    def grow(candidates: Sequence[list[UnitSpec]]) -> None:
        """Accept the kinds that certify beside what is accepted; mend those that do not."""
        nonlocal mended
        members = [u for kind in candidates for u in kind]
        alive = sampler.alive([*accepted, *members])
        try:
            run_lockstep(known.trace, alive, known.integers.followers(closure, units))
        except Mismatch:
            if len(candidates) > 1:
                half = len(candidates) // 2
                grow(candidates[:half])
                grow(candidates[half:])
                return
            alone = members[:1] if len(members) > 1 else [*accepted, *members]
            failure = known.integers.learn(closure, units, sampler.alive(alone))
            if failure is not None:
                mended = True
                if not _bind_partner(known, closure, units, sampler, members):
                    _mend(known, closure, members, failure, before)
                return
            if len(members) > 1:
                grow([members[:1]])
                grow([members[1:]])
                return
        accepted.extend(members)

    learned = sum(map(len, known.integers.learned.values()))
    if kinds:
        grow(list(kinds.values()))
    # what was learned on the way changes what was accepted before it: certify all of it again
    return mended or learned != sum(map(len, known.integers.learned.values()))


class Sampler:
    """Choose kept channels that tell sizes apart: counts that equal no old size and differ between units.

    Args:
        trace: The dense trace.
        closure: The classes.
        units: All units.
        choice: "opposite" keeps what else would be removed: between the two every channel goes once. "alternate"
            leaves every second unit of a size whole.

    Attributes:
        has_twins: Two units of one size keep equally many.
    """

    def __init__(self, trace: DenseTrace, closure: Closure, units: Sequence[UnitSpec], choice: str = "") -> None:
        self.closure = closure
        rng = random.Random(0)
        sizes = {len(a) for axes in trace.axes.values() for a in axes if is_labelled(a)}
        last: dict[int, int] = {}  # count -> the last unit that kept so many
        alike: dict[tuple[int, str], list[int]] = {}
        self._dead: dict[str, IntArray] = {}
        for number, unit in enumerate(units):
            total = unit.num_channels
            counts = list(range(max(2, total // 3), max(total - 1, 3))) if total > 2 else [1]
            rng.shuffle(counts)
            count = min(counts, key=lambda c: (last.get(c, -1), c in sizes))
            last[count] = number
            others = alike.setdefault((total, unit.axis), [])
            others.append(count)
            dead = sorted(rng.sample(range(total), total - count))
            if choice == "opposite":
                dead = sorted(set(range(total)) - set(dead))
            elif choice == "alternate" and len(others) % 2 == 0:
                dead = []
            self._dead[unit.name] = unit.classes[dead]
        self.has_twins = any(len(set(others)) < len(others) for others in alike.values())

    def alive(self, units: Sequence[UnitSpec], together: UnitSpec | None = None) -> BoolArray:
        """Return per label whether it lives when these units are cut; `together` loses what the first one loses."""
        dead = np.zeros(self.closure.count, np.bool_)
        for unit in units:
            dead[self._dead[unit.name]] = True
        if together is not None:
            dead[together.classes[dead[units[0].classes]]] = True
        return self.closure.alive(dead)


def _mend(
    known: Refinement,
    closure: Closure,
    members: Sequence[UnitSpec],
    failure: Mismatch,
    before: frozenset[tuple[str, int]],
) -> None:
    """Add the first constraint that may help: bind the parts of a cut, keep a literal slice, or freeze."""
    event = failure.event
    if event is not None and (event.name, failure.step) not in before:
        if event.name in _CUTS and _bind_parts(known, closure, failure):
            known.mended.add((event.name, failure.step))
            return
        if event.name == "aten::slice" and _keep_slice(known, closure, failure):
            known.mended.add((event.name, failure.step))
            return
    reason = f"{failure}" + (f" in {_innermost(known, failure)}" if failure.modules else "")
    known.refused.append(reason)
    for unit in members:
        known.freeze(_labels(closure, unit), reason)


def _labels(closure: Closure, unit: UnitSpec) -> IntArray:
    """Return one label of each channel."""
    first = np.zeros(closure.count, np.int64)
    first[closure.classes[::-1]] = np.arange(len(closure.classes))[::-1]
    labels: IntArray = first[unit.classes]
    return labels


def _bind_partner(
    known: Refinement, closure: Closure, units: Partition, sampler: Sampler, members: Sequence[UnitSpec]
) -> bool:
    """Two units under one module may share an integer (one head_dim for q, k and v): bind them if that certifies."""

    def partners(unit: UnitSpec) -> list[UnitSpec]:
        home = _home(unit)
        return [
            u
            for u in units.units
            if u.num_channels == unit.num_channels
            and u.axis == unit.axis
            and u not in members
            and (_home(u)[: len(home)] == home or home[: len(_home(u))] == _home(u))
        ]

    for partner in partners(members[0]):
        if known.integers.learn(closure, units, sampler.alive(members[:1], together=partner)) is None:
            for unit in members:
                for other in partners(unit):
                    if other.kind == partner.kind:
                        known.pairs.append((_labels(closure, unit), _labels(closure, other)))
            return True
    return False


def _home(unit: UnitSpec) -> list[str]:
    """Return the path of the module that holds every layer of the unit."""
    paths = [p.layer.split(".")[:-1] for p in unit.places]
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def _innermost(known: Refinement, failure: Mismatch) -> str:
    names = {id(m): n for n, m in known.trace.sandbox.model.named_modules()}
    module = failure.modules[0]
    return names.get(id(module)) or type(module).__name__


def _bind_parts(known: Refinement, closure: Closure, mismatch: Mismatch) -> bool:
    """The parts of an equal cut must lose equally."""
    assert mismatch.event is not None
    source, parts = mismatch.event.in_axes[0], mismatch.event.out_axes
    bound = False
    for dim, axis in enumerate(source):
        pieces = [axes[dim] for axes in parts]
        if is_labelled(axis) and len({len(p) for p in pieces}) == 1 and len(pieces[0]) < len(axis):
            known.pairs += [(pieces[0], piece) for piece in pieces[1:]]
            bound |= any((closure.classes[pieces[0]] != closure.classes[p]).any() for p in pieces[1:])
    return bound


def _keep_slice(known: Refinement, closure: Closure, mismatch: Mismatch) -> bool:
    """A slice by literal numbers holds when everything before its last literal stays."""
    assert mismatch.event is not None
    kept = False
    for axis, part in zip(mismatch.event.in_axes[0], mismatch.event.out_axes[0], strict=True):
        if is_labelled(axis) and len(part) < len(axis):
            stays = axis[: -len(part)] if axis[-1] == part[-1] else axis[: int(np.flatnonzero(axis == part[-1])[0]) + 1]
            if not closure.frozen[closure.classes[stays]].all():
                known.freeze(stays, f"a slice by constant numbers in {_innermost(known, mismatch)}")
                kept = True
    return kept
