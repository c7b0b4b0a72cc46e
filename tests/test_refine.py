"""How refining gets by: which structures it runs, and what of them tells units apart."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph import certify, integers
from lightning_prune.graph.analyze import analyze
from lightning_prune.graph.axes import AxisTable
from lightning_prune.graph.channel_graph import ChannelGraph, UnitSpec
from lightning_prune.graph.mismatch import Mismatch
from lightning_prune.graph.partition import Partition
from lightning_prune.graph.sampler import Sampler
from lightning_prune.mutator import ChannelMutator
from tests.models import build
from tests.test_equal_sizes import Separate
from tests.test_learned_sizes import Fused

Run = tuple[str, bytes, frozenset[Any]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Collect what is run to find mismatches: the mode, the structure, and the integers."""
    found: list[Run] = []

    def find(trace: Any, alive: Any, followers: Any, modes: Sequence[str]) -> list[Mismatch]:
        sizes = {(f.module, f.attribute, f.element, int(alive[f.labels].sum())) for f in followers}
        found.append((modes[0], alive.tobytes(), frozenset(sizes)))
        return certify.find_mismatches(trace, alive, followers, modes)

    monkeypatch.setattr(integers, "find_mismatches", find)
    return found


def unit_labels(graph: ChannelGraph, unit: UnitSpec) -> Any:
    """Return one label of each channel of a unit."""
    return graph.closure.first[unit.classes]


def prepared(model: nn.Module, *shape: int) -> ChannelMutator:
    mutator = ChannelMutator(example_input=torch.randn(shape))
    mutator.prepare_from_supernet(model)
    return mutator


class Literal(nn.Module):
    """Its width is written out in the code, so it cannot go; it may keep the width of what it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(24, width), nn.Linear(width, 24)
        self.width = width - 1  # no integer is as large

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).relu().reshape(len(x), self.width + 1)
        return x + self.leave(y)


def literals(count: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 24), *(Literal(30 + 7 * k) for k in range(count)), nn.Linear(24, 3))


def test_nothing_is_run_twice(runs: list[Run]) -> None:
    heads = (Separate(24, 6, 4) for _ in range(2))
    model = nn.Sequential(nn.Unflatten(0, (2, 7)), nn.Linear(5, 24), *heads, nn.Flatten(0, 1), *literals(3)[1:])
    mutator = prepared(model, 14, 5)
    assert len(mutator.units) > 3
    assert len({*runs}) == len(runs)


def test_what_fails_apart_is_looked_at_apart(runs: list[Run]) -> None:
    counts = []
    for stages in (2, 3, 6):
        runs.clear()
        assert [u.num_channels for u in prepared(literals(stages), 4, 5).units] == [24]
        counts.append(len(runs))
    assert counts[1] - counts[0] == 1, "one run each tells that it fails alone"
    assert counts[2] - counts[1] == 3


class Spare(Separate):
    """Reads another size too, for no op; has units of one size that no integer follows."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__(width, heads, head_dim)
        self.most, self.pairs = width, nn.ModuleList(nn.Linear(*n) for n in ((width, 2), (2, width)) * 3)

    def forward(self, x: Tensor) -> Tensor:
        for k in range(0, len(self.pairs), 2):
            x = x + self.pairs[k + 1](self.pairs[k](x).div(self.most > 1))
        return super().forward(x)


@pytest.mark.parametrize("block", [Separate, Spare])
@pytest.mark.parametrize("layers", [1, 4])
def test_heads_take_a_run_to_fail_one_to_learn_from_and_the_samples(
    runs: list[Run], block: type[Separate], layers: int
) -> None:
    model = nn.Sequential(nn.Linear(5, 48), *(block(48, 9, 8) for _ in range(layers)), nn.Linear(48, 3))
    assert len(prepared(model, 2, 6, 5).units) == (2 if block is Separate else 5) * layers + 1
    assert len(runs) == 2 + 3  # learned, bound; then the first sample and two of few heads


