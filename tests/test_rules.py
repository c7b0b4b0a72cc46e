"""Every rule's claim on real data: the op commutes with selecting the living channels, `op(x[kept]) == op(x)[kept]`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph.call import axes_of, tensors_in
from lightning_prune.graph.certify import run_lockstep
from lightning_prune.graph.closure import BoolArray, close
from lightning_prune.graph.labels import ANY, Axis, is_labelled
from lightning_prune.graph.mismatch import Mismatch
from lightning_prune.graph.rules import RULES, indexing
from lightning_prune.graph.trace import trace_model
from tests.rule_cases import MOVEMENT, POINTWISE, A, Live, RuleCase, case
from tests.rule_cases_matrices import LOSSES, MATRICES, QUANTIZED, SPECTRAL
from tests.rule_cases_places import INDEXING, POOLING, SCATTER
from tests.rule_cases_recurrent import RECURRENT
from tests.rule_cases_sums import CONTRACTION, NORMALIZATION, REDUCTION

TABLES = (
    *(POINTWISE, MOVEMENT, INDEXING, SCATTER, POOLING, CONTRACTION, NORMALIZATION, REDUCTION, MATRICES, SPECTRAL),
    *(LOSSES, QUANTIZED, RECURRENT),
)
CASES = {name: entry for table in TABLES for name, entry in table.items()}
assert len(CASES) == sum(map(len, TABLES)), "two cases of one name"
WITHOUT_CLAIM = (indexing.opaque, indexing.positional, indexing.constant, indexing.no_result)
UNSEEN = {f"aten::{name}" for name in ("contiguous", "clone", "alias", "detach", "lift", "lift_fresh")}  # no events
FUSED = ("flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
CUDA_ONLY = {
    *("aten::cudnn_batch_norm", "aten::_pin_memory"),
    *(f"aten::_scaled_dot_product_{name}" for name in FUSED),
}


class Program(nn.Module):
    """One call whose inputs are parameters, so that every axis carries labels; its result is kept from the output."""

    def __init__(self, case: RuleCase) -> None:
        super().__init__()
        self.case, self.live, self.last = case, Live(), SimpleNamespace(out=None)
        for k, x in enumerate(case.inputs):
            self.register_parameter(f"input{k}", nn.Parameter(x, requires_grad=False))

    def forward(self) -> Tensor:
        inputs = (getattr(self, f"input{k}") for k in range(len(self.case.inputs)))  # what is read around is frozen
        self.last.out = self.case(self.live, *inputs)
        return torch.zeros(())


class Traced:
    """A call seen by the tracer on labelled inputs, and what closure makes of it."""

    def __init__(self, case: RuleCase) -> None:
        self.case, self.program = case, Program(case)
        self.trace = trace_model(self.program, (), {})
        self.space = self.trace.space
        self.axes = [self.trace.axes.get(f"input{k}", (ANY,) * x.dim()) for k, x in enumerate(case.inputs)]
        self.out_axes = [axes_of(t) for t in tensors_in(self.program.last.out)]
        self.closure = close(self.space, self.space.pairs, [(labels, 0) for labels, _ in self.space.frozen])

    def check(self, alive: BoolArray) -> None:
        """Run the certificate on the sizes that are left."""
        self.program.live = Kept(self, alive)
        run_lockstep(self.trace, alive, [], ["eval"])

    def stuck(self, labels: Any) -> BoolArray:
        """Return which of the labels may not go: frozen ones, and products of frozen ones alone."""
        return np.asarray(self.closure.frozen[self.closure.classes[labels]])

    def pooled(self, labels: Any) -> BoolArray:
        """Return over which of the labels a mean, variance or sum runs."""
        hit = np.zeros(self.closure.count, np.bool_)
        for axis in self.space.renormalized:
            hit[self.closure.factors[self.closure.classes[axis]].indices] = True
        found = np.zeros(len(labels), np.bool_)
        positions, classes = self.closure.living_by(labels)
        found[positions[hit[classes]]] = True
        return found

    def find(self, what: Any) -> set[tuple[int, int]]:
        """Return the `(input, axis)` of which every entry is `what`."""
        return {
            (k, d)
            for k, axes in enumerate(self.axes)
            for d, axis in enumerate(axes)
            if is_labelled(axis) and what(axis).all()
        }

    def alive(self, rng: np.random.Generator) -> BoolArray:
        """Return a random choice of living labels that leaves at least two entries of every input axis."""
        free = ~self.closure.frozen & ~self.closure.derived
        for axis in self.space.renormalized:
            free[self.closure.factors[self.closure.classes[axis]].indices] = False
        labelled = [a for axes in self.axes for a in axes if is_labelled(a)]
        labelled += [a for axes in self.out_axes for a in axes if is_labelled(a)]
        for _ in range(200):
            alive = self.closure.alive(free & (rng.random(len(free)) < 0.4))
            if not alive.all() and all(alive[a].sum() > (len(a) > 1) for a in labelled):
                return np.asarray(alive)
        return np.ones(self.space.size, np.bool_)


class Kept(Live):
    """The sizes that are left."""

    def __init__(self, traced: Traced, alive: BoolArray) -> None:
        self.traced, self.living = traced, alive

    def along(self, source: int, axis: int, start: int, stop: int) -> int:
        return int(self.living[self.traced.axes[source][axis][start:stop]].sum())

    def result(self, axis: int, dense: int) -> int:
        labels = self.traced.out_axes[0][axis]
        return int(self.living[labels].sum()) if is_labelled(labels) else dense


def zeroed(tensor: Tensor, axes: Sequence[Axis], alive: BoolArray) -> Tensor:
    for d, axis in enumerate(axes):
        if is_labelled(axis):
            shape = [-1 if k == d else 1 for k in range(tensor.dim())]
            tensor = tensor * torch.from_numpy(alive[axis]).view(shape)
    return tensor


def kept_part(tensor: Tensor, axes: Sequence[Axis], alive: BoolArray) -> Tensor:
    for d, axis in enumerate(axes):
        if is_labelled(axis):
            tensor = tensor.index_select(d, torch.from_numpy(np.flatnonzero(alive[axis])))
    return tensor


@cache
def trace_of(name: str) -> Traced:
    return Traced(CASES[name])


@pytest.fixture(params=CASES)
def traced(request: pytest.FixtureRequest) -> Traced:
    return trace_of(request.param)


@pytest.mark.parametrize("seed", range(2))
def test_an_op_commutes_with_selecting_channels(traced: Traced, seed: int) -> None:
    alive, case = traced.alive(np.random.default_rng(seed)), traced.case
    assert alive.all() == (case.frozen | case.pooled == traced.find(lambda axis: axis >= 0))
    try:
        traced.check(alive)
    except Mismatch:
        assert case.literal
        return
    inputs = list(zip(case.inputs, traced.axes, strict=True))
    dense = tensors_in(case(Live(), *(zeroed(x, axes, alive) if case.product else x for x, axes in inputs)))
    small = tensors_in(case(Kept(traced, alive), *(kept_part(x, axes, alive) for x, axes in inputs)))
    for got, full, axes in zip(small, dense, traced.out_axes, strict=True):
        expected = kept_part(full, axes, alive)
        for d, axis in enumerate(axes):
            if isinstance(axis, str) and axis == ANY:  # equal all along: its length follows what it met
                expected = expected.narrow(d, 0, got.shape[d])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_a_rule_freezes_no_more_and_no_less_than_it_must(traced: Traced) -> None:
    assert traced.find(traced.stuck) == traced.case.frozen
    assert traced.find(traced.pooled) == traced.case.pooled


def test_no_case_meets_an_op_without_a_rule(traced: Traced) -> None:
    assert traced.trace.unknown == {}


MIXING = {
    "masked_select": case(lambda x: x.masked_select(x > 0), (4, 6), frozen="0.0 0.1"),
    "positions of a condition": case(lambda x: torch.where(x > 0)[0], (4, 6), frozen="0.0 0.1"),
    "put_": case(lambda x: x.clone().put_(torch.tensor([1]), x[0, :1]), (4, 6), frozen="0.0 0.1"),
    "take": case(lambda x: x.take(torch.tensor([1])), (4, 6), frozen="0.0 0.1"),
    "nonzero": case(torch.nonzero, (4, 6), frozen="0.0 0.1"),
    "argwhere": case(torch.argwhere, (4, 6), frozen="0.0 0.1"),
    "nonzero_static": case(lambda x: torch.nonzero_static(x, size=3), (4, 6), frozen="0.0 0.1"),
    "unique": case(torch.unique, (4, 6), frozen="0.0 0.1"),
    "unique along an axis": case(lambda x: torch.unique(x, dim=0), (4, 6), frozen="0.0 0.1"),
    "unique_consecutive": case(torch.unique_consecutive, (4, 6), frozen="0.0 0.1"),
    "histc": case(torch.histc, (4, 6), frozen="0.0 0.1"),
    "histogram": case(lambda x: torch.histogram(x, 3), (4, 6), frozen="0.0 0.1"),
    "embedding_renorm_": case(
        lambda w: A.embedding_renorm_(w.clone(), torch.tensor([1, 2]), 1.0, 2.0), (4, 6), frozen="0.0 0.1"
    ),
    "_sample_dirichlet, no rule": case(lambda x: A._sample_dirichlet(x.abs()), (4, 6), frozen="0.0 0.1"),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_op_that_mixes_positions_freezes_what_it_touches(name: str) -> None:
    traced = Traced(MIXING[name])
    assert traced.find(traced.stuck) == MIXING[name].frozen


def test_every_rule_that_moves_labels_has_a_case() -> None:
    covered = {event.name for name in CASES for event in trace_of(name).trace.events["eval"]}
    needed = {name for name, entry in RULES.items() if entry.apply not in WITHOUT_CLAIM}
    assert needed - covered == UNSEEN | CUDA_ONLY


def test_every_rule_is_of_an_op_that_exists() -> None:
    spaces = {"aten": torch.ops.aten, "higher_order": torch.ops.higher_order}
    named = [name.split("::") for name in RULES]
    assert [name for space, name in named if not hasattr(spaces[space], name)] == []
