"""What must hold for every network, whatever is pruned."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import KEY, load_pruned, structure_of
from lightning_prune.errors import TraceError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops
from lightning_prune.plan import KeepPlan
from lightning_prune.units import MutableChannelUnit
from tests.compare import assert_same, double, full, macs_of, outputs, zeroed_outputs
from tests.fuzz import Net, Network, example


@dataclass
class Outcome:
    """What one network showed.

    Args:
        units: Axis -> how many units.
        families: Of its blocks.
        pruned: Families of which a structure cut the tensors of a block, or what it reads.
        structures: How many were tried.
        refused: Why a structure did not certify though every unit does.
    """

    units: Counter[str] = field(default_factory=Counter)
    families: set[str] = field(default_factory=set)
    pruned: set[str] = field(default_factory=set)
    structures: int = 0
    refused: list[str] = field(default_factory=list)


def examine(network: Network) -> Outcome:
    """Check every promise on one network.

    Raises:
        AssertionError: One is broken.
    """
    plain, model, inputs = Net(network).double(), Net(network).double(), double(example(network.inputs))
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    assert_conversion_is_invisible(plain, model, inputs)
    outcome = Outcome(Counter(unit.axis for unit in mutator.units), {type(block).family for block in plain.blocks})
    state = copy.deepcopy(model.state_dict())
    for plan in plans_for(mutator, network.seed):
        outcome.structures += 1
        try:
            mutator.apply(plan)
        except TraceError as error:
            outcome.refused.append(str(error))
            continue
        assert_structure_holds(network, mutator, plain, inputs)
        outcome.pruned |= pruned_families(plain, export_pruned(model), inputs)
        model.load_state_dict(state)
    return outcome


def plans_for(mutator: ChannelMutator, seed: int) -> list[KeepPlan]:
    """Return a structure that cuts every unit, and one that cuts those alone whose removal is setting to zero."""
    changing = inexact(mutator)
    exact = [unit for unit in mutator.units if unit.name not in changing]
    plans = [random_plan(mutator.units, seed)] if mutator.units else []
    if changing and exact:
        plans.append(KeepPlan({**full(mutator.units).kept, **random_plan(exact, seed + 1).kept}))
    return plans


def inexact(mutator: ChannelMutator) -> set[str]:
    """Return the units of which a removed channel is not one that is zero."""
    return {spec.name for spec in mutator.graph.units if spec.renormalizing or spec.rescaling}


def random_plan(units: Sequence[MutableChannelUnit], seed: int) -> KeepPlan:
    """Keep some channels of every unit, 2 or more of 3: any of them, or neighbours, whose slice is a view."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for unit in units:
        size = unit.num_channels
        count, start = (int(torch.randint(low, size, (), generator=generator)) for low in (min(2, size - 1), 0))
        chosen = torch.randperm(size, generator=generator)[:count]
        neighbours = torch.arange(count) + min(start, size - count)
        kept[unit.name] = tuple(sorted((neighbours if start % 3 == 0 else chosen).tolist()))
    return KeepPlan(kept)


def assert_conversion_is_invisible(plain: nn.Module, model: nn.Module, inputs: Sequence[Tensor]) -> None:
    before = copy.deepcopy(plain)
    for train in (False, True, False):
        assert_same(outputs(before, inputs, train=train), outputs(model, inputs, train=train))
    assert list(model.state_dict()) == list(before.state_dict())
    assert_same(model.state_dict().values(), before.state_dict().values())
    model.load_state_dict(plain.state_dict())


def assert_structure_holds(
    network: Network, mutator: ChannelMutator, plain: nn.Module, inputs: Sequence[Tensor]
) -> None:
    model, small = mutator.model, export_pruned(mutator.model)
    assert not dynamic_ops(small), "the exported model has dynamic ops"
    assert_costs(mutator, small, inputs)
    assert_loads(network, small, inputs)
    dense, twin = copy.deepcopy(plain), copy.deepcopy(model)
    exact = all(unit.activated_channels == unit.num_channels for unit in mutator.units if unit.name in inexact(mutator))
    for train in (False, True, False):  # the last one sees the statistics that training wrote
        found = outputs(model, inputs, train=train)
        assert [t.shape for t in found] == [t.shape for t in outputs(dense, inputs, train=train)]
        assert_close(found, outputs(small, inputs, train=train), "dynamic and exported")
        if exact:
            with without_dropout(twin):
                zeroed = zeroed_outputs(twin, inputs, train=train)
                assert_close(outputs(twin, inputs, train=train), zeroed, "removed and zeroed")


def assert_costs(mutator: ChannelMutator, small: nn.Module, inputs: Sequence[Tensor]) -> None:
    cost, macs, params = mutator.cost(), macs_of(small, inputs), sum(p.numel() for p in small.parameters())
    # an einsum over one channel is no sum: torch multiplies, and counts nothing
    single = any(unit.activated_channels == 1 for unit in mutator.units)
    spare = cost.by_op.get("aten::einsum", 0) if single else 0
    assert macs <= cost.macs <= macs + spare, f"a cost of {cost.macs} multiply-adds, where {macs} are run: {cost.by_op}"
    assert cost.params == params, f"a cost of {cost.params} parameters, where there are {params}"


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what} differ: {text}")


def assert_loads(network: Network, small: nn.Module, inputs: Sequence[Tensor]) -> None:
    """A checkpoint of the small model loads into a new dense one."""
    file = io.BytesIO()
    torch.save({"state_dict": small.state_dict(), KEY: structure_of(small)}, file)
    file.seek(0)
    assert_same(outputs(load_pruned(file, Net(network).double()), inputs), outputs(small, inputs))


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Let nothing drop out: a smaller tensor draws other random numbers."""
    layers = {layer: layer.p for layer in model.modules() if isinstance(layer, (nn.Dropout, nn.Dropout2d))}
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, rate in layers.items():
            layer.p = rate


def pruned_families(plain: nn.Module, small: nn.Module, inputs: Sequence[Tensor]) -> set[str]:
    """Return the families with a block that has smaller tensors, or reads some."""
    dense, cut = sizes_of(plain, inputs), sizes_of(small, inputs)
    return {type(block).family for block, a, b in zip(plain.blocks, dense, cut, strict=True) if a != b}


def sizes_of(model: nn.Module, inputs: Sequence[Tensor]) -> list[list[torch.Size]]:
    """Return per block the sizes of its tensors and of what it reads."""
    with torch.no_grad():
        values = model.eval().values(*inputs)
    return [
        [*(p.shape for p in block.parameters()), *(values[k].shape for k in wire)]
        for wire, block in zip(model.wires, model.blocks, strict=True)
    ]
