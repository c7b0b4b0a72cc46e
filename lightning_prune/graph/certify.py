"""Prove a structure: run the pruned program in lockstep with the dense one, op by op.

Same ops on the same values in the same order, same scalars that are not sizes, fixed sizes unchanged, each labelled
axis exactly as long as its living labels, outputs unchanged in shape; and ops that take indices must take the living
part of what the dense program takes. Then the pruned model runs the dense program on the kept slices.

A patient run does not stop where an op disagrees: it goes on with the result that the op should have had, so that one
run finds all places that disagree.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune.graph.call import tensors_in
from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.decisions import Decisions
from lightning_prune.graph.kept import KeptCall
from lightning_prune.graph.labels import FIXED, Axis, IntArray, is_labelled
from lightning_prune.graph.mismatch import Met, Mismatch
from lightning_prune.graph.numbers import Numbers
from lightning_prune.graph.pruned import pruned_integers, pruned_tensors
from lightning_prune.graph.results import Results
from lightning_prune.graph.rules import RuleEntry
from lightning_prune.graph.scales import Scales, ratio_of, scale_of
from lightning_prune.graph.trace import DenseTrace, Event
from lightning_prune.graph.walk import ALIAS, Walk, identity, name_tensor

__all__ = ["certifies", "find_mismatches", "run_lockstep"]

_MOST = 300  # mismatches of one run; more of them teach nothing new
_EXACT, _SINGLE = 1e-9, 1e-6  # relative: how well numbers of Python agree, and those in tensors of float32
_SLICE = "aten::slice"
Scaled = Mapping[int, Any]  # step -> scalars


class Lockstep(Walk):
    """Compare every op with the dense log.

    Args:
        events: The dense log.
        alive: Per label, whether it lives.
        rules: Rules of the user.
        mode: The mode of fake tensors, None when the run is on real ones.
        patient: Collect mismatches and go on; on real tensors the first one always ends the run.
        scales: Step -> scalars that an op may have instead of the dense ones; None to work out which those are.
        aliases: How often the dense program aliased which value before which op.
    """

    def __init__(
        self,
        events: Sequence[Event],
        alive: BoolArray,
        rules: Mapping[str, RuleEntry],
        results: Results | None,
        patient: bool = False,
        scales: Scaled | None = None,
        aliases: Mapping[Any, int] | None = None,
    ) -> None:
        super().__init__(rules, results)
        self.aliases, self._aliased = Counter(aliases), Counter[Any]()
        self.events = events
        self.alive = alive
        self.patient = patient and results is not None
        self.found: list[Mismatch] = []
        self.rescaled: list[IntArray] = []  # axes from whose length the scale of an attention was worked out
        self._living: dict[int, int] = {}
        self._rescued = -1
        self._scales = Scales(events)
        self.numbers = Numbers(followed=results is not None)
        self._decisions = Decisions(lambda axis, size: self.expected(axis, size) != size)
        self._given = scales
        self.scaled: dict[int, Any] = {}  # step -> scalars that may differ from the dense ones

    def carry(self, name: str, source: Tensor, out: Tensor) -> Tensor:
        """The identity is carried already; an alias that is new is a slice that takes all, which torch leaves out."""
        if name != ALIAS or self.count >= len(self.events):
            return out
        event, value = self.events[self.count], identity(source)
        self._aliased[self.count, value] += 1
        is_new = self._aliased[self.count, value] > self.aliases[self.count, value]
        if not is_new or event.name != _SLICE or event.inputs != (value,):
            return out
        cut = [b for a, b in zip(event.in_axes[0], event.out_axes[0], strict=True) if is_labelled(b) and a is not b]
        out = self._disagree(self._mismatch(event, "it takes all there is", [(None, axis) for axis in cut]), out)
        name_tensor(out, (self.count, 0))
        self.count += 1
        return out

    def rescue(self, name: str, args: Mapping[str, Any], inputs: tuple[Any, ...], error: Exception) -> Any:
        """Take an op that failed for one with the right result, if it is the right op."""
        if isinstance(error, Mismatch):
            raise error
        event = self._event(name, inputs)
        what = f"{type(error).__name__}: {error}"
        self._rescued = self.count
        return self._disagree(self._mismatch(event, what, self._told_wrongly(event, args)), None)

    def visit(
        self, name: str, entry: RuleEntry, args: Mapping[str, Any], inputs: tuple[Any, ...], out: Any, before: Any
    ) -> Any:
        """Compare one op; return its result, or the one it should have had."""
        if self._rescued == self.count:
            return out
        event = self._event(name, inputs)
        if self.results is None:
            out = self._decisions.follow(event, self.count, out)
        found = self._compare_numbers(event, inputs, out) or self._compare_scalars(event, args)
        if found is None:
            found = self._compare_sizes(event, args, out)
        if found is None and entry.index:
            found = self._compare_indices(event, args, out)
        return out if found is None else self._disagree(found, out)

    def _event(self, name: str, inputs: tuple[Any, ...]) -> Event:
        """Return the dense op that this op must be."""
        if self.count >= len(self.events):
            raise Mismatch(f"an op `{name}` that the dense model does not run", self.count)
        event = self.events[self.count]
        if name != event.name or self.numbers.given(inputs, event) is None:
            what = f"`{name}` runs where the dense model runs `{event.name}`"
            if name == event.name:
                what = f"`{name}` is given other values: the result of another op, or a constant that is made of a size"
            raise Mismatch(what, self.count, event)
        return event

    def _disagree(self, mismatch: Mismatch, out: Any) -> Any:
        """Note a mismatch and return the result that the op should have had; the end of a run that is not patient."""
        event = mismatch.event
        assert event is not None, "an op disagrees with another"
        tensors = tensors_in(out)
        whole = len(event.out_kinds) == 1 or event.container is not None
        if not self.patient or not whole or len(self.found) >= _MOST:
            raise mismatch
        mismatch.modules = _modules_of(frame for frame, _ in traceback.walk_stack(None))
        mismatch.fatal = False
        self.found.append(mismatch)
        results = []
        for k, (axes, shape) in enumerate(zip(event.out_axes, event.out_shapes, strict=True)):
            found = tuple(tensors[k].shape) if k < len(tensors) and tensors[k].dim() == len(shape) else shape
            sizes = [self.expected(a, n) for a, n in zip(axes, shape, strict=True)]
            right = [n if size is None else size for n, size in zip(found, sizes, strict=True)]
            if k < len(tensors) and list(tensors[k].shape) == right:
                results.append(tensors[k])
            else:
                assert self.results is not None, "patient runs are on fake tensors"
                results.append(self.results.mode.make(*event.out_kinds[k], right))
        return results[0] if event.container is None else event.container(results)

    def _compare_scalars(self, event: Event, args: Mapping[str, Any]) -> Mismatch | None:
        """Scalars are the same, but for the scale of an attention that is worked out from what it sums over."""
        scalars = event.entry.scalars(args, event.in_axes)
        if scalars == event.scalars:
            return None
        if self._is_scale(scale_of(event, scalars), scalars, _EXACT):
            return None
        pair = next(((a, b) for a, b in zip(scalars, event.scalars, strict=True) if a != b), None)
        what = f"it takes {pair and pair[0]} where the dense model takes {pair and pair[1]}"
        return self._mismatch(event, what, is_size=False)

    def _compare_numbers(self, event: Event, inputs: tuple[Any, ...], out: Any) -> Mismatch | None:
        """Numbers in tensors are the same, but for those that other numbers are made of, and for such a scale."""
        pairs = self.numbers.given(inputs, event)
        if not pairs or self.numbers.follow(self.count, event, out):
            return None
        if self._is_scale(ratio_of(event, pairs), pairs, _SINGLE):
            return None
        now, dense = next(iter(pairs.values()))
        what = f"it takes {now:g}, made of a size, where the dense model takes {dense:g}"
        return self._mismatch(event, what, is_size=False)

    def _is_scale(self, ratio: float | None, given: Any, tolerance: float) -> bool:
        """Return whether what an op is given instead of the dense number is a scale of attention that may differ."""
        if self._given is None:
            axes = [] if ratio is None else self._scales.rescaled(self.count, ratio, self.alive, tolerance)
            self.rescaled += axes
            self.scaled |= {self.count: given} if axes else {}
        return bool((self.scaled if self._given is None else self._given).get(self.count) == given)

    def _compare_sizes(self, event: Event, args: Mapping[str, Any], out: Any) -> Mismatch | None:
        outputs = tensors_in(out)
        if len(outputs) != len(event.out_axes):
            what = f"{len(outputs)} results instead of {len(event.out_axes)}"
            return self._mismatch(event, what, self._told_wrongly(event, args))
        wrong, first = [], ""
        for tensor, axes, shape in zip(outputs, event.out_axes, event.out_shapes, strict=True):
            if tensor.dim() != len(axes):
                return self._mismatch(event, f"{tensor.dim()} axes instead of {len(axes)}")
            for d, (size, axis, dense) in enumerate(zip(tensor.shape, axes, shape, strict=True)):
                expected = self.expected(axis, dense)
                if expected is not None and size != expected:
                    first = first or f"axis {d} of the result has {size} entries instead of {expected}"
                    wrong += [(size, axis)] if is_labelled(axis) else []
        if first:
            return self._mismatch(event, first, self._told_wrongly(event, args) or wrong)  # the others are inferred
        if event.pins:
            inputs = tensors_in(args)
            for k, d in event.pins:
                if inputs[k].shape[d] != event.in_shapes[k][d]:
                    return self._mismatch(event, f"a constant axis of {event.in_shapes[k][d]} entries changes")
        return None

    def expected(self, axis: Axis, dense: int) -> int | None:
        """Return the size an axis must have, None where it follows what it meets."""
        if is_labelled(axis):
            living = self._living.get(id(axis))
            if living is None:
                living = self._living[id(axis)] = int(np.count_nonzero(self.alive[axis]))
            return living
        return dense if axis == FIXED else None

    def _mismatch(self, event: Event, what: str, axes: Sequence[Met] = (), *, is_size: bool = True) -> Mismatch:
        reason = f"`{event.name.removeprefix('aten::')}`: {what}"
        return Mismatch(reason, self.count, event, axes or self._changed(event), is_size=is_size)

    def _changed(self, event: Event) -> list[Met]:
        """Return the labelled axes of an op that lose channels, those of its results first."""
        axes = [a for group in (*event.out_axes, *event.in_axes) for a in group if is_labelled(a)]
        distinct = {id(a): a for a in axes if self.expected(a, len(a)) != len(a)}
        return [(None, axis) for axis in distinct.values()]

    def _told_wrongly(self, event: Event, args: Mapping[str, Any]) -> list[Met]:
        """Return the axes whose size an op was told wrongly."""
        wrong: list[Met] = []
        for name in event.entry.sizes:
            given = args.get(name)
            axes = event.out_axes[0]
            if isinstance(given, int) and len(event.out_axes) > 1:
                given = [given] * len(event.out_axes)
            if not isinstance(given, (list, tuple)):
                continue
            if len(event.out_axes) > 1 and len(given) == len(event.out_axes):
                axes = tuple(a[args["dim"]] for a in event.out_axes)
            elif len(given) != len(axes):  # of one axis that is taken apart
                axes = axes[args.get("dim", 0) % max(1, len(axes) - len(given) + 1) :]
            for size, axis in zip(given, axes, strict=False):
                if is_labelled(axis) and size not in (-1, self.expected(axis, len(axis))):
                    wrong.append((size, axis))
        return wrong

    def _compare_indices(self, event: Event, args: Mapping[str, Any], out: Any) -> Mismatch | None:
        pairs = (
            (a, n)
            for axes, shape in zip(event.in_axes, event.in_shapes, strict=True)
            for a, n in zip(axes, shape, strict=True)
        )
        uncut = all(self.expected(a, n) == n for a, n in pairs if is_labelled(a))
        if uncut and event.entry.taken(args) == event.sizes:
            return None
        kept = {id(t): [self._kept(a) for a in axes] for t, axes in zip(tensors_in(args), event.in_axes, strict=True)}
        call = KeptCall(event.name, args, out, kept)
        event.entry.apply(call)
        for tensor, axes in zip(call.outputs, event.out_axes, strict=True):
            for axis, result in zip(axes, call.results[id(tensor)], strict=True):
                if is_labelled(axis) and not self._same(self._kept(axis), result):
                    return self._mismatch(event, "it takes other channels")
        return None

    def _kept(self, axis: Axis) -> Axis:
        return axis[self.alive[axis]] if is_labelled(axis) else axis

    def _same(self, expected: IntArray, result: Axis) -> bool:
        # padding gets fresh labels: frozen ones on both sides, so the count (already equal) is what matters there
        if not is_labelled(result):
            return True
        fresh = ~np.isin(expected, self._before(expected))
        return len(expected) == len(result) and bool(np.array_equal(expected[~fresh], result[~fresh]))

    def _before(self, expected: IntArray) -> IntArray:
        known = [a for axes in self.events[self.count].in_axes for a in axes if is_labelled(a)]
        return np.concatenate(known) if known else expected[:0]


def run_lockstep(
    trace: DenseTrace,
    alive: BoolArray,
    followers: Sequence[Follower],
    modes: Sequence[str] | None = None,
    scales: Mapping[str, Scaled] | None = None,
) -> dict[str, Scaled]:
    """Certify one structure in every traced mode.

    Args:
        trace: The dense trace.
        alive: Per label, whether it lives.
        followers: Integers to rewrite.
        modes: Which of the traced modes to run; all by default.
        scales: What another run returned: the scales of attention must be the same ones.

    Returns:
        Mode -> step -> scalars, of the ops whose scale is worked out from a length that changed.

    Raises:
        Mismatch: The pruned program differs, or the model fails on the pruned sizes.
    """
    scaled = {}
    for mode in modes or trace.events:
        given = None if scales is None else scales.get(mode, {})
        found, scaled[mode] = _run(trace, alive, followers, mode, patient=False, scales=given)
        for mismatch in found:
            raise mismatch
    return scaled


def certifies(
    trace: DenseTrace, alive: BoolArray, followers: Sequence[Follower], modes: Sequence[str] | None = None
) -> bool:
    """Return whether a structure certifies; see `run_lockstep`."""
    try:
        run_lockstep(trace, alive, followers, modes)
    except Mismatch:
        return False
    return True


def find_mismatches(
    trace: DenseTrace, alive: BoolArray, followers: Sequence[Follower], modes: Sequence[str] | None = None
) -> list[Mismatch]:
    """Return all places where the pruned program differs, in the first traced mode that has any; none: certified.

    Args:
        trace: The dense trace.
        alive: Per label, whether it lives.
        followers: Integers to rewrite.
        modes: Which of the traced modes to run; all by default.
    """
    runs = (_run(trace, alive, followers, mode, patient=True)[0] for mode in modes or trace.events)
    return next(filter(None, runs), [])


def _run(
    trace: DenseTrace,
    alive: BoolArray,
    followers: Sequence[Follower],
    mode: str,
    *,
    patient: bool,
    scales: Scaled | None = None,
) -> tuple[list[Mismatch], Scaled]:
    model = trace.sandbox.model
    trace.sandbox.fake = mode not in trace.real
    with trace.sandbox.without_gradients():
        stand_ins = pruned_tensors(trace, alive)
        doubled = mode == "train" and trace.train_inputs is not None
        args, kwargs = trace.sandbox.inputs(trace.train_inputs if doubled else (trace.args, trace.kwargs))
        for k, tensor in enumerate(tensors_in((args, kwargs))):
            name_tensor(tensor, f"input {k}")
    results, aliases = trace.sandbox.results, trace.aliases.get(mode)
    watch = Lockstep(trace.events[mode], alive, trace.rules, results, patient, scales, aliases)
    forward, attributes = partial(model, *args, **kwargs), pruned_integers(trace, alive, followers)
    try:
        for follower in followers:
            if not alive[follower.labels].any():
                raise Mismatch(f"`{follower.attribute}` of {follower.module or type(model).__name__} becomes 0", 0)
        output = trace.sandbox.run(stand_ins, forward, watch, train=mode == "train", attributes=attributes)
        if watch.count != len(watch.events):
            raise Mismatch("the pruned program ends early", watch.count)
        returned = trace.sandbox.outputs(output)
        if any(watch.numbers.holds(identity(t)) for t in returned):
            raise Mismatch("it returns a number that is made of a size", watch.count)
        shapes = [tuple(t.shape) for t in returned]
        if shapes != trace.out_shapes[mode]:
            raise Mismatch(f"outputs of shapes {shapes} instead of {trace.out_shapes[mode]}", watch.count)
    except Exception as error:  # what a forward raises on sizes that it was not made for
        last = error if isinstance(error, Mismatch) else Mismatch(f"{type(error).__name__}: {error}", watch.count)
        if last is not error:
            last.__cause__ = error
        last.modules = _modules_of([frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1])
        watch.found.append(last)
    for mismatch in watch.found:
        mismatch.mode = mode
    trace.space.mark_once("rescaled", watch.rescaled)
    return watch.found, watch.scaled


def _modules_of(frames: Iterable[FrameType]) -> list[nn.Module]:
    """Return the modules whose methods are running in these frames, each once, in their order."""
    modules: dict[int, nn.Module] = {}
    for frame in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.setdefault(id(owner), owner)
    return list(modules.values())
