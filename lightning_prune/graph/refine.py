"""Closure proposes, the certificate disposes: refine by counterexample until every unit is certified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.graph.attributes import registered_followers
from lightning_prune.graph.call import Call
from lightning_prune.graph.channel_graph import UnitSpec
from lightning_prune.graph.closure import BoolArray, Closure, close
from lightning_prune.graph.integers import Guess, Integers, Rule
from lightning_prune.graph.labels import FIXED, IntArray, is_labelled
from lightning_prune.graph.lasting import find_doubled, find_lasting, find_vanishing
from lightning_prune.graph.layer_integers import known_followers
from lightning_prune.graph.mends import keep_slices, mend
from lightning_prune.graph.mismatch import Mismatch
from lightning_prune.graph.partition import Layers, Partition, partition
from lightning_prune.graph.rules.recurrent import recurrent_weights, tie_weights
from lightning_prune.graph.sampler import Sampler
from lightning_prune.graph.trace import DenseTrace, Event

__all__ = ["Refinement", "refine"]

_FEW = 8
_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, _NormBase, nn.LayerNorm, nn.GroupNorm)


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
        restless: The modes in which these were found: the model may run other ops there each time.
        mended: `(kind of mend, mode, step)` of the ops where axes were bound or kept.
    """

    trace: DenseTrace
    parameters: frozenset[str]
    layers: Layers
    integers: Integers
    reasons: list[str] = field(default_factory=list)
    frozen: list[tuple[IntArray, int]] = field(default_factory=list)
    pairs: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    restless: set[str] = field(default_factory=set)
    mended: set[tuple[str, str, int]] = field(default_factory=set)

    def freeze(self, labels: IntArray, reason: str) -> None:
        """Add a freeze."""
        self.frozen.append((labels, len(self.reasons)))
        self.reasons.append(reason)

    def place(self, mismatch: Mismatch) -> str:
        """Name the innermost module of a mismatch; its class where it has no name, nothing for the root."""
        names = {id(m): n for n, m in self.layers.modules.items()}
        module = mismatch.modules[0] if mismatch.modules else self.trace.sandbox.model
        return names.get(id(module)) or type(module).__name__

    def followed(self, mismatch: Mismatch) -> list[IntArray]:
        """Return the axes that integers of the modules on the stack follow, innermost first."""
        return [f.labels for module in mismatch.modules for f in self.integers.followers_of(module)]

    def close(self) -> tuple[Closure, Partition]:
        """Work out classes and units from all constraints."""
        while True:
            closure = close(self.trace.space, self.pairs, self.frozen)
            lasting = list(find_lasting(self.trace, closure))
            for labels, reason in lasting:
                self.freeze(labels, reason)
            if not lasting:
                units = partition(self.trace, closure, self.parameters, self.layers)
                doubled = find_doubled(self.trace, closure, units)
                if not doubled:
                    return closure, units
                self.pairs += doubled

    def keep_parts(self, closure: Closure, units: Partition) -> bool:
        """Freeze the first channel of every part that integers follow and may not vanish; say whether one was found."""
        parts = find_vanishing(closure, units, (f.labels for f in self.integers.followers(closure, units)))
        for labels in parts:
            self.freeze(labels, "the first of a part that may not vanish")
        return bool(parts)

    def tie(self, closure: Closure, units: Partition) -> bool:
        """Bind all units of a kind, channel by channel; say whether there were any."""
        first: dict[str, UnitSpec] = {}
        others = [unit for unit in units.units if first.setdefault(unit.kind, unit) is not unit]
        axes = self.integers.axes(closure, units)
        self.pairs += [(axes.labels_of(first[unit.kind]), axes.labels_of(unit)) for unit in others]
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
    _tie_recurrent(known)
    known.pairs = trace.space.pairs
    for labels, reason in trace.space.frozen:
        known.freeze(labels, reason)
    _freeze_unread(known, except_for=_bind_layers(known))
    _freeze_ignored(known, ignored)
    while True:
        closure, units = known.close()
        rescaled = len(trace.space.marks.get("rescaled", ()))
        if (tie_kinds and known.tie(closure, units)) or known.keep_parts(closure, units):
            continue
        samplers = enumerate(_samples(known, closure, units))
        if any(_find_counterexamples(known, closure, units, sampler, k == 0) for k, sampler in samplers):
            continue
        if not known.keep_parts(closure, units):  # of integers that were learned
            if rescaled != len(trace.space.marks.get("rescaled", ())):  # certifying tells: the same units, marked
                closure, units = known.close()
            return known, closure, units


def _samples(known: Refinement, closure: Closure, units: Partition) -> Iterator[Sampler]:
    """Yield the structures to certify, each only when those before it hold."""
    sampler = Sampler(known.trace, closure, units.units)
    yield sampler
    if takes_parts := _takes_parts(known.trace, closure):
        yield Sampler(known.trace, closure, units.units, opposite=True)
    # of few channels, those that remain may lie evenly by luck; an integer may follow a unit that only agrees so far
    few = (takes_parts or closure.products) and any(unit.num_channels <= _FEW for unit in units.units)
    followed = known.integers.followed(closure, units)
    for further in count():
        apart = sampler.tells_apart(followed)
        if apart and further >= (2 if few else 0):
            return
        sampler = Sampler(known.trace, closure, units.units, after=sampler, whole=not apart)
        yield sampler


