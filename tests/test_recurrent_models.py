"""Models with recurrent layers: the ways in which people read them, each certified and equal to the zero-masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from lightning_prune.checkpoint import structure_of
from lightning_prune.export import export_pruned
from lightning_prune.graph.call import bind_arguments, tensors_in
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.shortcuts import shortcut
from lightning_prune.importance import resolve_importance
from lightning_prune.importance.observer import LossScale
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops.structure import reshape_
from tests.compare import assert_same, outputs, scattered
from tests.test_certificate import assert_sound, prepare

BATCH, STEPS, FEATURES, HIDDEN = 3, 9, 7, 12
LSTM, GRU, PAIR = {"rnn_(0, 48)_out_1_in_2": 12}, {"rnn_(0, 36)_out_1_in_2": 12}, {"num_layers": 2}
ONE_LAYER = (1, 0.0, False, False, True)  # number, dropout, train, both directions, batch first
EMBED = {"embed_(0, 10)_out_1_in_1": 10}


class Model(nn.Module):
    """A function, given the module for what it keeps."""

    def __init__(self, function: Callable[..., Any], keeps: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.hidden = function, HIDDEN
        for name, value in keeps.items():
            setattr(self, name, value() if callable(value) and not isinstance(value, nn.Module) else value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Reading(NamedTuple):
    function: Callable[..., Any]
    units: dict[str, int]
    keeps: dict[str, Any]

    def make(self) -> nn.Module:
        return Model(self.function, self.keeps).double()


def reading(function: Callable[..., Any], units: dict[str, int], read: int = HIDDEN, **keeps: Any) -> Reading:
    return Reading(function, units, {**keeps, "head": lambda: nn.Linear(read, 5)})


def both_ways(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.LSTM(FEATURES, HIDDEN, bidirectional=True, batch_first=True, **options)


def gru(inputs: int = FEATURES, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.GRU(inputs, HIDDEN, batch_first=True, **options)


def linear(a: int, b: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b)


def zeros(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(2, len(x), self.hidden, dtype=x.dtype) for _ in "hc")  # type: ignore[return-value]


def packed(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    sequences = pack_padded_sequence(self.embed(x), torch.tensor([9, 4, 6]), batch_first=True, enforce_sorted=False)
    output, (state, _) = self.rnn(sequences)
    padded, _ = pad_packed_sequence(output, batch_first=True)
    return self.head(padded), self.head(torch.cat([state[-2], state[-1]], -1))


def attended(self: Any, x: Tensor) -> Tensor:
    output = self.rnn(x)[0]
    return self.head((self.score(output).softmax(1) * output).sum(1))


READINGS = {
    # the two directions of the outputs
    "directions added by slices": reading(
        lambda self, x: self.head((lambda o: o[..., : self.hidden] + o[..., self.hidden :])(self.rnn(x)[0])),
        LSTM, rnn=both_ways(),
    ),
    "directions added by the size of the layer": reading(
        lambda self, x: self.head((lambda o, n: o[..., :n] + o[..., n:])(self.rnn(x)[0], self.rnn.hidden_size)),
        LSTM, rnn=both_ways(),
    ),
    "directions viewed apart": reading(
        lambda self, x: self.head(self.rnn(x)[0].reshape(BATCH, STEPS, 2, -1).sum(2)), LSTM, rnn=both_ways()
    ),
    "directions chunked": reading(
        lambda self, x: self.head(torch.mul(*self.rnn(x)[0].chunk(2, -1))), LSTM, rnn=both_ways()
    ),
    "directions normalised together": reading(
        lambda self, x: self.head(self.norm(self.rnn(x)[0])),
        {"rnn_(0, 48)_out_2_in_3": 12}, 2 * HIDDEN, rnn=both_ways(), norm=lambda: nn.LayerNorm(2 * HIDDEN),
    ),
    "attention over the steps": reading(
        attended, {"rnn_(0, 48)_out_1_in_3": 12}, 2 * HIDDEN, rnn=both_ways(), score=linear(2 * HIDDEN, 1)
    ),
    # the last states
    "states viewed apart": reading(
        lambda self, x: self.head(
            self.rnn(x)[1][0].view(2, 2, BATCH, self.rnn.hidden_size)[-1].transpose(0, 1).reshape(BATCH, -1)
        ),
        LSTM, 2 * HIDDEN, rnn=both_ways(**PAIR),
    ),
    "states of all layers": reading(
        lambda self, x: self.head(self.rnn(x)[1][0].transpose(0, 1).flatten(1)),
        LSTM, 4 * HIDDEN, rnn=both_ways(**PAIR),
    ),
    "hidden and cell state": reading(
        lambda self, x: self.head(torch.cat([state[-1] for state in self.rnn(x)[1]], -1)),
        LSTM, 2 * HIDDEN, rnn=both_ways(),
    ),
    # the first states
    "zeros of the parent's size": reading(
        lambda self, x: self.head(self.rnn(x, zeros(self, x))[0][:, -1]), LSTM, 2 * HIDDEN, rnn=both_ways()
    ),
    "ones": reading(
        lambda self, x: self.head(self.rnn(x, x.new_ones(1, BATCH, self.rnn.hidden_size))[0]), GRU, rnn=gru()
    ),
    "made by a layer": reading(
        lambda self, x: self.head(self.rnn(x, self.start(x.mean(1))[None])[0]),
        {"start_(0, 12)_out_2_in_2": 12}, start=linear(FEATURES, HIDDEN), rnn=gru(),
    ),
    "of a decoder": reading(
        lambda self, x: self.head(self.decoder(self.embed(x), self.encoder(x)[1])[0]),
        {"encoder_(0, 36)_out_2_in_3": 12, **EMBED}, encoder=gru(**PAIR), embed=linear(FEATURES, 10),
        decoder=gru(10, **PAIR),
    ),
    # several layers
    "residual": reading(
        lambda self, x: self.head((lambda y: y + self.two(y)[0])(self.one(x)[0])),
        {"one_(0, 36)_out_2_in_3": 12}, one=gru(), two=gru(HIDDEN),
    ),
    "one layer twice": reading(
        lambda self, x: self.head(self.rnn(self.rnn(self.embed(x))[0])[0]),
        {"embed_(0, 12)_out_2_in_2": 12}, embed=linear(FEATURES, HIDDEN), rnn=gru(HIDDEN),
    ),
    "after a convolution": reading(
        lambda self, x: self.head(self.rnn(F.relu(self.stem(x[:, None])).permute(0, 3, 1, 2).flatten(2))[0][:, -1]),
        {"stem_(0, 6)_out_1_in_1": 6, **GRU}, stem=lambda: nn.Conv2d(1, 6, 3, padding=1), rnn=gru(6 * STEPS),
    ),
    # sequences
    "packed": reading(
        packed, {**EMBED, **LSTM}, 2 * HIDDEN, embed=linear(FEATURES, 10),
        rnn=lambda: nn.LSTM(10, HIDDEN, 2, bidirectional=True),
    ),
    "packed from a list": reading(
        lambda self, x: self.head(self.rnn(pack_sequence([self.embed(x[0]), self.embed(x[1, :4])]))[1][-1]),
        {**EMBED, **GRU}, embed=linear(FEATURES, 10), rnn=gru(10),
    ),
    "without a batch": reading(
        lambda self, x: self.head(self.rnn(self.embed(x[0]))[0]), {**EMBED, **GRU}, embed=linear(FEATURES, 10),
        rnn=gru(10),
    ),
    # around the layer
    "flattened each time": reading(
        lambda self, x: (self.rnn.flatten_parameters(), self.head(self.rnn(x)[0]))[1], GRU, rnn=gru()
    ),
    "called with its weights": reading(
        lambda self, x: self.head(
            torch.gru(x, x.new_zeros(1, BATCH, self.hidden), self.rnn.all_weights[0], True, *ONE_LAYER)[0]
        ),
        GRU, rnn=gru(),
    ),
    "raw parameters": reading(
        lambda self, x: self.head(
            torch.gru(x, x.new_zeros(1, BATCH, self.hidden), [self.a, self.b], False, *ONE_LAYER)[0]
        ),
        {"a_(0, 36)_out_1_in_2": 12},
        a=lambda: nn.Parameter(torch.randn(36, FEATURES)), b=lambda: nn.Parameter(torch.randn(36, HIDDEN) / 4),
    ),
    # nothing may go
    "outputs of the model": reading(
        lambda self, x: self.rnn(self.embed(x))[0], EMBED, embed=linear(FEATURES, 10), rnn=gru(10)
    ),
    "never called": reading(
        lambda self, x: self.head(self.embed(x)), EMBED, 10, embed=linear(FEATURES, 10), rnn=gru()
    ),
    "one weight read by itself": reading(
        lambda self, x: self.head(F.linear(x, self.rnn.weight_ih_l0)), {}, 3 * HIDDEN, rnn=gru()
    ),
}  # fmt: skip


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
