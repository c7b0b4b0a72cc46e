"""The invariants of the library, each over the whole zoo."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import KEY, load_pruned, structure_of
from lightning_prune.export import export_pruned
from lightning_prune.graph.contents import tensors_within
from lightning_prune.importance import resolve_importance
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import OPS, DynamicOp, dynamic_ops
from lightning_prune.plan import KeepPlan
from lightning_prune.targets import make_plan
from tests.compare import assert_same, double, full, macs_of, outputs, scattered, zeroed_outputs
from tests.zoo import ZOO, Case

ROOT = Path(__file__).resolve().parent.parent
MODES = [pytest.param(False, id="eval"), pytest.param(True, id="train")]
STRUCTURES: dict[str, Callable[[ChannelMutator], KeepPlan]] = {
    "scattered": lambda mutator: scattered(mutator.units),
    "one channel": lambda mutator: KeepPlan({u.name: (u.num_channels - 1,) for u in mutator.units}),
}


@dataclass
class Supernet:
    """A converted model of the zoo in float64; every test gets it dense, with the weights it started with."""

    name: str
    case: Case
    model: nn.Module
    mutator: ChannelMutator
    inputs: tuple[Tensor, ...]
    larger: tuple[Tensor, ...]
    state: dict[str, Tensor]

    def plain(self) -> nn.Module:
        return self.case.make().double()


@cache
def converted(name: str) -> Supernet:
    case = ZOO[name]
    model, inputs, larger = case.make().double(), double(case.inputs()), double(case.larger_inputs())
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    return Supernet(name, case, model, mutator, inputs, larger, copy.deepcopy(model.state_dict()))


def restored(name: str) -> Supernet:
    found = converted(name)
    for unit in found.mutator.units:
        unit.keep(range(unit.num_channels))
    found.model.load_state_dict(found.state)
    found.model.zero_grad()
    return found


@pytest.fixture(params=ZOO)
def supernet(request: pytest.FixtureRequest) -> Supernet:
    return restored(request.param)


@pytest.fixture(params=STRUCTURES)
def masked(request: pytest.FixtureRequest, supernet: Supernet) -> Supernet:
    supernet.mutator.apply(STRUCTURES[request.param](supernet.mutator))
    return supernet


@pytest.fixture
def cut(supernet: Supernet) -> Supernet:
    supernet.mutator.apply(STRUCTURES["scattered"](supernet.mutator))
    return supernet


# 1. Conversion is invisible


@pytest.mark.parametrize("train", MODES)
def test_conversion_changes_no_output_bit(supernet: Supernet, train: bool) -> None:
    for inputs in (supernet.inputs, supernet.larger):
        plain = supernet.plain()
        supernet.model.load_state_dict(supernet.state)
        assert_same(outputs(supernet.model, inputs, train=train), outputs(plain, inputs, train=train))
        assert_same(supernet.model.state_dict().values(), plain.state_dict().values())


@pytest.mark.parametrize("name", ZOO)
def test_conversion_keeps_every_object_and_name(name: str) -> None:
    model = ZOO[name].make()

    def seen() -> dict[str, Any]:
        return {
            "parameters": [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
            "buffers": [(n, id(b)) for n, b in model.named_buffers(remove_duplicate=False)],
            "modules": [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
            "state dict": {n: (t.data_ptr(), t.shape) for n, t in model.state_dict().items()},
            "modes": [m.training for m in model.modules()],
            "gradients": [p.requires_grad for p in model.parameters()],
        }

    before, types = seen(), {n: type(m) for n, m in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    ChannelMutator(example_input=ZOO[name].inputs()).prepare_from_supernet(model)
    assert seen() == before
    assert_same(model.state_dict().values(), values.values())
    for module_name, module in model.named_modules():
        assert isinstance(module, types[module_name])
        assert isinstance(module, DynamicOp) or types[module_name] not in OPS, f"{module_name} is not converted"


def test_print_shows_every_op(cut: Supernet) -> None:
    text = repr(cut.model)
    assert text.count("(mutable_attrs): ModuleDict(") == len(dynamic_ops(cut.model))
    for op in dynamic_ops(cut.model).values():
        assert f"{type(op).__name__}(" in text
        for container in op.mutable_attrs.values():
            assert f"num_channels={container.num_channels}, activated_channels: {container.activated_channels}" in text


@pytest.mark.parametrize(
    "clone",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
    ],
)
def test_a_copy_computes_the_same_and_is_a_model_of_its_own(cut: Supernet, clone: Callable[..., nn.Module]) -> None:
    expected, choices = outputs(cut.model, cut.inputs), cut.mutator.current_choices
    if clone is not copy.deepcopy and not cut.case.pickles:
        for model in (cut.model, cut.plain()):
            with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
                clone(model)
        return
    twin = clone(cut.model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in cut.model.modules()]
    assert_same(outputs(twin, cut.inputs), expected)
    mutator = ChannelMutator(example_input=cut.inputs)  # asked for only where no unit is found
    mutator.prepare_from_supernet(twin)
    assert mutator.current_choices == choices
    mutator.apply(full(mutator.units))
    assert_same(outputs(twin, cut.inputs), outputs(cut.plain(), cut.inputs))
    assert_same(outputs(cut.model, cut.inputs), expected)


def test_a_state_dict_of_the_masked_model_is_that_of_the_dense_one(cut: Supernet) -> None:
    state = cut.model.state_dict()
    plain = cut.plain()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
    plain.load_state_dict(state)
    assert_same(plain.state_dict().values(), cut.state.values())
    changed = {name: t + 1 for name, t in state.items()}
    cut.model.load_state_dict(changed)
    assert_same(cut.model.state_dict().values(), changed.values())


# 2. Masked supernet == exported subnet == zero-masked dense model


@pytest.mark.parametrize("train", MODES)
def test_the_masked_model_computes_what_the_exported_one_does(masked: Supernet, train: bool) -> None:
    small, plain = export_pruned(masked.model), masked.plain()
    ours = {type(m).__name__ for m in small.modules() if type(m).__module__.startswith("lightning_prune.")}
    assert ours == ({"SlimMultiheadAttention"} if masked.case.slim else set())
    for inputs in (masked.inputs, masked.larger):
        found = outputs(small, inputs, train=train)
        assert_same(found, outputs(masked.model, inputs, train=train))
        assert [t.shape for t in found] == [t.shape for t in outputs(plain, inputs, train=train)]
    assert_same(small.state_dict().values(), export_pruned(masked.model).state_dict().values())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, plain)]
    assert sizes[0] < sizes[1] or not masked.case.units


@pytest.mark.parametrize("train", MODES)
def test_removing_channels_is_setting_them_to_zero(masked: Supernet, train: bool) -> None:
    units = masked.mutator.units
    assert any(unit.renormalizing for unit in units) == masked.case.renormalizing
    masked.mutator.apply(full([unit for unit in units if unit.renormalizing]))
    for inputs in (masked.inputs, masked.larger):
        zeroed = zeroed_outputs(masked.model, inputs, train=train)
        for found, expected in zip(outputs(masked.model, inputs, train=train), zeroed, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_statistics_of_removed_channels_stay_as_they_are(cut: Supernet) -> None:
    outputs(cut.model, cut.inputs, train=True)
    for name, op in dynamic_ops(cut.model).items():
        for buffer, tensor in op._buffers.items():
            if tensor is None or not tensor.dim():
                continue
            before, after = cut.state[f"{name}.{buffer}"], cut.model.state_dict()[f"{name}.{buffer}"]
            if "Norm" not in type(op).__name__:
                assert torch.equal(before, after), f"{name}.{buffer} is no statistic"
                continue
            (kept,) = op.kept_indices_of(buffer)
            changes = torch.ones(len(before), dtype=torch.bool)
            if kept is not None:
                changes = torch.zeros(len(before), dtype=torch.bool).index_fill_(0, kept, True)
            runs = not name.startswith("unused")
            assert torch.equal(before != after, changes & runs), f"{name}.{buffer}"


# 3. Counts and costs


def test_units_are_those_worked_out_by_hand(supernet: Supernet) -> None:
    assert {unit.name: unit.num_channels for unit in supernet.mutator.units} == dict(supernet.case.units)


def test_members_are_spans_of_tensors_and_reach_every_channel(supernet: Supernet) -> None:
    for unit in supernet.mutator.units:
        reached = torch.zeros(unit.num_channels, dtype=torch.bool)
        for member in (*unit.output_related, *unit.input_related):
            assert 0 <= member.start < member.end <= member.full().shape[member.dim], member
            index = torch.arange(unit.num_channels) if member.index is None else member.index
            assert len(index) == member.num_channels
            reached[index] = True
        assert reached.all()


def test_counts_are_the_plan_and_costs_are_exact(masked: Supernet) -> None:
    mutator, plan = masked.mutator, masked.mutator.current_plan()
    assert plan.counts() == {unit.name: unit.activated_channels for unit in mutator.units}
    small = export_pruned(masked.model)
    cost, dense = mutator.cost(), mutator.cost(dict.fromkeys(masked.case.units, 1.0))
    assert cost.macs == sum(cost.by_op.values())
    if masked.case.counted or min(plan.counts().values()) > 1:
        assert cost.macs == macs_of(small, masked.inputs)
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert mutator.graph.cost.measure("channels", mutator.counts()) == sum(plan.counts().values())
    plain = masked.plain()
    assert (dense.macs, dense.params) == (macs_of(plain, masked.inputs), sum(p.numel() for p in plain.parameters()))
    assert not masked.case.units or (cost.macs < dense.macs and cost.params < dense.params)


# 4. Training


def test_one_step_moves_kept_weights_as_it_moves_the_exported_ones(cut: Supernet) -> None:
    model, small = cut.model, export_pruned(cut.model)
    for network in (model, small):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        torch.stack([t.square().mean() for t in tensors_within(network(*cut.inputs))]).sum().backward()
        optimizer.step()
    assert_same(export_pruned(model).state_dict().values(), small.state_dict().values())
    seen: set[int] = set()  # a tied parameter is checked at the first layer that owns it
    for name, op in dynamic_ops(model).items():
        for own, parameter in op._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            removed = torch.zeros(parameter.shape, dtype=torch.bool)
            for dim, kept in enumerate(op.kept_indices_of(own)):
                if kept is not None:
                    gone = torch.ones(parameter.shape[dim], dtype=torch.bool).index_fill_(0, kept, False)
                    removed.index_fill_(dim, gone.nonzero().flatten(), True)
            where = f"{name}.{own}".lstrip(".")
            assert torch.equal(parameter[removed], cut.state[where][removed]), where
            if parameter.grad is not None:
                assert not parameter.grad[removed].any(), where


# 5. Save, rebuild, load


def test_a_written_structure_rebuilds_the_model_without_a_trace(cut: Supernet, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(json.dumps(cut.mutator.config_template(with_channels=True)))
    monkeypatch.setattr("lightning_prune.mutator.mutator.analyze", None)
    plain = cut.plain()
    mutator = ChannelMutator.from_config(config)
    mutator.prepare_from_supernet(plain)
    assert mutator.current_choices == cut.mutator.current_choices
    assert mutator.config_template(with_channels=True) == config
    mutator.apply(cut.mutator.current_plan())
    assert_same(outputs(plain, cut.inputs), outputs(cut.model, cut.inputs))


@pytest.mark.parametrize("small", [pytest.param(False, id="full-sized file"), pytest.param(True, id="small file")])
def test_a_checkpoint_loads_into_a_new_model(
    cut: Supernet, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prune.mutator.mutator.analyze", None)
    model = export_pruned(cut.model) if small else cut.model
    torch.save({"state_dict": model.state_dict(), KEY: structure_of(model)}, tmp_path / "pruned.ckpt")
    loaded = load_pruned(tmp_path / "pruned.ckpt", cut.plain())
    assert not dynamic_ops(loaded)
    assert_same(outputs(loaded, cut.inputs), outputs(cut.model, cut.inputs))


# 6. Every process finds the same

PLANS = """
import json
from tests.test_invariants import converted, half_plan
from tests.zoo import ZOO
print(json.dumps({name: half_plan(converted(name).mutator) for name in ZOO}))
"""


def half_plan(mutator: ChannelMutator) -> list[Any]:
    """Return the units, their kinds and a plan for half of the channels, as plain data in order."""
    if not mutator.units:
        return []
    scores = resolve_importance("l1").scores(mutator.mutable_units)
    plan = make_plan({"channels": 0.5}, scores, mutator.limits(), mutator.graph.cost)
    return [[unit.name, unit.kind, list(plan.kept[unit.name])] for unit in mutator.units]


@pytest.fixture(scope="module", autouse=True)
def elsewhere() -> Iterator[Callable[[], dict[str, Any]]]:
    """Start another process, with other hashes, before the first test; its answer is asked for after the last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLANS]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield cache(lambda: json.loads(process.communicate()[0]))
        process.kill()


@pytest.mark.parametrize("name", ZOO)
def test_another_process_finds_the_same_units_and_plan(name: str, elsewhere: Callable[[], dict[str, Any]]) -> None:
    assert half_plan(restored(name).mutator) == elsewhere()[name]
