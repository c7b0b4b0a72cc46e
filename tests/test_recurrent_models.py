"""Models with recurrent layers: the ways in which people read them, each certified and equal to the zero-masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import structure_of
from lightning_prune.export import export_pruned
from lightning_prune.importance import resolve_importance
from lightning_prune.importance.observer import LossScale
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops.structure import reshape_
from tests.compare import assert_same, outputs, scattered
from tests.readings import BATCH, FEATURES, HIDDEN, PAIR, READINGS, STEPS, gru, linear, reading
from tests.test_certificate import assert_sound, prepare


@pytest.mark.parametrize("name", READINGS)
def test_a_model_computes_what_the_zero_masked_one_does(name: str) -> None:
    inputs = (torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64),)
    mutator = prepare(READINGS[name].make(), inputs)
    assert {unit.name: unit.num_channels for unit in mutator.units} == READINGS[name].units
    assert assert_sound(mutator, inputs) == 0


MADE_ELSEWHERE = [
    pytest.param(lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"), id="parametrised"),
    pytest.param(lambda m: nn.utils.weight_norm(m, "weight_hh_l0"), id="hook"),
    pytest.param(lambda m: nn.utils.prune.identity(m, "weight_ih_l0"), id="pruning mask"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("make", MADE_ELSEWHERE)
def test_a_layer_whose_weights_others_make_keeps_its_sizes(make: Callable[[nn.Module], nn.Module]) -> None:
    rnn = make(nn.LSTM(10, HIDDEN))
    model = reading(
        lambda self, x: self.head(self.rnn(self.embed(x))[0]), {}, embed=linear(FEATURES, 10), rnn=rnn
    ).make()
    inputs = (torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64),)
    before = outputs(model, inputs)
    mutator = prepare(model, inputs)
    assert not mutator.units
    reasons = {f.tensor: f.reason for f in mutator.graph.frozen}
    assert reasons["rnn.bias_hh_l0"].endswith("LSTM has weights that are made elsewhere")
    assert_same(outputs(model, inputs), before)


def test_a_trace_does_not_move_the_memory_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = READINGS["flattened each time"].make()

    def refuse(_: nn.Module) -> None:
        raise AssertionError("called in a trace")

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", refuse)
    assert ChannelMutator(example_input=torch.randn(BATCH, STEPS, FEATURES).double())._analyze(model)[0].units
    assert "flatten_parameters" not in vars(model.rnn)


def projected() -> tuple[nn.Module, ChannelMutator, tuple[Tensor, ...]]:
    inputs = (torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64),)
    model = reading(
        lambda self, x: self.head(self.rnn(x)[0]), {}, 4, rnn=lambda: nn.LSTM(FEATURES, 11, 2, proj_size=4)
    ).make()
    return model, prepare(model, inputs), inputs


def test_more_hidden_channels_stay_than_projected_ones() -> None:
    model, mutator, inputs = projected()
    assert {unit.name: unit.num_channels for unit in mutator.units} == {
        "rnn_(5, 44)_out_1_in_1": 6,
        "rnn_(0, 4)_out_1_in_2": 4,
    }
    mutator.set_choices(mutator.sample_choices("min"))
    assert (model.rnn.hidden_size, model.rnn.proj_size) == (6, 1)
    assert_same(outputs(export_pruned(model), inputs), outputs(model, inputs))
    frozen = {(f.tensor, f.dim): (f.size, f.reason) for f in mutator.graph.frozen}
    size, reason = frozen["rnn.weight_hr_l0", 1]
    assert (size, reason.partition(" in ")[0]) == (5, "more hidden channels are asked for than projected ones")


def test_every_weight_that_makes_a_channel_speaks_for_it() -> None:
    model, mutator, _ = projected()
    hidden, made = mutator.units
    assert [(c.tensor, c.dim, c.start, c.end) for c in made.output_related] == [
        ("weight_hr_l0", 0, 0, 4),
        ("weight_hr_l1", 0, 0, 4),
    ]
    assert {(c.tensor, c.dim) for c in made.input_related if c.name == "rnn"} == {
        ("weight_hh_l0", 1),
        ("weight_hh_l1", 1),
        ("weight_ih_l1", 1),
    }
    # the four gates of a channel are four rows, each a member, in each of four weights
    weights = [p for n, p in model.rnn.named_parameters() if n.startswith(("weight_ih", "weight_hh"))]
    expected = sum(w.detach().abs().sum(1).view(4, 11)[:, 5:].sum(0) for w in weights) / 16
    torch.testing.assert_close(hidden.scores().double(), expected, rtol=1e-6, atol=0)


def test_gradients_of_a_layer_count_once() -> None:
    model = reading(lambda self, x: self.head(self.rnn(x)[0]), {}, rnn=gru(**PAIR)).make()
    inputs = (torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64),)
    (unit,) = prepare(model, inputs).units
    observer: Any = resolve_importance({"name": "hessian", "reduction": "sum", "normalizer": "none"}).observer([unit])
    model(*inputs).square().mean().backward()
    observer.before_step({id(p) for p in model.parameters()}, LossScale())
    rows = [(p * p.grad).square().view(3, HIDDEN, -1).sum((0, 2)) for p in model.rnn.parameters()]
    expected = torch.stack(rows).sum(0) / 2
    torch.testing.assert_close(observer.scores([unit])[unit.name].double(), expected.detach(), rtol=1e-6, atol=0)


def test_a_copy_of_a_supernet_takes_choices_too() -> None:
    model, _, inputs = projected()
    twin = copy.deepcopy(model)
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(twin)
    mutator.set_choices({"rnn_(0, 4)*": 2, "rnn_(5, 44)*": 3})
    assert (twin.rnn.hidden_size, twin.rnn.proj_size, model.rnn.hidden_size) == (8, 2, 11)


def test_a_written_structure_reshapes_a_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mutator, inputs = projected()
    mutator.apply(scattered(mutator.units))
    dense, _, _ = projected()
    sizes = (dense.rnn.hidden_size, dense.rnn.proj_size)
    moved: list[list[Tensor]] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: moved.append([*self._flat_weights]))
    reshape_(dense, structure_of(model))
    assert sizes == (11, 4)
    assert (dense.rnn.hidden_size, dense.rnn.proj_size) == (model.rnn.hidden_size, model.rnn.proj_size) != sizes
    assert all(a is b for a, b in zip(moved[-1], dense.rnn.parameters(), strict=True))
    dense.load_state_dict(export_pruned(model).state_dict())
    assert_same(outputs(dense, inputs), outputs(model, inputs))
