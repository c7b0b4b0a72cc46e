"""Prove a structure: run the pruned program in lockstep with the dense one, op by op.

Same ops on the same values in the same order, same scalars that are not sizes, fixed sizes unchanged, each labelled
axis exactly as long as its living labels, outputs unchanged in shape; and ops that take indices must take the living
part of what the dense program takes. Then the pruned model runs the dense program on the kept slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_prune.graph.call import Call, tensors_in
from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.labels import FIXED, Axis, IntArray, LabelSpace, is_labelled
from lightning_prune.graph.rules import RuleEntry
from lightning_prune.graph.sandbox import named_tensors
from lightning_prune.graph.trace import DenseTrace, Event, Walk, name_tensor, scalars_of

__all__ = ["Mismatch", "run_lockstep"]


class Mismatch(Exception):  # noqa: N818  # a finding that refinement works with, not an error a user sees
    """The pruned program is not the dense one.

    Args:
        reason: What differs, and where.
        step: How many ops agreed.
        event: The dense op, None where the programs differ in length or the model itself failed.
    """

    def __init__(self, reason: str, step: int, event: Event | None = None) -> None:
        super().__init__(reason)
        self.step = step
        self.event = event
        self.modules: list[nn.Module] = []


class _KeptCall(Call):
    """An op that takes indices, seen on the raw labels of the living channels."""

    def __init__(self, name: str, args: Mapping[str, Any], out: Any, axes: Mapping[int, list[Axis]]) -> None:
        super().__init__(name, args, out, LabelSpace(), {})
        self._kept = axes
        self.results: dict[int, list[Axis]] = {}

    def axes(self, tensor: Tensor) -> list[Axis]:
        return list(self._kept.get(id(tensor), [FIXED] * tensor.dim()))

    def put(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        self.results[id(tensor)] = list(axes)

    def bind(self, a: Axis, b: Axis) -> Axis:
        return a if is_labelled(a) else b

    def freeze(self, axis: Axis, why: str = "") -> None:
        """Nothing to learn: the dense trace froze it."""


class Lockstep(Walk):
    """Compare every op with the dense log.

    Args:
        events: The dense log.
        alive: Per label, whether it lives.
        rules: Rules of the user.
    """

    def __init__(
        self, events: Sequence[Event], alive: BoolArray, rules: Mapping[str, RuleEntry], mode: FakeTensorMode | None
    ) -> None:
        super().__init__(rules, mode)
        self.events = events
        self.alive = alive
        self._living: dict[int, int] = {}

    def carry(self, source: Tensor, out: Tensor) -> None:
        """The identity is carried already."""

    def visit(
        self, name: str, entry: RuleEntry, args: Mapping[str, Any], inputs: tuple[Any, ...], out: Any, before: Any
    ) -> None:
        """Compare one op."""
        if self.count >= len(self.events):
            raise Mismatch(f"an op `{name}` that the dense model does not run", self.count)
        event = self.events[self.count]
        if name != event.name or inputs != event.inputs:
            raise Mismatch(f"`{name}` runs where the dense model runs `{event.name}`", self.count, event)
        scalars = scalars_of(entry, args)
        if scalars != event.scalars:
            pair = next(((a, b) for a, b in zip(scalars, event.scalars, strict=True) if a != b), None)
            raise Mismatch(
                f"`{name}` takes {pair and pair[0]} where the dense model takes {pair and pair[1]}", self.count, event
            )
        self._compare_sizes(event, args, out)
        if entry.index:
            self._compare_indices(event, args, out)

    def _compare_sizes(self, event: Event, args: Mapping[str, Any], out: Any) -> None:
        outputs = tensors_in(out)
        for tensor, axes, shape in zip(outputs, event.out_axes, event.out_shapes, strict=True):
            if tensor.dim() != len(axes):
                raise self._mismatch(event, f"{tensor.dim()} axes instead of {len(axes)}")
            for d, (size, axis, dense) in enumerate(zip(tensor.shape, axes, shape, strict=True)):
                expected = self.expected(axis, dense)
                if expected is not None and size != expected:
                    raise self._mismatch(event, f"axis {d} of the result has {size} entries instead of {expected}")
        if event.pins:
            inputs = tensors_in(args)
            for k, d in event.pins:
                if inputs[k].shape[d] != event.in_shapes[k][d]:
                    raise self._mismatch(event, f"a constant axis of {event.in_shapes[k][d]} entries changes")

    def expected(self, axis: Axis, dense: int) -> int | None:
        """Return the size an axis must have, None where it follows what it meets."""
        if is_labelled(axis):
            living = self._living.get(id(axis))
            if living is None:
                living = self._living[id(axis)] = int(np.count_nonzero(self.alive[axis]))
            return living
        return dense if axis == FIXED else None

    def _mismatch(self, event: Event, what: str) -> Mismatch:
        return Mismatch(f"`{event.name.removeprefix('aten::')}`: {what}", self.count, event)

    def _compare_indices(self, event: Event, args: Mapping[str, Any], out: Any) -> None:
        pairs = (
            (a, n)
            for axes, shape in zip(event.in_axes, event.in_shapes, strict=True)
            for a, n in zip(axes, shape, strict=True)
        )
        if all(self.expected(a, n) == n for a, n in pairs if is_labelled(a)):
            return
        kept = {id(t): [self._kept(a) for a in axes] for t, axes in zip(tensors_in(args), event.in_axes, strict=True)}
        call = _KeptCall(event.name, args, out, kept)
        event.entry.apply(call)
        for tensor, axes in zip(call.outputs, event.out_axes, strict=True):
            for axis, result in zip(axes, call.results[id(tensor)], strict=True):
                if is_labelled(axis) and not self._same(self._kept(axis), result):
                    raise self._mismatch(event, "it takes other channels")

    def _kept(self, axis: Axis) -> Axis:
        return axis[self.alive[axis]] if is_labelled(axis) else axis

    def _same(self, expected: IntArray, result: Axis) -> bool:
        # padding gets fresh labels: frozen ones on both sides, so the count (already equal) is what matters there
        if not is_labelled(result):
            return True
        fresh = ~np.isin(expected, self._before(expected))
        return len(expected) == len(result) and bool(np.array_equal(expected[~fresh], result[~fresh]))

    def _before(self, expected: IntArray) -> IntArray:
        event = self.events[self.count]
        known = [a for axes in event.in_axes for a in axes if is_labelled(a)]
        return np.concatenate(known) if known else expected[:0]


def run_lockstep(
    trace: DenseTrace, alive: BoolArray, followers: Sequence[Follower], modes: Sequence[str] | None = None
) -> None:
    """Certify one structure in every traced mode.

    Args:
        trace: The dense trace.
        alive: Per label, whether it lives.
        followers: Integers to rewrite.
        modes: Which of the traced modes to run; all by default.

    Raises:
        Mismatch: The pruned program differs, or the model fails on the pruned sizes.
    """
    model = trace.sandbox.model
    attributes = rewritten(trace, alive, followers)
    for mode in modes or trace.events:
        trace.sandbox.fake = mode not in trace.real
        with torch.inference_mode():
            stand_ins = _pruned_tensors(trace, alive)
            doubled = mode == "train" and trace.train_inputs is not None
            args, kwargs = trace.sandbox.inputs(trace.train_inputs if doubled else (trace.args, trace.kwargs))
            for k, tensor in enumerate(tensors_in((args, kwargs))):
                name_tensor(tensor, f"input {k}")
        watch = Lockstep(trace.events[mode], alive, trace.rules, trace.sandbox.fake_mode)
        forward = partial(model, *args, **kwargs)
        try:
            output = trace.sandbox.run(stand_ins, forward, watch, train=mode == "train", attributes=attributes)
        except Exception as error:
            found = error if isinstance(error, Mismatch) else Mismatch(f"{type(error).__name__}: {error}", watch.count)
            found.modules = _modules_on_stack(error)
            raise found from error
        if watch.count != len(watch.events):
            raise Mismatch("the pruned program ends early", watch.count)
        shapes = [tuple(t.shape) for t in trace.sandbox.outputs(output)]
        if shapes != trace.out_shapes[mode]:
            raise Mismatch(f"outputs of shapes {shapes} instead of {trace.out_shapes[mode]}", watch.count)


def _modules_on_stack(error: BaseException) -> list[nn.Module]:
    """Return the modules whose methods were running when the error arose, innermost first."""
    modules: list[nn.Module] = []
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not any(owner is m for m in modules):
            modules.insert(0, owner)
        frame = frame.tb_next
    return modules


def _pruned_tensors(trace: DenseTrace, alive: BoolArray) -> dict[int, Tensor]:
    stand_ins = {}
    for name, held in named_tensors(trace.sandbox.model).items():
        tensor = trace.sandbox.as_found(name, held)
        axes = trace.axes.get(name, (FIXED,) * tensor.dim())
        shape = [
            int(np.count_nonzero(alive[axis])) if is_labelled(axis) else size
            for axis, size in zip(axes, tensor.shape, strict=True)
        ]
        if shape == list(tensor.shape):
            stand_in = trace.sandbox.make_like(tensor)
        else:
            kept = [np.flatnonzero(alive[axis]) if is_labelled(axis) else None for axis in axes]
            stand_in = trace.sandbox.make_sized(tensor, shape, lambda d, kept=kept: torch.from_numpy(kept[d]))  # type: ignore[misc]
        name_tensor(stand_in, name)
        stand_ins[id(held)] = stand_in
    return stand_ins


def rewritten(trace: DenseTrace, alive: BoolArray, followers: Sequence[Follower]) -> dict[tuple[str, str], Any]:
    """Return `(module, attribute) -> value` for the integers that follow."""
    modules = dict(trace.sandbox.model.named_modules())
    values: dict[tuple[str, str], Any] = {}
    for follower in followers:
        key = (follower.module, follower.attribute)
        size = int(np.count_nonzero(alive[follower.labels]))
        old = values.get(key, modules[follower.module].__dict__[follower.attribute])
        values[key] = size if follower.element is None else replace_element(old, follower.element, size)
    return values


def replace_element(sequence: Any, element: int, value: int) -> Any:
    """Return a copy of a tuple or list of ints with one element replaced, of the same type."""
    changed = [value if k == element else v for k, v in enumerate(sequence)]
    return type(sequence)(changed)
