"""What recurrent layers cost, and that their trace does not go through them step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.export import export_pruned
from lightning_prune.graph.call import bind_arguments, tensors_in
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.shortcuts import shortcut
from tests.compare import assert_same, outputs, scattered
from tests.readings import BATCH, FEATURES, HIDDEN, READINGS, STEPS, gru, linear, reading
from tests.test_certificate import prepare

COSTS = {
    "lstm": (lambda: nn.LSTM(FEATURES, 8, 2, bidirectional=True, proj_size=3), lambda h, p, n: 4 * h * (n + p) + h * p),
    "gru": (lambda: nn.GRU(FEATURES, 8, 2, bidirectional=True), lambda h, p, n: 3 * h * (n + h)),
    "rnn_tanh": (lambda: nn.RNN(FEATURES, 8, 2, bidirectional=True, bias=False), lambda h, p, n: h * (n + h)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COSTS)
def test_a_layer_costs_its_gates_at_every_step(name: str, dtype: torch.dtype) -> None:
    make, formula = COSTS[name]
    model = reading(lambda self, x: self.head(self.rnn(x)[0]), {}, 2 * (3 if name == "lstm" else 8), rnn=make)
    inputs = (torch.randn(STEPS, BATCH, FEATURES, dtype=dtype),)
    mutator = prepare(model.make().to(dtype), inputs)
    for plan in (mutator.current_plan(), scattered(mutator.units)):
        mutator.apply(plan)
        rnn: Any = mutator.model.rnn
        width = rnn.proj_size or rnn.hidden_size
        each = [formula(rnn.hidden_size, width, n) for n in (FEATURES, 2 * width)]
        assert mutator.cost().by_op == {
            f"aten::{name}": STEPS * BATCH * 2 * sum(each),
            "aten::linear": STEPS * BATCH * 2 * width * 5,
        }


def test_a_packed_layer_costs_its_entries() -> None:
    mutator = prepare(READINGS["packed"].make(), (torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64),))
    gates = 4 * HIDDEN * (10 + HIDDEN) + 4 * HIDDEN * (2 * HIDDEN + HIDDEN)
    assert mutator.cost().by_op["aten::lstm"] == (9 + 4 + 6) * 2 * gates


def call_of(module: Any, x: Tensor, states: Any) -> tuple[Any, dict[str, Any]]:
    """Return the op of a layer and its arguments by name."""
    op = getattr(torch.ops.aten, module.mode.lower()).input
    options = (module.bias, module.num_layers, 0.0, False, module.bidirectional, module.batch_first)
    return op, bind_arguments(op, (x, states, module._flat_weights, *options), {})


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.LSTM(7, 6, 2, bidirectional=True), id="lstm"),
        pytest.param(lambda: nn.LSTM(7, 6, proj_size=4, batch_first=True, bias=False), id="projected"),
        pytest.param(lambda: nn.GRU(7, 6, 3, batch_first=True), id="gru"),
        pytest.param(lambda: nn.RNN(7, 6, bidirectional=True), id="rnn"),
    ],
)
def test_a_sequence_is_not_traced_step_by_step(make: Callable[[], Any]) -> None:
    module = make().double()
    copies, width = module.num_layers * (1 + module.bidirectional), module.proj_size or 6
    x = torch.randn(5, 3, 7, dtype=torch.float64).transpose(0, 1)  # any layout
    batch = x.shape[0 if module.batch_first else 1]
    sizes = (width, 6)[: 2 if module.mode == "LSTM" else 1]
    states = [torch.randn(copies, batch, n, dtype=torch.float64) for n in sizes]
    op, args = call_of(module, x, states if len(states) > 1 else states[0])
    expected = op(**args)
    with FakeMode() as mode, torch.inference_mode():
        fake = {
            name: torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, value) for name, value in args.items()
        }
        found = shortcut(mode, op, op._schema.name, fake)
        assert [t.shape for t in found] == [t.shape for t in expected]
        wider = mode.from_tensor(torch.randn(*x.shape[:2], 8, dtype=torch.float64))
        given = fake["hx"] if len(states) > 1 else [fake["hx"]]
        longer = [torch.cat([s, s], -1) for s in given]
        halved = [s.float() for s in given]
        for name, value in (("input", wider), ("hx", longer), ("hx", halved), ("params", fake["params"][::-1])):
            value = value[0] if name == "hx" and len(states) == 1 else value
            assert shortcut(mode, op, op._schema.name, {**fake, name: value}) is None, name


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_is_not_traced_gate_by_gate(make: Callable[..., Any]) -> None:
    cell = make(7, 6, dtype=torch.float64)
    name = {"LSTMCell": "lstm_cell", "GRUCell": "gru_cell", "RNNCell": "rnn_tanh_cell"}[make.__name__]
    op, states = getattr(torch.ops.aten, name).default, [torch.randn(3, 6, dtype=torch.float64) for _ in "hc"]
    hx = states if make is nn.LSTMCell else states[0]
    args = bind_arguments(op, (torch.randn(3, 7, dtype=torch.float64), hx, *cell.parameters()), {})
    expected = tensors_in(op(**args))
    with FakeMode() as mode, torch.inference_mode():
        fake = {k: torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, value) for k, value in args.items()}
        assert [t.shape for t in tensors_in(shortcut(mode, op, op._schema.name, fake))] == [t.shape for t in expected]
        for argument, changed in (("w_hh", fake["w_ih"]), ("b_ih", fake["b_ih"][1:]), ("input", fake["input"][:2])):
            assert shortcut(mode, op, op._schema.name, {**fake, argument: changed}) is None, argument


def autocasting(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.head(self.cell(self.rnn(self.embed(x))[0].mean(1)))


def test_a_layer_under_autocast_is_traced_too() -> None:
    keeps = {"embed": linear(FEATURES, 10), "rnn": gru(10), "cell": lambda: nn.GRUCell(HIDDEN, 8)}
    model = reading(autocasting, {}, 8, **keeps).make().float()
    inputs = (torch.randn(BATCH, STEPS, FEATURES),)
    mutator = prepare(model, inputs)
    assert {unit.num_channels for unit in mutator.units} == {10, 12, 8}
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(export_pruned(model), inputs), outputs(model, inputs))