class Divided(nn.Module):
    """Attention whose heads have what the width of the input gives them, as many as come out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.fused(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        made = ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
        y: Tensor = x + self.leave(made)
        return y


def test_widths_that_are_divided_among_heads_are_bound_in_all_stages_at_once(runs: list[Run]) -> None:
    stages = [(24, 4), (36, 3), (56, 7)]
    layers = [
        m for k, (w, h) in enumerate(stages) for m in (nn.Linear((5, 24, 36)[k], w), Divided(w, h), Divided(w, h))
    ]
    mutator = prepared(nn.Sequential(*layers, nn.Linear(56, 2)), 2, 6, 5)
    assert sorted((u.axis, u.num_channels) for u in mutator.units) == [
        *(("head_dim", 6), ("head_dim", 8), ("head_dim", 12)),
        *(("heads", 3), ("heads", 4), ("heads", 7)),
    ]
    assert len(runs) <= 2 + 5


@pytest.mark.parametrize("keys", [2, 4])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_place_worked_out_of_several_numbers_takes_few_runs(runs: list[Run], layers: int, keys: int) -> None:
    heads = [Fused(SimpleNamespace(num_heads=4, num_keys=keys)) for _ in range(layers)]
    mutator = prepared(nn.Sequential(nn.Linear(5, 20), *heads, nn.Linear(20, 3)), 2, 7, 5)
    assert len(mutator.units) == 2 * layers + 1
    assert len(runs) <= 5 + 4  # cut apart where there is nothing left, which tells no size; then the samples


def test_an_integer_follows_no_axis_of_a_twin_of_the_module_around_it() -> None:
    model = nn.Sequential(nn.Linear(5, 48), *(nn.Sequential(Separate(48, 6, 8)) for _ in range(3)), nn.Linear(48, 3))
    graph, trace = analyze(model, (torch.randn(2, 6, 5),), {})
    heads = [unit for unit in graph.units if unit.axis == "heads"]
    alive = graph.alive({unit.name: list(range(k + 2)) for k, unit in enumerate(heads)})
    table = AxisTable(trace, graph.closure, Partition(graph.units, graph.owner, graph.channel))
    for k in range(3):
        assert [int(alive[axis].sum()) for axis in table.changed(f"{k + 1}.0", 6, alive)] == [k + 2]
    assert len([*table.changed("4", 6, alive)]) == 3  # a layer like none of them may


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("hf:bert", 6),
        ("hf:llama", 8),
        ("hf:whisper", 6),
        ("hf:t5", 17),
        ("timm:resnest14d", 4),
        ("timm:xcit_nano_12_p8_224", 7),
        ("timm:volo_d1_224", 8),
    ],
)
def test_a_real_model_takes_no_more_runs_than_it_did(runs: list[Run], name: str, most: int) -> None:
    model, args, kwargs = build(name)
    ChannelMutator(example_input=args or kwargs).prepare_from_supernet(model)
    assert len(runs) <= most


def test_a_size_that_is_inferred_is_not_what_is_wrong() -> None:
    graph, trace = analyze(nn.Sequential(nn.Linear(5, 24), Separate(24, 4, 6)), (torch.randn(2, 7, 5),), {})
    alive = graph.alive({u.name: np.arange(3) for u in graph.units if u.axis == "head_dim"})
    found = certify.find_mismatches(trace, alive, [f for f in graph.followers if f.attribute != "head_dim"])
    wrong = [[(met, len(axis)) for met, axis in m.axes] for m in found if m.event and m.event.name == "aten::view"]
    assert wrong == [[(6, 6)]] * 3  # half as many heads come out


@pytest.mark.parametrize(("sizes", "samples"), [((2,) * 8, 4), ((4,) * 8, 3), ((5, 7, 11), 1), ((4, 4, 2), 1)])
def test_samples_tell_units_of_a_size_apart(sizes: tuple[int, ...], samples: int) -> None:
    model = nn.Sequential(nn.Linear(3, 6), *(nn.Sequential(nn.Linear(6, n), nn.Linear(n, 6)) for n in sizes))
    graph, trace = analyze(model, (torch.randn(2, 3),), {})
    units = [unit for unit in graph.units if unit.num_channels != 6]
    chosen = [Sampler(trace, graph.closure, graph.units)]
    while not chosen[-1].tells_apart([unit.name for unit in units]):
        chosen.append(Sampler(trace, graph.closure, graph.units, after=chosen[-1], whole=True))
    kept = [[int(s.alive(graph.units)[unit_labels(graph, unit)].sum()) for s in chosen] for unit in units]
    assert len(chosen) == samples
    assert len({(unit.num_channels, *counts) for unit, counts in zip(units, kept, strict=True)}) == len(units)
    assert all(counts[0] < unit.num_channels for unit, counts in zip(units, kept, strict=True))