def _takes_parts(trace: DenseTrace, closure: Closure) -> bool:
    """Return whether some op takes a part of labelled channels: it may hold by luck for one choice of kept ones."""
    return any(
        event.entry.index and event.name not in ("aten::cat", "aten::chunk") and _has_part(event, closure)
        for events in trace.events.values()
        for event in events
    )


def _has_part(event: Event, closure: Closure) -> bool:
    """Return whether an op is given channels; of an op that looks some axes up, whether these may go."""
    labelled = [axis for axes in event.in_axes for axis in axes if is_labelled(axis)]
    if event.name.endswith("index"):
        whole = {id(axis) for axis in event.out_axes[0]}
        labelled = [a for a in labelled if id(a) not in whole and not closure.frozen[closure.classes[a]].all()]
    return bool(labelled)


def _bind_layers(known: Refinement) -> set[str]:
    """A layer of torch is cut as one, though the model may read its parts alone; return what follows a weight."""
    axes, first = known.trace.axes, known.layers.names
    followers = set()
    for module in known.layers.modules.values():
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


def _tie_recurrent(known: Refinement) -> None:
    """A recurrent layer is cut as one too; where somebody else makes its weights it keeps its sizes."""
    trace = known.trace
    for prefix, module in known.layers.modules.items():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        weights = recurrent_weights(module)
        if weights is None:
            inside = (axes for name, axes in trace.axes.items() if name.startswith(f"{prefix}." if prefix else ""))
            for axis in (axis for axes in inside for axis in axes if is_labelled(axis)):
                known.freeze(axis, f"{type(module).__name__} has weights that are made elsewhere")
            continue
        call = Call(f"the weights of {prefix or type(module).__name__}", {}, None, trace.space, {})
        axes = [layer.map(lambda t: trace.axes.get(known.layers.names[id(t)], (FIXED,) * t.dim())) for layer in weights]
        tie_weights(call, axes, len(weights[0].ih) // module.hidden_size, 2 if vars(module).get("bidirectional") else 1)


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


def _find_counterexamples(
    known: Refinement, closure: Closure, units: Partition, sampler: Sampler, is_first: bool
) -> bool:
    """Certify all units together; mend what fails and say whether what certified before has to be certified again."""
    if not units.units:
        return False
    search, before = _Search(known, closure, units, sampler), list(known.integers.learned)
    search.grow(units.units, is_whole=True)
    known.integers.held.update(known.integers.learned if search.at_once else ())
    # what was learned on the way changes what was accepted before it, unless all was accepted at once and first
    return not search.at_once or (before != known.integers.learned and not is_first)


class _Search:
    """One pass over the units of a partition.

    Attributes:
        accepted: Units that certify together.
        modes: In which modes they do.
        at_once: All units certified together, with nothing bound or frozen before.
        guessed: What did not help a unit alone.
    """

    def __init__(self, known: Refinement, closure: Closure, units: Partition, sampler: Sampler) -> None:
        self.known, self.closure, self.units, self.sampler = known, closure, units, sampler
        self.modes = sampler.modes
        self.accepted: list[UnitSpec] = []
        self.at_once = False
        self.guessed: set[tuple[Rule, str]] = set()

    def grow(self, members: Sequence[UnitSpec], *, is_whole: bool = False) -> bool:
        """Accept the units that certify beside what is accepted; freeze those that do not.

        Returns:
            Whether axes were bound: then the units are no longer what they were, and the pass is over.
        """
        failures = self._fail(members)
        if failures and self._bind(members, failures, surely=True):
            return True
        if failures and (is_whole or len(members) == 1):
            failures = self._fail(members, Guess.STALE)
        if failures and is_whole:
            failures = self._relearn(members, failures)
        if failures and (self._bind(members, failures) or self._keep(members, failures, literal=True)):
            return True
        if failures and len(members) == 1:
            failures = self._fail(members, Guess.ANY)
        if not failures:
            self.at_once = is_whole
            self.accepted += members
            return False
        if len(members) == 1:
            return self._keep(members, failures) or self._give_up(members, failures)
        return self._take_apart(members, failures)

    def _take_apart(self, members: Sequence[UnitSpec], failures: Sequence[Mismatch]) -> bool:
        """Accept or freeze parts of what fails, in the mode where it does: all of them are certified again."""
        if len(members) == 1:
            return self.grow(members)
        self.modes = (failures[0].mode,)
        blamed = self._blame(members, failures)
        guilty = {unit.name for units, _ in blamed for unit in units}
        rest = [unit for unit in members if unit.name not in guilty]
        if blamed and rest:
            return self.grow(rest) or self.grow([unit for unit in members if unit.name in guilty])
        if len(blamed) > 1:
            bound = [self._take_apart(units, found) for units, found in blamed]  # all of them, as they share no op
            return any(bound)
        kinds = list(dict.fromkeys(unit.kind for unit in members))
        if len(kinds) > 1:
            half = set(kinds[: len(kinds) // 2])
            parts = [[u for u in members if u.kind in half], [u for u in members if u.kind not in half]]
        else:
            failures = self._fail(members[:1], Guess.ANY)
            if failures:  # one speaks for all of its kind
                first = members[:1]
                return self._bind(first, failures) or self._keep(first, failures) or self._give_up(members, failures)
            parts = [list(members[: len(members) // 2]), list(members[len(members) // 2 :])]
        return any(self.grow(part) for part in parts)

    def _fail(self, members: Sequence[UnitSpec], guess: Guess = Guess.NONE) -> list[Mismatch]:
        """Return what no integer mends when these units are cut beside the accepted ones."""
        guessed = self.guessed if len(members) == 1 else None
        return self.known.integers.learn(self.closure, self.units, self._alive(members), self.modes, guess, guessed)

    def _relearn(self, members: Sequence[UnitSpec], failures: list[Mismatch]) -> list[Mismatch]:
        integers, alive = self.known.integers, self._alive(members)
        return integers.relearn(self.closure, self.units, alive, self.modes, failures)

    def _alive(self, members: Sequence[UnitSpec]) -> BoolArray:
        return self.sampler.alive([*self.accepted, *members])

    def _bind(self, members: Sequence[UnitSpec], failures: Sequence[Mismatch], *, surely: bool = False) -> bool:
        axes = self.known.integers.axes(self.closure, self.units)
        return mend(self.known, axes, self._alive(members), failures, surely=surely)

    def _keep(self, members: Sequence[UnitSpec], failures: Sequence[Mismatch], *, literal: bool = False) -> bool:
        integers, alive = self.known.integers, self._alive(members)
        axes = integers.axes(self.closure, self.units)
        failures = [f for f in failures if not literal or integers.is_literal(axes, alive, f)]
        return keep_slices(self.known, axes, alive, failures)

    def _blame(
        self, members: Sequence[UnitSpec], failures: Sequence[Mismatch]
    ) -> list[tuple[list[UnitSpec], list[Mismatch]]]:
        """Return the kinds of units on the axes that are wrong, with where: apart from those that share no op."""
        groups: list[tuple[set[str], list[Mismatch]]] = []
        kinds = {unit.name: unit.kind for unit in members}
        for failure in failures:
            numbers = {n for _, a in failure.axes for n in self.units.owner[self.closure.living_by(a)[1]].tolist()}
            names = [self.units.units[n].name for n in numbers if n >= 0]
            group = ({kinds[name] for name in names if name in kinds}, [failure])
            for other in [g for g in groups if g[0] & group[0]]:
                groups.remove(other)
                group = (other[0] | group[0], other[1] + group[1])
            groups += [group] if group[0] else []
        return [([unit for unit in members if unit.kind in kinds], found) for kinds, found in groups]

    def _give_up(self, members: Sequence[UnitSpec], failures: Sequence[Mismatch]) -> bool:
        """Bind the units to others that may share an integer if that certifies, else freeze them.

        Returns:
            Whether they were bound.
        """
        axes = self.known.integers.axes(self.closure, self.units)
        if all(f.is_size and met is None for f in failures for met, _ in f.axes or [(None, None)]):
            for first, others in self._companions(members):
                accepted = [u for u in self.accepted if u not in others]
                alive = self.sampler.alive([*accepted, first], others)
                if not self.known.integers.learn(self.closure, self.units, alive, self.modes):
                    bound = [(u, o) for u in members for o in self._partners(u) if o.kind == others[0].kind]
                    bound += [(first, other) for other in others]
                    self.known.pairs += [(axes.labels_of(one), axes.labels_of(other)) for one, other in bound]
                    return True
        self.known.restless.add(failures[0].mode)
        reason = f"{failures[0]}" + (f" in {self.known.place(failures[0])}" if failures[0].modules else "")
        self.known.refused.append(reason)
        for unit in members:
            self.known.freeze(axes.labels_of(unit), reason)
        return False

    def _companions(self, members: Sequence[UnitSpec]) -> Iterator[tuple[UnitSpec, list[UnitSpec]]]:
        """Yield a unit and those to lose what it loses: each one of its size nearby, then all of its kind."""
        yield from ((members[0], [partner]) for partner in self._partners(members[0]))
        kind = [unit for unit in self.units.units if unit.kind == members[0].kind]
        if len(kind) > 1:
            yield kind[0], kind[1:]

    def _partners(self, unit: UnitSpec) -> list[UnitSpec]:
        """Return other units of the size and axis of one, in its module or around it: they may share an integer."""
        home = _home(unit)
        alike = [
            u for u in self.units.units if u is not unit and (u.num_channels, u.axis) == (unit.num_channels, unit.axis)
        ]
        return [u for u in alike if _home(u)[: len(home)] == home or home[: len(_home(u))] == _home(u)]


def _home(unit: UnitSpec) -> list[str]:
    """Return the path of the module that holds every layer of the unit."""
    paths = [p.layer.split(".")[:-1] for p in unit.places]
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
