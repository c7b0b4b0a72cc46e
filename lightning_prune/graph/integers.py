"""Integers that must follow: sizes that models keep in Python attributes and use in their forward.

Known torch layers have a table. For the rest the certificate teaches: when a pruned run fails, an int of a module on
the failing stack that equals an old size is set to the new one; what then gets further is learned, per module class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_prune.graph.certify import Mismatch, run_lockstep
from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.closure import BoolArray, Closure
from lightning_prune.graph.labels import Axis, IntArray, is_labelled
from lightning_prune.graph.partition import Partition
from lightning_prune.graph.trace import DenseTrace

__all__ = ["Integers", "known_followers"]

_RULES_PER_ATTEMPT = 12  # a model whose ints need more rewrites than this for one unit is frozen instead
Shape = tuple[tuple[str, ...], ...]  # what an axis is made of: axis names of the units of each of its terms


def known_followers(trace: DenseTrace) -> list[Follower]:
    """Return the integers of torch's own layers that their forward uses."""
    found = []
    first = {id(t): n for n, t in (*trace.sandbox.model.named_parameters(), *trace.sandbox.model.named_buffers())}
    for name, module in trace.sandbox.model.named_modules():
        weight = dict(module._parameters).get("weight")  # scripted modules have no plain dict
        axes = trace.axes.get(first.get(id(weight), ""), ()) if weight is not None else ()
        for attribute, element, axis in _table(trace, module, axes):
            if is_labelled(axis) and attribute in module.__dict__:
                found.append(Follower(name, attribute, element, axis))
    return found


