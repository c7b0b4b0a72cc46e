"""Integers that must follow: sizes that models keep in Python attributes and use in their forward.

Known torch layers have a table. For the rest the certificate teaches: when a pruned run fails, an int of a module on
the failing stack that equals an old size is set to the new one; what then gets further is learned, per module class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.graph.axes import AxisTable, View
from lightning_prune.graph.certify import certifies, find_mismatches
from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.closure import BoolArray, Closure
from lightning_prune.graph.holders import Element, integer_of, integers_of
from lightning_prune.graph.labels import IntArray
from lightning_prune.graph.memos import is_own
from lightning_prune.graph.mismatch import Mismatch
from lightning_prune.graph.partition import Partition
from lightning_prune.graph.trace import DenseTrace

__all__ = ["Guess", "Integers"]

Place = tuple[Mismatch, IntArray | None]  # an op that was wrong, and along which axis
Candidate = tuple[str, str, Element, IntArray]  # module, attribute, element, the axis it may follow
_ROUNDS = 24  # a model whose integers need more tries than this for one structure is frozen instead
_NEAR = 3  # so many modules up the stack are searched for integers that an expression may have been made of


class Guess(Enum):
    """Where to guess which integer an expression was made of, beside integers that are as large as a wrong axis was."""

    NONE = "nowhere"
    STALE = "where a size may be the old one"
    ANY = "where a size is neither the old one nor right, too: of several integers some may follow"


@dataclass(frozen=True)
class Rule:
    """An integer of every module of a class, and the axis that it follows.

    Args:
        owner: The class.
        attribute: Name of the int, or of what holds it.
        element: Where in that, None for an int.
        view: The axis, as seen from the module.
    """

    owner: type[nn.Module]
    attribute: str
    element: Element
    view: View


@dataclass
class Integers:
    """What was learned about the integers of one model.

    Args:
        trace: The dense trace.
        known: Followers from the table.
        registered: Followers that the user named.
        learned: Rules that let a structure certify, in the order in which they were found.
        held: Those with which one did that has all units cut.
    """

    trace: DenseTrace
    known: list[Follower]
    registered: list[Follower] = field(default_factory=list)
    learned: list[Rule] = field(default_factory=list)
    held: set[Rule] = field(default_factory=set)
    _modules: dict[str, nn.Module] = field(default_factory=dict)
    _owners: dict[type[nn.Module], list[tuple[str, nn.Module]]] = field(default_factory=dict)
    _table: AxisTable | None = None
    _tried: set[tuple[Rule, str]] = field(default_factory=set)  # for the axes of this table, as the next
    _followers: dict[tuple[Rule, ...], list[Follower]] = field(default_factory=dict)
    _refuted: set[Rule] = field(default_factory=set)
    _runs: dict[str, dict[Any, list[Mismatch]]] = field(default_factory=dict)  # mode -> structure -> what it showed

    def __post_init__(self) -> None:
        self._modules = dict(self.trace.sandbox.model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}
        for name, module in self._modules.items():
            self._owners.setdefault(type(module), []).append((name, module))

    def axes(self, closure: Closure, units: Partition) -> AxisTable:
        """Return the axes of these units."""
        if self._table is None or self._table.units is not units:
            self._table, self._tried, self._followers = AxisTable(self.trace, closure, units), set(), {}
        return self._table

    def followers(self, closure: Closure, units: Partition, rules: Sequence[Rule] | None = None) -> Sequence[Follower]:
        """Return every integer that follows: the table, and the rules (by default those learned) in all modules."""
        axes, key = self.axes(closure, units), tuple(self.learned if rules is None else rules)
        if key not in self._followers:
            self._followers[key] = self._follow(axes, key)
        return self._followers[key]

    def _follow(self, axes: AxisTable, rules: Sequence[Rule]) -> list[Follower]:
        found = {(f.module, f.attribute, f.element): f for f in (*self.known, *self.registered)}
        for rule in rules:
            for name, module in self._owners[rule.owner]:
                key = (name, rule.attribute, rule.element)
                value = None if key in found else integer_of(module, rule.attribute, rule.element)
                labels = None if value is None else axes.find(name, value, rule.view)
                if labels is not None:
                    found[key] = Follower(*key, labels)
        return list(found.values())

    def followed(self, closure: Closure, units: Partition) -> set[str]:
        """Return the units that integers follow which are not in the table."""
        known = {id(follower) for follower in self.known}
        axes = [f.labels for f in self.followers(closure, units) if id(f) not in known]
        numbers = {int(n) for axis in axes for n in np.unique(units.owner[closure.living_by(axis)[1]])}
        return {units.units[n].name for n in numbers if n >= 0}

    def followers_of(self, module: nn.Module) -> list[Follower]:
        """Return the integers of one module that follow an axis of the units looked at last."""
        if self._table is None:
            return []
        name = self._names.get(id(module))
        return [f for f in self.followers(self._table.closure, self._table.units) if f.module == name]

    def learn(
        self,
        closure: Closure,
        units: Partition,
        alive: BoolArray,
        modes: Sequence[str] | None = None,
        guess: Guess = Guess.NONE,
        guessed: set[tuple[Rule, str]] | None = None,
    ) -> list[Mismatch]:
        """Rewrite integers until the structure certifies; remember those that were needed.

        Args:
            closure: The classes.
            units: The units.
            alive: Per label, whether it lives in the structure to certify.
            modes: In which of the traced modes; all by default.
            guess: Where to guess which integers were read.
            guessed: Guesses that did not help before; grows.

        Returns:
            The mismatches that no integer mends; none when the structure certifies.
        """

        def failures(rules: Sequence[Rule]) -> list[Mismatch]:
            return self._find(alive, self.followers(closure, units, rules), modes)

        axes, before = self.axes(closure, units), list(self.learned)
        left, guessed = failures(self.learned), set() if guessed is None else guessed
        failed: set[tuple[Rule, str]] = set()
        for _ in range(_ROUNDS):
            followers = self.followers(closure, units)
            proposals = self._propose(axes, alive, left, followers, guessed, guess) if left else {}
            if not proposals:
                break
            after = failures([*self.learned, *proposals])
            good = [rule for rule, places in proposals.items() if any(_is_mended(*place, after) for place in places)]
            self.learned += good
            failed |= {(rule, m.op) for rule, places in proposals.items() if rule not in good for m, _ in places}
            if good:  # what did not help alone may help now
                self._tried -= failed
                failed.clear()
                guessed.clear()
            left = after if len(good) == len(proposals) else failures(self.learned) if good else left
        fresh = self.learned[len(before) :]
        for rule in fresh if not left and len(fresh) > 1 else ():  # keep only what is needed
            fewer = [r for r in self.learned if r is not rule]
            if self._certifies(alive, self.followers(closure, units, fewer), modes):
                self.learned = fewer
        return left

    def relearn(
        self,
        closure: Closure,
        units: Partition,
        alive: BoolArray,
        modes: Sequence[str] | None,
        left: list[Mismatch],
    ) -> list[Mismatch]:
        """Put other rules in the place of those that held for another structure by luck; without any, nothing changes.

        Args:
            closure: The classes.
            units: The units.
            alive: Per label, whether it lives in the structure to certify.
            modes: In which of the traced modes; all by default.
            left: Where it disagrees.

        Returns:
            The mismatches that are left.
        """
        misled = [m for m in left if any(met not in (None, len(labels)) for met, labels in m.axes)]
        owners = {type(module) for mismatch in misled for module in mismatch.modules}
        before, suspects = list(self.learned), {r for r in self.learned if r in self.held and r.owner in owners}
        if not suspects:
            return left
        self.learned = [rule for rule in before if rule not in suspects]
        self._refuted |= suspects
        after = self.learn(closure, units, alive, modes, Guess.STALE)
        if after:
            self.learned, self._refuted = before, self._refuted - suspects
        return after and left

    def _find(self, alive: BoolArray, followers: Sequence[Follower], modes: Sequence[str] | None) -> list[Mismatch]:
        """Return where a structure disagrees, in the first mode where it does; nothing is run twice."""
        key = _key(alive, followers)
        for mode in modes or self.trace.events:
            runs = self._runs.setdefault(mode, {})
            if key not in runs:
                runs[key] = find_mismatches(self.trace, alive, followers, [mode])
            if runs[key]:
                return runs[key]
        return []

    def count_certified(self, mode: str) -> int:
        """Return how many structures ran the dense program in one mode."""
        return sum(not found for found in self._runs.get(mode, {}).values())

    def _certifies(self, alive: BoolArray, followers: Sequence[Follower], modes: Sequence[str] | None) -> bool:
        key = _key(alive, followers)
        if any(self._runs.get(mode, {}).get(key) for mode in modes or self.trace.events):
            return False
        return certifies(self.trace, alive, followers, modes)

    def _propose(
        self,
        axes: AxisTable,
        alive: BoolArray,
        mismatches: Sequence[Mismatch],
        followers: Sequence[Follower],
        guessed: set[tuple[Rule, str]],
        guess: Guess,
    ) -> dict[Rule, list[Place]]:
        """Return untried rules with what they may mend: for each axis known to be wrong one, else one guess."""
        taken = {(f.module, f.attribute, f.element) for f in followers}
        proposals: dict[Rule, list[Place]] = {}
        for mismatch, labels, stale in self._wrong(axes, alive, mismatches):
            rule = self._first(axes, mismatch, self._exact(mismatch, stale), taken, self._tried, proposals)
            if rule is not None:
                proposals.setdefault(rule, []).append((mismatch, labels))
        # a guess beside others could pass for what they mend
        for mismatch in mismatches if guess is not Guess.NONE and not proposals else ():
            is_stale = all(met in (None, len(labels)) for met, labels in mismatch.axes)
            if mismatch.is_size and (is_stale or guess is Guess.ANY):
                rule = self._first(axes, mismatch, self._guesses(axes, alive, mismatch), taken, guessed)
                if rule is not None:
                    return {rule: [(mismatch, None)]}
        return proposals

    def _wrong(
        self, axes: AxisTable, alive: BoolArray, mismatches: Sequence[Mismatch]
    ) -> Iterator[tuple[Mismatch, IntArray, IntArray]]:
        """Yield the axes that are wrong, with what has its old size still: themselves, or a factor of them."""
        for mismatch in mismatches:
            for met, labels in mismatch.axes:
                if met == len(labels):
                    yield mismatch, labels, labels
                elif met is not None:
                    yield from ((mismatch, labels, stale) for stale in axes.stale(labels, met, alive))

    def _first(
        self,
        axes: AxisTable,
        mismatch: Mismatch,
        candidates: Iterator[Candidate],
        taken: set[tuple[str, str, Element]],
        tried: set[tuple[Rule, str]],
        proposed: Collection[Rule] = (),
    ) -> Rule | None:
        """Return the first rule that has not been tried for such an op, if no integer of them is proposed already."""
        found = []
        for name, attribute, element, labels in candidates:
            view = axes.view(name, labels)
            rule = Rule(type(self._modules[name]), attribute, element, view)
            found.append((rule, name, attribute, element, labels, view))
        once = {(rule.owner, rule.attribute, rule.element): rule for rule in proposed}
        for rule, *_ in found:
            if (rule.owner, rule.attribute, rule.element) in once:  # an integer follows one axis: this may be it
                return rule if rule in proposed else None
        for rule, name, attribute, element, labels, view in found:
            is_new = (name, attribute, element) not in taken and (rule, mismatch.op) not in tried
            is_only = is_new and axes.find(name, len(labels), view) is not None  # of its kind from here
            if is_only and rule not in self._refuted:
                tried.add((rule, mismatch.op))
                return rule
        return None

    def _exact(self, mismatch: Mismatch, wanted: IntArray) -> Iterator[Candidate]:
        """Yield the integers on the stack that are as large as a wrong axis was, innermost first."""
        for module in mismatch.modules:
            name = self._names.get(id(module))
            if name is not None:
                sizes = self._read_integers(module)
                fits = [(a, e) for a, e, value in sizes if value == len(wanted)]
                yield from ((name, a, e, wanted) for a, e in sorted(fits, key=lambda fit: fit[1] is not None))

    def is_literal(self, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> bool:
        """Return whether no integer nearby is as large as any axis was: then a size is written out in the code."""
        return next(self._guesses(axes, alive, mismatch), None) is None

    def _guesses(self, axes: AxisTable, alive: BoolArray, mismatch: Mismatch) -> Iterator[Candidate]:
        """Yield the integers nearby that are as large as any axis was: an expression may have been made of them."""
        named = [(self._names[id(m)], m) for m in mismatch.modules if id(m) in self._names]
        for name, module in named[:_NEAR]:
            for attribute, element, value in self._read_integers(module):
                yield from ((name, attribute, element, labels) for labels in axes.changed(name, value, alive))

    def _read_integers(self, module: nn.Module) -> Iterator[tuple[str, Element, int]]:
        """Yield the integers of a module that the code of the model mentions; code of torch may read any."""
        names = self.trace.sandbox.memos.names
        foreign = any(not is_own(cls.__module__) for cls in type(module).__mro__ if cls not in (nn.Module, object))
        for attribute, element, value in integers_of(module):
            if foreign or attribute in names:  # what a config holds may have other names too
                yield attribute, element, value


def _key(alive: BoolArray, followers: Sequence[Follower]) -> tuple[bytes, frozenset[Any]]:
    """Return what tells a structure and its integers from others."""
    sizes = [(f.module, f.attribute, f.element, int(np.count_nonzero(alive[f.labels]))) for f in followers]
    return blake2b(alive.tobytes()).digest(), frozenset(sizes)


def _is_mended(mismatch: Mismatch, labels: IntArray | None, after: Sequence[Mismatch]) -> bool:
    """Return whether an op that was wrong is right now, at least along the axis in question."""
    for later in after:
        if later.mode != mismatch.mode or later.step > mismatch.step:
            continue
        if later.step == mismatch.step and (labels is None or any(axis is labels for _, axis in later.axes)):
            return False
        if later.fatal:
            return False
    return True
