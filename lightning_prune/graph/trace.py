"""The dense trace: watch a model run op by op, label axes by the rules, and log every op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.errors import ConfigError, TraceError
from lightning_prune.graph.call import (
    Call,
    Rule,
    axes_of,
    copy_unread,
    is_floating,
    is_weight,
    mark_weight,
    note_read,
    set_axes,
    tensors_in,
)
from lightning_prune.graph.contents import named_tensors
from lightning_prune.graph.decisions import choice_of
from lightning_prune.graph.event import VIEWS, Event
from lightning_prune.graph.filled import Unwatched, find_filled
from lightning_prune.graph.labels import ANY, Axis, LabelSpace, is_labelled
from lightning_prune.graph.memory import Memory, mark_written, storage_of, written_dims
from lightning_prune.graph.modes import same_program, watched_mode
from lightning_prune.graph.numbers import number_of
from lightning_prune.graph.results import Results
from lightning_prune.graph.rules import RuleEntry, check_rules
from lightning_prune.graph.rules.indexing import unknown
from lightning_prune.graph.sandbox import Sandbox
from lightning_prune.graph.walk import ALIAS, UNKNOWN, Walk, identity, name_tensor
from lightning_prune.graph.zeros import copy_zeroed, mark_zeroed, spread_zeros

__all__ = ["DenseTrace", "Event", "trace_model"]


class Recorder(Walk):
    """Label axes by the rules and log every op."""

    def __init__(
        self,
        space: LabelSpace,
        rules: Mapping[str, RuleEntry],
        results: Results | None,
        module_names: Mapping[int, str],
        outside: Mapping[int, str],
    ) -> None:
        super().__init__(rules, results)
        self.space = space
        self.module_names = module_names
        self.outside = outside
        self.memory = Memory()
        self.events: list[Event] = []
        self.aliases: Counter[Any] = Counter()
        self.read: set[Any] = set()
        self.leaked: dict[str, str] = {}
        self.parameters: Mapping[str, int] = {}  # name -> the memory it lies in
        self.unknown: dict[str, int] = {}

    def carry(self, name: str, source: Tensor, out: Tensor) -> Tensor:
        """Copies have the axes of their source."""
        if name == ALIAS:
            self.aliases[self.count, identity(source)] += 1
        self._notice(source)
        set_axes(out, axes_of(source))
        self.memory.watch(out, axes_of(out))
        mark_written(out, written_dims(source))
        copy_zeroed(source, out)
        copy_unread(source, out)
        if is_weight(source):
            mark_weight(out)
        return out

    def visit(
        self, name: str, entry: RuleEntry, args: Mapping[str, Any], inputs: tuple[Any, ...], out: Any, before: Any
    ) -> Any:
        """Apply the rule and log the op."""
        call = Call(name, args, out, self.space, self.module_names, self.memory)
        call.before = before
        tensors = call.inputs
        self._notice(*tensors)
        own = self.parameters.get(inputs[0]) if name.endswith("_") and inputs else None
        if own and own == storage_of(tensors[0]):  # a copy goes by the same name
            self.leaked.setdefault(inputs[0], "written to by forward")
        if any(t.is_nested for t in call.outputs):
            raise TraceError("nested tensors have no sizes that could be followed")
        self.read.update(i for i in inputs if isinstance(i, str))
        in_axes = tuple(tuple(call.axes_before(t) if before and k == 0 else axes_of(t)) for k, t in enumerate(tensors))
        if entry is UNKNOWN:
            self.unknown[name] = self.unknown.get(name, 0) + 1
        self._apply(entry, call)
        outputs = call.outputs
        if not call.costs and any(map(is_weight, tensors)) and all(is_weight(t) or not t.dim() for t in tensors):
            for tensor in outputs:  # what is made of weights alone, but for products: those make activations too
                mark_weight(tensor)
        place = {id(t): k for k, t in enumerate(tensors)}
        self.events.append(
            Event(
                name,
                entry,
                entry.scalars(args, in_axes),
                entry.taken(args),
                inputs,
                in_axes,
                tuple(tuple(t.shape) for t in tensors),
                tuple(tuple(axes_of(t)) for t in outputs),
                tuple(tuple(t.shape) for t in outputs),
                tuple((place[id(t)], d) for t, d in call.pins),
                tuple(call.costs),
                tuple(0 if name in VIEWS or name.endswith("_") else t.element_size() for t in outputs),
                tuple((t.dtype, t.device) for t in outputs),
                type(out) if isinstance(out, (list, tuple)) and len(out) == len(outputs) else None,
                () if self.results else choice_of(name, args, out),
                number_of(out) if self.results and isinstance(out, Tensor) and not out.dim() else None,
            )
        )
        return out

    def _notice(self, *tensors: Tensor) -> None:
        """Note which of the tensors a model holds were not read as attributes of their modules."""
        for tensor in tensors:
            if id(tensor) in self.outside:
                self.leaked.setdefault(self.outside[id(tensor)], "reached around the module that owns it")

    def _apply(self, entry: RuleEntry, call: Call) -> None:
        """Apply a rule; one of ours that fails freezes what the op touches: the model is not to blame."""
        try:
            entry.apply(call)
            spread_zeros(call)
        except Exception as error:  # a rule may be the user's
            if call.name in self.rules:
                raise ConfigError(
                    f"Got a rule for {call.name} that raises {type(error).__name__}: {error}. "
                    "Mend it, or leave it out: then what the op touches is frozen."
                ) from error
            self.unknown[call.name] = self.unknown.get(call.name, 0) + 1
            unknown(call, f"{type(error).__name__} ({error}) in the rule for")


@dataclass
class DenseTrace:
    """Everything one look at the model gives.

    Args:
        sandbox: How the model was run.
        args: Positional example input.
        kwargs: Keyword example input.
        space: The labels.
        axes: Tensor name -> its axes.
        events: Mode ("eval", "train") -> log; train mode only where it may run other ops.
        aliases: Mode -> number of the op that comes next, and value -> how often it was aliased there.
        out_shapes: Mode -> shapes of the model's outputs.
        read: Names of the parameters and buffers that some op read.
        unknown: Op without a rule -> how often it was met.
        notes: What a person should know about the trace.
        rules: Rules of the user.
        train_inputs: The example input of the train mode where it had to be doubled.
        real: Modes that had to run on real tensors, because the model reads values.
        failure: Why there is no trace, though the model runs.
    """

    sandbox: Sandbox
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rules: Mapping[str, RuleEntry]
    space: LabelSpace = field(default_factory=LabelSpace)
    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=dict)
    aliases: dict[str, Counter[Any]] = field(default_factory=dict)
    out_shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    unknown: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    train_inputs: tuple[Any, Any] | None = None
    real: set[str] = field(default_factory=set)
    failure: str = ""

    @cached_property
    def is_alike(self) -> bool:
        """Whether all modes make the same shapes of channels: a structure that certifies in one does in the others."""
        first, *others = (
            [(e.name, *map(len, (*e.in_axes, *e.out_axes))) for e in events if _makes_shape(e)]
            for events in self.events.values()
        )
        return all(program == first for program in others)


def _makes_shape(event: Event) -> bool:
    """Return whether an op on channels takes sizes or indices, or gives another shape than that of what it is given."""
    if event.name.startswith("aten::new_"):  # of what it is given it takes the type alone
        return False
    same = not (event.entry.sizes or event.entry.index) and all(shape in event.in_shapes for shape in event.out_shapes)
    return not same and any(is_labelled(axis) for axes in event.in_axes for axis in axes)


def trace_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rules: Mapping[str, Rule | RuleEntry] | None = None,
) -> DenseTrace:
    """Trace a model in eval mode, and in train mode where that may differ, into one set of labels.

    Args:
        model: Any module, with its own classes (no dynamic ops in the way). Unchanged afterwards.
        args: Positional example input; tensors at any depth.
        kwargs: Keyword example input.
        rules: Rules for further ops by schema name, for example `{"my::op": fn}` (see `check_rules`).

    Returns:
        The trace. If the model reads values (`.item()`), real tensors were used; if it runs, but not while it is
        watched, everything is frozen and a note says so.

    Raises:
        TraceError: The model's own forward fails on the example input, or no output tensor was found.
        ConfigError: A rule of the user is none, or fails.
    """
    entries = check_rules(rules)
    errors = []
    filled = find_filled(model, args, kwargs)
    for fake, inference in ((True, True), (False, True), (False, False)):
        try:
            return _trace(Sandbox(model, fake, inference, dict(filled)), args, dict(kwargs), entries)
        except TraceError as error:
            errors.append(error)
    trace = DenseTrace(Sandbox(model, fake=False), args, dict(kwargs), entries)
    try:
        _run_unseen(trace)
    except Exception as error:  # of the user's forward
        raise TraceError(
            f"Got an example input that the model's forward fails on: {errors[1]}. Pass example_input= as forward "
            "takes it: a tensor, a tuple or a mapping."
        ) from error
    _give_up(trace, errors[1])
    return trace


def _run_unseen(trace: DenseTrace) -> None:
    """Run the model on copies, in eval mode: whether it does at all."""
    args, kwargs, stand_ins = _stand_ins(trace, (trace.args, trace.kwargs))
    output = trace.sandbox.run(stand_ins, lambda: trace.sandbox.model(*args, **kwargs), Unwatched(), train=False)
    if not trace.sandbox.outputs(output):
        raise TraceError("no output")


def _give_up(trace: DenseTrace, error: TraceError) -> None:
    """Freeze all of a model that runs, but not while it is watched."""
    _label(trace)
    for axes in trace.axes.values():
        for axis in axes:
            trace.space.freeze(axis, "the model cannot be traced")
    trace.events["eval"], trace.out_shapes["eval"] = [], []
    trace.read = set(trace.axes)
    trace.failure = f"cannot be traced: {error}"
    trace.notes.append(f"the model cannot be traced, so that nothing is pruned and costs are not known: {error}")


def _label(trace: DenseTrace) -> None:
    for name, tensor in named_tensors(trace.sandbox.model).items():
        if is_floating(tensor):
            trace.axes[name] = tuple(trace.space.fresh(n) if n > 1 else ANY for n in tensor.shape)


def _trace(
    sandbox: Sandbox, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Mapping[str, RuleEntry]
) -> DenseTrace:
    trace = DenseTrace(sandbox, args, kwargs, rules)
    _label(trace)
    if not sandbox.fake:
        trace.real = {"eval", "train"}
    with watched_mode(sandbox.model) as readers:
        _record(trace, "eval")
    if readers is None or not same_program(readers, trace.events["eval"]):
        _record_train(trace)
    return trace


def _record_train(trace: DenseTrace) -> None:
    """Record the train mode; what it may need is two examples, for statistics over them, and real values."""
    doubled = _doubled(trace.args), _doubled(trace.kwargs)
    errors = []
    for real in sorted({"train" in trace.real, True}):
        trace.real |= {"train"} if real else set()
        for inputs in (None, doubled):
            try:
                _record(trace, "train", *(inputs or ()))
            except TraceError as error:
                errors.append(error)
            else:
                trace.train_inputs = inputs
                return
    trace.notes.append(f"traced in eval mode only; in train mode: {errors[0]}")


def _doubled(tree: Any) -> Any:
    return tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, tree)


def _stand_ins(trace: DenseTrace, given: tuple[Any, Any]) -> tuple[Any, Any, dict[int, Tensor]]:
    """Return stand-ins for the example input and for every parameter and buffer, labelled."""
    stand_ins = {}
    with trace.sandbox.without_gradients():
        args, kwargs = trace.sandbox.inputs(given)
        for name, tensor in named_tensors(trace.sandbox.model).items():
            stand_in = stand_ins[id(tensor)] = trace.sandbox.make_like(tensor)
            name_tensor(stand_in, name)
            if name in trace.axes:
                set_axes(stand_in, trace.axes[name])
                mark_weight(stand_in)
                if isinstance(tensor, nn.Parameter):
                    mark_zeroed(stand_in)
        for k, tensor in enumerate(tensors_in((args, kwargs))):
            name_tensor(tensor, f"input {k}")
    return args, kwargs, stand_ins


def _record(trace: DenseTrace, mode: str, args: Any = None, kwargs: Any = None) -> None:
    sandbox, model = trace.sandbox, trace.sandbox.model
    sandbox.fake = mode not in trace.real
    before = (len(trace.space.pairs), len(trace.space.frozen))
    given = (trace.args if args is None else args, trace.kwargs if kwargs is None else kwargs)
    args, kwargs, stand_ins = _stand_ins(trace, given)
    module_names = {id(m): n for n, m in model.named_modules()}
    outside = {id(t): n for n, t in named_tensors(model).items()}
    recorder = Recorder(trace.space, trace.rules, sandbox.results, module_names, outside)
    recorder.parameters = {name: storage_of(stand_ins[id(p)]) for name, p in model.named_parameters()}
    try:
        output = sandbox.run(stand_ins, lambda: model(*args, **kwargs), recorder, train=mode == "train")
    except ConfigError:
        raise
    except Exception as error:  # of the user's forward
        trace.space.rewind(*before)
        raise TraceError(f"{type(error).__name__}: {error}") from error
    outputs = sandbox.outputs(output)
    if not outputs:
        raise TraceError(f"Got an output of type {type(output).__name__} without any tensor; forward must return some.")
    for tensor in outputs:
        note_read(tensor, trace.space)
        for axis in axes_of(tensor):
            trace.space.freeze(axis, "model output")
    around = [(a, why) for n, why in recorder.leaked.items() for a in trace.axes.get(n, ()) if is_labelled(a)]
    trace.space.frozen[before[1] : before[1]] = around  # before all that follows from it: the first reason is told
    trace.events[mode], trace.aliases[mode] = recorder.events, recorder.aliases
    trace.out_shapes[mode] = [tuple(t.shape) for t in outputs]
    trace.read |= {name for name in recorder.read if isinstance(name, str)}
    for name, count in recorder.unknown.items():
        trace.unknown[name] = trace.unknown.get(name, 0) + count
