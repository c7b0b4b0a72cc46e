"""Dynamic recurrent layers and cells, one by one: masks of input, hidden and projected channels, and what follows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops
from lightning_prune.graph.contents import tensors_within
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import DynamicOp, convert_, static_view
from lightning_prune.ops.slicing import take
from tests.compare import assert_same

INPUTS, HIDDEN, PROJECTED = (1, 0, 1, 1, 0, 1), (0, 1, 1, 0, 1, 1, 0), (1, 0, 1, 0)


@dataclass(frozen=True)
class Case:
    """A layer, and the masks that cut it; each is registered once, on the axis that is named after the integer."""

    make: Callable[[], nn.Module]
    masks: dict[str, tuple[int, ...]]
    shape: tuple[int, ...] = (5, 3)  # of the input, without its channels

    @property
    def integers(self) -> dict[str, int]:
        return {name: sum(bits) for name, bits in self.masks.items()}

    def dense(self) -> nn.Module:
        torch.manual_seed(3)
        return self.make().double()

    def cut(self) -> DynamicOp:
        op = convert_(self.dense())
        assert isinstance(op, DynamicOp)
        for name, bits in self.masks.items():
            channel = MutableChannel(len(bits))
            op.get_mutable_attr(name).register_mutable(channel, 0, len(bits))
            channel.current_choice = torch.tensor(bits, dtype=torch.bool)
        return op

    def input(self, channels: int) -> Tensor:
        return torch.randn(*self.shape, channels, dtype=torch.float64)


SIZES = {"input_size": 6, "hidden_size": 7}
BOTH = {"input_size": INPUTS, "hidden_size": HIDDEN}
DEEP = {"num_layers": 3, "bidirectional": True, "dropout": 0.3}
CASES = {
    "LSTM": Case(lambda: nn.LSTM(6, 7), BOTH),
    "LSTM, deep": Case(lambda: nn.LSTM(6, 7, batch_first=True, **DEEP), BOTH),
    "LSTM, projected": Case(lambda: nn.LSTM(6, 7, proj_size=4), {**BOTH, "proj_size": PROJECTED}),
    "LSTM, deep and projected": Case(
        lambda: nn.LSTM(6, 7, proj_size=4, bias=False, **DEEP), {**BOTH, "proj_size": PROJECTED}
    ),
    "LSTM, outputs alone": Case(lambda: nn.LSTM(6, 7, proj_size=4, num_layers=2), {"proj_size": PROJECTED}),
    "LSTM, inputs alone": Case(lambda: nn.LSTM(6, 7, num_layers=2), {"input_size": INPUTS}),
    "GRU": Case(lambda: nn.GRU(6, 7, bias=False), BOTH),
    "GRU, deep": Case(lambda: nn.GRU(6, 7, **DEEP), BOTH),
    "GRU, no batch": Case(lambda: nn.GRU(6, 7), BOTH, (5,)),
    "RNN": Case(lambda: nn.RNN(6, 7), {"hidden_size": HIDDEN}),
    "RNN, deep": Case(lambda: nn.RNN(6, 7, nonlinearity="relu", batch_first=True, **DEEP), BOTH),
    "LSTM cell": Case(lambda: nn.LSTMCell(6, 7), BOTH, (3,)),
    "GRU cell": Case(lambda: nn.GRUCell(6, 7, bias=False), BOTH, (3,)),
    "RNN cell": Case(lambda: nn.RNNCell(6, 7, nonlinearity="relu"), BOTH, (3,)),
}
cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
TRAINING = pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])


def run(module: nn.Module, *inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)  # dropout between layers
    return tensors_within(module(*inputs))


@cases
@TRAINING
def test_conversion_is_invisible(case: Case, training: bool) -> None:
    dense = case.dense().train(training)
    twin, held = copy.deepcopy(dense), dict(dense.named_parameters())
    assert convert_(dense) is dense
    assert type(dense).__name__ == f"Dynamic{type(twin).__name__}"
    assert isinstance(dense, ops.OPS[type(twin)])
    example = case.input(6)
    assert_same(run(dense, example), run(twin, example))
    assert all(getattr(dense, name) is parameter for name, parameter in held.items())
    assert list(dense.state_dict()) == list(twin.state_dict())
    assert_same(dense.state_dict().values(), twin.state_dict().values())


@cases
@TRAINING
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_dynamic_equals_exported_bit_for_bit(case: Case, training: bool, mode: Any) -> None:
    op = case.cut().train(training)
    exported = copy.deepcopy(op).to_static()
    assert type(exported) is type(case.make())
    assert {name: exported.__dict__[name] for name in case.integers} == case.integers
    assert {name: getattr(op, name) for name in case.integers} == case.integers
    assert "_dynamic" not in exported.__dict__
    assert repr(exported) == f"{type(exported).__name__}({op.extra_repr()})"
    with mode():
        example = case.input(op.input_size)
        assert_same(run(op, example), run(exported, example))


@cases
def test_removing_channels_is_setting_their_weights_to_zero(case: Case) -> None:
    op, zeroed = case.cut().eval(), case.dense().eval()
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            for dim, kept in enumerate(op.kept_indices_of(name)):
                if kept is not None:
                    removed = torch.ones(parameter.shape[dim], dtype=torch.bool).index_fill_(0, kept, False)
                    parameter.index_fill_(dim, removed.nonzero().flatten(), 0.0)
    inputs, hidden = (torch.tensor(case.masks.get(name, (1,) * n)).bool() for name, n in SIZES.items())
    made = torch.tensor(case.masks.get("proj_size", hidden.int().tolist())).bool()
    full = case.input(6)
    pairs = zip(run(op, full[..., inputs]), run(zeroed, full), (made, made, hidden), strict=False)
    for found, expected, mask in pairs:
        alive = mask.repeat(expected.shape[-1] // len(mask))  # both directions
        torch.testing.assert_close(found, expected[..., alive], rtol=0, atol=1e-12)


@cases
def test_gradients_equal_the_exported_ones_and_are_zero_where_cut(case: Case) -> None:
    op = case.cut()
    exported = copy.deepcopy(op).to_static()
    example = case.input(op.input_size)
    for module in (op, exported):
        torch.stack([t.square().sum() for t in run(module, example)]).sum().backward()
    for name, parameter in op.named_parameters():
        kept = take(parameter.grad, op._dynamic.cuts(op, name))
        assert torch.equal(kept, getattr(exported, name).grad), name
        assert parameter.grad.count_nonzero() == kept.count_nonzero(), name


@cases
def test_the_exported_layer_is_one_that_torch_could_have_made(case: Case) -> None:
    op = case.cut()
    held = {name: id(parameter) for name, parameter in op.named_parameters()}
    exported = op.to_static()
    assert {name: id(parameter) for name, parameter in exported.named_parameters()} == held
    if isinstance(exported, nn.RNNBase):
        assert all(a is b for a, b in zip(exported._flat_weights, exported.parameters(), strict=True))
        assert not exported._weights_have_changed()
    options = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size", "nonlinearity")
    given = {name: exported.__dict__[name] for name in options if name in exported.__dict__}
    if type(exported) in (nn.GRU, nn.RNN):
        del given["proj_size"]
    other = type(exported)(exported.input_size, exported.hidden_size, **given)
    other.double().load_state_dict(exported.state_dict())
    example = case.input(exported.input_size)
    assert_same(run(other.eval(), example), run(exported.eval(), example))
    for tensor in exported.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@cases
@pytest.mark.parametrize("clone", [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(pickled, id="pickle")])
def test_copies_run_alike_and_have_their_own_masks(case: Case, clone: Callable[[Any], Any]) -> None:
    op = case.cut().eval()
    example = case.input(op.input_size)
    expected = run(op, example)
    twin = clone(op)
    assert type(twin) is type(op)
    assert_same(run(twin, example), expected)
    for axis in op.mutable_attrs.values():
        for span in axis.spans:
            span.mutable.current_choice = torch.ones(span.mutable.num_channels, dtype=torch.bool)
    assert_same(run(twin, example), expected)
    assert_same(run(twin.to_static(), example), expected)
    with static_view(op):
        full = case.input(6)
        assert_same(run(op, full), run(case.dense().eval(), full))


@cases
def test_a_state_dict_loads_into_dense_and_cut(case: Case) -> None:
    op, fresh = case.cut(), case.make().double()
    fresh.load_state_dict(op.state_dict())
    assert_same(fresh.state_dict().values(), case.dense().state_dict().values())
    changed = {name: tensor + 1 for name, tensor in op.state_dict().items()}
    op.load_state_dict(changed)
    assert_same(op.state_dict().values(), changed.values())
    fresh.load_state_dict(changed)
    twin = case.cut()
    twin.load_state_dict(changed)
    example = case.input(op.input_size)
    assert_same(run(op.eval(), example), run(twin.to_static().eval(), example))


RECURRENT = [pytest.param(case, id=name) for name, case in CASES.items() if "cell" not in name]


@pytest.mark.parametrize("case", RECURRENT)
def test_a_change_of_type_keeps_masks_and_dense_weights(case: Case) -> None:
    op = case.cut().eval()
    op.float().reset_parameters()
    assert all(float(p.detach().abs().max()) <= 7**-0.5 for p in op.parameters())  # by the dense hidden size
    assert {name: p.shape for name, p in op.named_parameters()} == {
        n: p.shape for n, p in case.make().named_parameters()
    }
    assert {p.dtype for p in op.parameters()} == {torch.float32}
    op.double()
    exported = copy.deepcopy(op).to_static()
    example = case.input(op.input_size)
    assert_same(run(op, example), run(exported, example))


@pytest.mark.parametrize("case", RECURRENT)
def test_the_list_of_weights_that_torch_keeps_is_that_of_the_dense_ones(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = case.cut().eval()
    listed = vars(op)["_flat_weights"]
    run(op, case.input(op.input_size))
    assert vars(op)["_flat_weights"] is listed
    seen: list[Any] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: seen.append(self._flat_weights))
    op.flatten_parameters()
    assert all(a is b for a, b in zip(seen[0], op.parameters(), strict=True))
    small = pickled(op).to_static()
    assert not small._weights_have_changed()
    assert all(a is b for a, b in zip(seen[1], small.parameters(), strict=True))  # cuDNN finds them side by side


@pytest.mark.parametrize("case", RECURRENT)
def test_weights_that_are_swapped_are_the_ones_that_run(case: Case) -> None:
    op = case.cut().eval()
    example, before = case.input(op.input_size), run(op, case.input(op.input_size))
    swapped = {name: parameter * 0.5 for name, parameter in op.named_parameters()}
    torch.manual_seed(0)
    found = tensors_within(torch.func.functional_call(op, swapped, (example,)))
    for name, value in swapped.items():
        setattr(op, name, nn.Parameter(value.detach()))
    assert_same(run(op, example), found)
    assert not torch.equal(before[0], found[0])
    replica = op._replicate_for_data_parallel()  # what nn.DataParallel does on each device
    for name, value in swapped.items():
        setattr(replica, name, value)
    assert_same(run(replica, example), found)
    assert_same(run(op.to_static(), example), found)


def test_an_initial_state_has_the_kept_size() -> None:
    op = CASES["LSTM, deep and projected"].cut().eval()
    states = torch.randn(6, 3, 2, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    example = torch.randn(5, 3, 4, dtype=torch.float64)
    assert_same(run(op, example, states), run(copy.deepcopy(op).to_static(), example, states))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(6, 3, 2\)"):
        op(example, (torch.zeros(6, 3, 4, dtype=torch.float64), states[1]))


def test_packed_sequences_run() -> None:
    op = CASES["GRU, deep"].cut().eval()
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in (5, 3, 2)])
    assert_same(run(op, packed), run(copy.deepcopy(op).to_static(), packed))


def test_a_subclass_runs_its_own_forward() -> None:
    class Doubled(nn.GRU):
        def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
            return super().forward(x * times)[0]

    op = Case(lambda: Doubled(6, 7), BOTH).cut()
    example = torch.randn(5, 3, 4, dtype=torch.float64)
    assert torch.equal(op(example, times=2.0), copy.deepcopy(op).to_static()(example, times=2.0))
    assert torch.equal(op(example, times=2.0), op(2 * example))
    assert type(op).__name__ == "DynamicDoubled"
