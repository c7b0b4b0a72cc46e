"""The two doors of the room: analyze a model once, certify any structure of it afterwards."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.call import Rule, tensors_in
from lightning_prune.graph.certify import run_lockstep
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.decisions import note_choices
from lightning_prune.graph.frozen import find_frozen
from lightning_prune.graph.labels import IntArray
from lightning_prune.graph.mismatch import Mismatch
from lightning_prune.graph.partition import price
from lightning_prune.graph.refine import refine
from lightning_prune.graph.rules import RuleEntry
from lightning_prune.graph.sandbox import Sandbox
from lightning_prune.graph.trace import DenseTrace, trace_model

__all__ = ["analyze", "certify_kept", "certify_rebuilt"]

_SURE = 2  # runs of the dense program: once it may be the same by chance
_GOES_BACK = "goes back into the model alone: it shrinks too"


@contextmanager
def _no_collector() -> Iterator[None]:
    """Hold the garbage collector: it would walk the whole model and log again and again, and finds nothing here."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collector()
def analyze(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    rules: Mapping[str, Rule | RuleEntry] | None = None,
    strict: bool = False,
    tie_kinds: bool = False,
) -> tuple[ChannelGraph, DenseTrace]:
    """Find and certify the units of a model.

    Args:
        model: Any module, with its own classes. Unchanged afterwards.
        args: Positional example input.
        kwargs: Keyword example input.
        ignore: Globs over module and parameter names: a layer that matches keeps its outputs, its inputs follow.
        rules: Rules for further ops by schema name.
        strict: Raise where an op has no rule or a unit does not certify, instead of freezing.
        tie_kinds: Make one unit of all units of a kind.

    Returns:
        The graph, and the trace that later certificates compare with.

    Raises:
        TraceError: The model cannot be traced; or `strict` and something would have been frozen.
    """
    trace = trace_model(model, args, kwargs, rules)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def ignored(tensor: str) -> str | None:
        parts = tensor.split(".")
        names = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]
        return next((g for g in ignore if any(fnmatchcase(n, g) for n in names)), None)

    known, closure, units = refine(trace, frozenset(parameters), ignored, tie_kinds)
    _note_restless(trace, {mode for mode in known.restless if known.integers.count_certified(mode) < _SURE})
    if strict and (trace.failure or trace.unknown or known.refused):
        what = [*filter(None, [trace.failure]), *(f"no rule for {op}" for op in trace.unknown), *known.refused]
        raise TraceError(f"strict=True and these would freeze channels: {'; '.join(what)}. Pass rules= or ignore=.")
    priced = {name: shape for name, shape in parameters.items() if name in trace.axes}
    constant = sum(int(np.prod(shape)) for name, shape in parameters.items() if name not in priced)
    inputs = [t for t in tensors_in((args, dict(kwargs))) if t.dim()]
    graph = ChannelGraph(
        units.units,
        trace.axes,
        tuple(known.integers.followers(closure, units)),
        find_frozen(trace, closure, known.reasons, units.owner, frozenset(parameters)),
        price(trace, closure, units, constant, priced, int(inputs[0].shape[0]) if inputs else 1),
        trace.space,
        closure,
        units.owner,
        units.channel,
        trace.sandbox.caches,
        (*trace.notes, *note_choices(trace.events.values()), *(f"`{n}` {_GOES_BACK}" for n in trace.sandbox.states)),
        trace.unknown,
    )
    return graph, trace


def _note_restless(trace: DenseTrace, modes: Collection[str]) -> None:
    """Note those modes in which the model itself does not run the same program twice: nothing certifies there."""
    whole = np.ones(trace.space.size, np.bool_)
    for mode in filter(modes.__contains__, trace.events):
        try:
            for _ in range(_SURE):
                run_lockstep(trace, whole, (), [mode])
        except Mismatch as mismatch:
            trace.notes.append(f"in {mode} mode the model runs other ops each time, whatever the seed: {mismatch}")


@_no_collector()
def certify_kept(graph: ChannelGraph, trace: DenseTrace, kept: Mapping[str, IntArray | Sequence[int]]) -> None:
    """Certify one structure by one more trace.

    Args:
        graph: The graph of the model.
        trace: Its dense trace.
        kept: Unit name -> indices of the channels that remain; units not named keep all.

    Raises:
        TraceError: The pruned program would not be the dense program on the kept channels; says where.
    """
    alive = graph.alive({name: np.asarray(indices, np.int64) for name, indices in kept.items()})
    if alive.all():
        return  # the dense program itself
    try:
        # the units certified in every mode
        run_lockstep(trace, alive, graph.followers, list(trace.events)[:1] if trace.is_alike else None)
    except Mismatch as mismatch:
        raise TraceError(
            f"The structure does not run the dense program: {mismatch}. The model is unchanged."
        ) from mismatch


@_no_collector()
def certify_rebuilt(graph: ChannelGraph, trace: DenseTrace, alive: BoolArray, model: nn.Module, part: str) -> None:
    """Certify that a model, a part of which was made small by its own class, is the pruned one.

    Args:
        graph: The graph of the dense model.
        trace: Its dense trace.
        alive: Per label, whether it lives.
        model: The model; tensors of the part have the shapes of the pruned ones, and need no values.
        part: Name of that part, "" for all of it. Its integers are its own.

    Raises:
        TraceError: It runs another program, or the trace needs values.
    """
    modes = [mode for mode in trace.events if mode not in trace.real]
    if not modes:
        raise TraceError("its forward reads values, and cannot be run without any")
    inside = [f for f in graph.followers if not part or f.module == part or f.module.startswith(f"{part}.")]
    outside = [f for f in graph.followers if f not in inside]
    try:
        # a number that was kept is no scale that is worked out anew
        scales = run_lockstep(trace, alive, graph.followers, modes) if any(u.rescaling for u in graph.units) else {}
        run_lockstep(replace(trace, sandbox=Sandbox.like(trace.sandbox, model)), alive, outside, modes, scales)
    except Mismatch as mismatch:
        raise TraceError(f"{mismatch}") from mismatch