def _table(trace: DenseTrace, module: nn.Module, axes: Sequence[Axis]) -> Iterator[tuple[str, int | None, Axis]]:
    if not axes:
        return
    if isinstance(module, _ConvNd) and module.groups > 1:
        yield "groups", None, trace.space.split(axes[0], (module.groups, module.weight.shape[0] // module.groups))[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        for k, axis in enumerate(axes):
            yield "normalized_shape", k, axis
    elif isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
        yield "num_groups", None, axes[0]
    elif isinstance(module, _InstanceNorm):
        yield "num_features", None, axes[0]


@dataclass
class Integers:
    """What was learned about the integers of one model.

    Args:
        trace: The dense trace.
        known: Followers from the table.
        registered: Followers that the user named.
        learned: `(module class, attribute, element) -> the axes` that it may follow, as seen from the module.
    """

    trace: DenseTrace
    known: list[Follower] = field(default_factory=list)
    registered: list[Follower] = field(default_factory=list)
    learned: dict[tuple[type[nn.Module], str, int | None], list[View]] = field(default_factory=dict)

    def followers(self, closure: Closure, units: Partition) -> list[Follower]:
        """Return every integer that follows: the table, and what was learned applied to all modules of the class."""
        found = [*self.registered, *self.known]
        taken = {(f.module, f.attribute, f.element) for f in found}
        axes = _Axes(self.trace, closure, units)
        for name, module in self.trace.sandbox.model.named_modules():
            for attribute, element, value in integers_of(module):
                if (name, attribute, element) in taken:
                    continue
                views = self.learned.get((type(module), attribute, element), ())
                matches = (axes.find(name, value, view) for view in views)
                labels = next((m for m in matches if m is not None), None)
                if labels is not None:
                    found.append(Follower(name, attribute, element, labels))
        return found

    def learn(self, closure: Closure, units: Partition, alive: BoolArray) -> Mismatch | None:
        """Rewrite integers until the structure certifies; remember those that were needed.

        Args:
            closure: The classes.
            units: The units.
            alive: Per label, whether it lives in the structure to certify.

        Returns:
            None on success, else the mismatch that no integer mends.
        """
        followers = self.followers(closure, units)
        failure = self._attempt(alive, followers, ["eval"]) or self._attempt(alive, followers)
        axes = _Axes(self.trace, closure, units)
        extra: list[Follower] = []
        while failure is not None and len(extra) < _RULES_PER_ATTEMPT:
            step = self._advance(axes, alive, followers, extra, failure)
            if step is None:
                return failure
            follower, failure = step
            extra.append(follower)
        if failure is not None:
            return failure
        for follower in list(extra):  # keep only what is needed
            fewer = [f for f in extra if f is not follower]
            if self._attempt(alive, followers + fewer) is None:
                extra = fewer
        modules = dict(self.trace.sandbox.model.named_modules())
        for follower in extra:
            key = (type(modules[follower.module]), follower.attribute, follower.element)
            views = self.learned.setdefault(key, [])
            view = axes.view(follower.module, follower.labels)
            if view not in views:
                views.append(view)
        return None

    def _advance(
        self, axes: _Axes, alive: BoolArray, followers: list[Follower], extra: list[Follower], failure: Mismatch
    ) -> tuple[Follower, Mismatch | None] | None:
        """Return the first rewrite that gets further, and the failure it runs into, if any."""
        names = {id(m): n for n, m in self.trace.sandbox.model.named_modules()}
        tried = {(f.module, f.attribute, f.element) for f in (*followers, *extra)}
        for module in failure.modules:
            name = names.get(id(module))
            if name is None:
                continue
            for attribute, element, value in integers_of(module):
                if (name, attribute, element) in tried:
                    continue
                for labels in axes.changed(name, value, alive):
                    follower = Follower(name, attribute, element, labels)
                    rewrites = [*followers, *extra, follower]
                    result = self._attempt(alive, rewrites, ["eval"]) or self._attempt(alive, rewrites)
                    if result is None or result.step > failure.step:
                        return follower, result
        return None

    def _attempt(
        self, alive: BoolArray, followers: Sequence[Follower], modes: Sequence[str] | None = None
    ) -> Mismatch | None:
        try:
            run_lockstep(self.trace, alive, followers, modes)
        except Mismatch as mismatch:
            return mismatch
        return None


def integers_of(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield `(attribute, element, value)` of the ints above 1 that a module keeps, alone or in tuples and lists."""
    for attribute, value in list(module.__dict__.items()):
        if attribute.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) and value > 1:
            yield attribute, None, value
        elif isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            yield from ((attribute, k, v) for k, v in enumerate(value) if v > 1)


@dataclass(frozen=True)
class View:
    """An axis as seen from a module, so that it can be found again in another module of the class.

    Args:
        tensor: Name of the parameter relative to the module; None for one outside it.
        ordinal: Which of the axes and grid factors of that parameter.
        shape: What the axis is made of.
    """

    tensor: str | None
    ordinal: int
    shape: Shape


class _Axes:
    """The axes that an integer may be the length of: those of parameters, and the factors of grids."""

    def __init__(self, trace: DenseTrace, closure: Closure, units: Partition) -> None:
        self.closure, self.units = closure, units
        factors: dict[bytes, list[IntArray]] = {}
        for product in closure.products:
            factors.setdefault(closure.classes[product.flat].tobytes(), []).extend(product.axes)
        self._entries: list[tuple[str, int, IntArray]] = []
        for tensor, axes in trace.axes.items():
            found: list[IntArray] = []
            for axis in axes:
                if is_labelled(axis):
                    found += [axis, *factors.get(closure.classes[axis].tobytes(), ())]
            self._entries += [(tensor, k, axis) for k, axis in enumerate(found)]
        self._shapes: dict[int, Shape] = {}

    def shape(self, labels: IntArray) -> Shape:
        """Return what an axis is made of, in words that hold for every module of a kind."""
        known = self._shapes.get(id(labels))
        if known is None:
            known = self._shapes[id(labels)] = tuple(
                sorted({tuple(sorted(self.units.units[u].axis for u in members)) for members in self._members(labels)})
            )
        return known

    def _members(self, labels: IntArray) -> set[tuple[int, ...]]:
        """Return the sets of units that positions of an axis live by."""
        positions, classes = self.closure.living_by(labels)
        owners = self.units.owner[classes]
        by_position: dict[int, list[int]] = {}
        for position, owner in zip(positions[owners >= 0].tolist(), owners[owners >= 0].tolist(), strict=True):
            by_position.setdefault(position, []).append(owner)
        return {tuple(sorted(owners)) for owners in by_position.values()}

    def view(self, module: str, labels: IntArray) -> View:
        """Describe an axis as seen from a module."""
        prefix = f"{module}." if module else ""
        for tensor, ordinal, axis in self._entries:
            if axis is labels and tensor.startswith(prefix):
                return View(tensor[len(prefix) :], ordinal, self.shape(labels))
        return View(None, 0, self.shape(labels))

    def find(self, module: str, size: int, view: View) -> IntArray | None:
        """Return the axis of a module that a view describes; None where none does, or several that differ."""
        prefix = f"{module}." if module else ""
        fits = [
            (t, k, a)
            for t, k, a in self._entries
            if len(a) == size and t.startswith(prefix) and self.shape(a) == view.shape
        ]
        exact = [a for t, k, a in fits if t[len(prefix) :] == view.tensor and k == view.ordinal]
        if exact:
            return exact[0]
        distinct = {frozenset(self._members(a)) for _, _, a in fits}
        return fits[0][2] if len(distinct) == 1 else None

    def changed(self, module: str, size: int, alive: BoolArray) -> list[IntArray]:
        """Return axes of a size whose length changes, one for each new length, those inside the module first."""
        prefix = f"{module}." if module else ""
        sized = [(t, a) for t, _, a in self._entries if len(a) == size]
        near = [a for t, a in sized if t.startswith(prefix)] + [a for t, a in sized if not t.startswith(prefix)]
        by_length: dict[int, IntArray] = {}
        for axis in near:
            living = int(np.count_nonzero(alive[axis]))
            if living != size:
                by_length.setdefault(living, axis)
        return list(by_length.values())
