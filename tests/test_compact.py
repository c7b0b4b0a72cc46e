from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from torch import nn, optim

from lightning_prune.compact import compact_, grow_
from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannel
from lightning_prune.ops import DynamicOp, convert_
from lightning_prune.ops.structure import structure_of

KEPT = [0, 2, 3]
OPTIMIZERS = {
    "SGD": functools.partial(optim.SGD, lr=0.1),
    "SGD momentum": functools.partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True, weight_decay=0.1),
    "SGD fused": functools.partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": optim.Adam,
    "Adam amsgrad": functools.partial(optim.Adam, amsgrad=True, foreach=True),
    "AdamW fused": functools.partial(optim.AdamW, fused=True),
    "RMSprop": functools.partial(optim.RMSprop, momentum=0.9, centered=True),
    "Adam fused": functools.partial(optim.Adam, amsgrad=True, fused=True),
    "NAdam foreach": functools.partial(optim.NAdam, foreach=True, decoupled_weight_decay=True, weight_decay=0.1),
    "RMSprop foreach": functools.partial(optim.RMSprop, momentum=0.9, foreach=True),
    "Adagrad": optim.Adagrad,
    "Adagrad fused": functools.partial(optim.Adagrad, fused=True),
    "Adagrad foreach": functools.partial(optim.Adagrad, foreach=True),
    "Adadelta foreach": functools.partial(optim.Adadelta, foreach=True),
    "Adadelta": optim.Adadelta,
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Rprop": optim.Rprop,
    "ASGD": functools.partial(optim.ASGD, t0=1),
    "Adafactor": functools.partial(optim.Adafactor, lr=0.1),
    "Adafactor foreach": functools.partial(optim.Adafactor, lr=0.1, foreach=True),
    "Muon": lambda parameters: optim.Muon([p for p in parameters if p.dim() == 2], lr=0.1),
}
ELEMENTWISE = [  # fused kernels round by the place in a vector; in the others a step of one entry depends on others
    name for name in OPTIMIZERS if "fused" not in name and not name.startswith(("Adafactor", "Muon"))
]
FLAGS = {
    (kind, flag): pytest.param(kind, flag, id=f"{kind.__name__} {flag}")
    for kind in (optim.Adam, optim.AdamW, optim.NAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta)
    for flag in ("capturable", "fused", "foreach")
    if flag in inspect.signature(kind).parameters
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def supernet() -> tuple[nn.Sequential, MutableChannel]:
    """Two layers that share a hidden width of 5, all kept."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    hidden = MutableChannel(5)
    convert_(model[0]).get_mutable_attr("out_channels").register_mutable(hidden, 0, 5)
    convert_(model[2]).get_mutable_attr("in_channels").register_mutable(hidden, 0, 5)
    return model, hidden


def prune(hidden: MutableChannel, kept: list[int] = KEPT) -> None:
    mask = torch.zeros(hidden.num_channels, dtype=torch.bool)
    mask[kept] = True
    hidden.current_choice = mask


BATCH = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(BATCH).square().sum().backward()
    optimizer.step()


def sliced(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Slice by hand; axes of length 1 stay."""
    if tensor.dim() == 0 or tensor.shape[dim] == 1:
        return tensor.clone()
    return tensor.detach().index_select(dim, torch.tensor(KEPT)).clone()


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OPTIMIZERS.items()])
def test_training_goes_on_like_that_of_a_small_model_with_sliced_state(make):
    model, hidden = supernet()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    prune(hidden)
    step(model, optimizer)

    small = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    dims = {"0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": None}
    dense = dict(model.named_parameters())
    other = make(small.parameters())
    for name, parameter in small.named_parameters():
        cut = copy.deepcopy if dims[name] is None else functools.partial(sliced, dim=dims[name])
        parameter.data = cut(dense[name].detach())
        other.state[parameter] = {
            key: cut(value) if isinstance(value, torch.Tensor) else value
            for key, value in optimizer.state[dense[name]].items()
        }

    before = [id(parameter) for parameter in model.parameters()]
    state = optimizer.state
    compact_(model, optimizer)
    assert [id(parameter) for parameter in model.parameters()] == before
    assert optimizer.state is state
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    for _ in range(3):
        step(model, optimizer)
        step(small, other)
    for mine, theirs in zip(model.parameters(), small.parameters(), strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[theirs][key])), key


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_training_goes_on_like_that_of_the_masked_model(name):
    model, hidden = supernet()
    masked, same = supernet()
    masked.load_state_dict(model.state_dict())
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (model, masked))
    for each, mutable, stepper in ((model, hidden, optimizer), (masked, same, other)):
        for _ in range(2):
            step(each, stepper)
        prune(mutable)
        step(each, stepper)
    compact_(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(masked, other)
    for small, op in ((model[0], masked[0]), (model[2], masked[2])):
        assert torch.equal(small.weight, op.weight)  # of a dynamic op its kept slice
        assert torch.equal(small.bias, op.bias)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "flag"), FLAGS.values())
def test_state_shrinks_on_a_gpu_too(kind, flag):
    model, hidden = supernet()
    model = model.cuda()
    optimizer = kind(model.parameters(), **{flag: True})
    batch = BATCH.cuda()
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        prune(hidden)
        compact_(model, optimizer)
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert {tuple(state.shape) for state in states} == {(3, 4), (3,), (2, 3), (2,)}


@pytest.mark.parametrize("kept", [pytest.param(KEPT, id="three"), pytest.param([2], id="one")])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OPTIMIZERS.items()])
def test_a_small_model_grows_back_with_zeros_and_shrinks_to_what_it_was(make, kept):
    model, hidden = supernet()
    optimizer = make(model.parameters())
    prune(hidden, kept)
    step(model, optimizer)
    compact_(model, optimizer)
    step(model, optimizer)
    small = copy.deepcopy([dict(model.state_dict()), optimizer.state_dict()])

    grow_(model, optimizer)
    gone = [k for k in range(5) if k not in kept]
    assert model[0].weight.shape == (5, 4)
    assert model[0].out_features == model[2].in_features == 5
    assert torch.equal(model[0].weight[kept], small[0]["0.weight"])
    assert not model[0].weight[gone].any()
    for value in optimizer.state.get(model[0].bias, {}).values():
        assert not isinstance(value, torch.Tensor) or value.dim() == 0 or not value[gone].any()
    convert_(model[0]).get_mutable_attr("out_channels").register_mutable(hidden, 0, 5)
    convert_(model[2]).get_mutable_attr("in_channels").register_mutable(hidden, 0, 5)
    compact_(model, optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, small[0][name]), name
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(small[1]["state"][index][key])), key


def test_growing_a_dense_model_changes_nothing():
    model, _ = supernet()
    grow_(model)
    assert isinstance(model[0], DynamicOp)


def test_a_graph_that_is_still_alive_does_not_hinder():
    model, hidden = supernet()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    alive = model(BATCH).sum()
    alive.backward(retain_graph=True)
    prune(hidden)
    compact_(model, [optimizer])
    step(model, optimizer)
    assert model[0].weight.grad.shape == (3, 4)
    assert alive.grad_fn is not None


def test_several_optimizers_and_hooks_live_on():
    model, hidden = supernet()
    first, second = optim.Adam(model[0].parameters()), optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    seen = []
    model[0]._parameters["weight"].register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.shape)))
    for optimizer in (first, second):
        step(model, optimizer)
    prune(hidden)
    compact_(model, [first, second])
    step(model, first)
    assert first.state[model[0].weight]["exp_avg"].shape == (3, 4)
    assert second.state[model[2].weight]["momentum_buffer"].shape == (2, 3)
    assert seen == [(5, 4), (5, 4), (3, 4)]


def test_state_of_parameters_that_keep_their_size_is_not_touched():
    model, hidden = supernet()
    optimizer = optim.Adam(model.parameters())
    step(model, optimizer)
    moment = optimizer.state[model[2].bias]["exp_avg"]
    prune(hidden)
    compact_(model, optimizer)
    assert optimizer.state[model[2].bias]["exp_avg"] is moment


class Rows(optim.SGD):
    """Keeps a row sum without the other axis, as some factored optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault(
                    "rows", parameter.grad.flatten(1).sum(1) if parameter.dim() > 1 else parameter.grad.clone()
                )
                state.setdefault("nested", [parameter.grad.clone(), {"deep": parameter.grad.clone()}, None, 3])


def test_state_with_another_layout_is_reset_with_a_warning():
    model, hidden = supernet()
    optimizer = Rows(model.parameters(), lr=0.1)
    step(model, optimizer)
    prune(hidden)
    with pytest.warns(UserWarning, match=r"reset: Rows\.rows \(2 entries\)"):
        compact_(model, optimizer)
    assert optimizer.state[model[0].weight] == {}
    kept = optimizer.state[model[0].bias]
    assert kept["rows"].shape == kept["nested"][0].shape == kept["nested"][1]["deep"].shape == (3,)
    assert kept["nested"][2:] == [None, 3]


def test_lbfgs_is_refused_before_anything_changes():
    model, hidden = supernet()
    prune(hidden)
    with pytest.raises(ConfigError, match="Got LBFGS"):
        compact_(model, optim.LBFGS(model.parameters()))
    assert isinstance(model[0], DynamicOp)
    assert model[0]._parameters["weight"].shape == (5, 4)


def test_lbfgs_over_parameters_that_keep_their_size_is_fine():
    model, hidden = supernet()
    prune(hidden)
    compact_(model, optim.LBFGS([model[2].bias]))
    assert type(model[0]) is nn.Linear


def test_compacting_twice_composes_the_structure():
    model, hidden = supernet()
    prune(hidden, [0, 2, 3])
    compact_(model)
    again = MutableChannel(3)
    convert_(model[0]).get_mutable_attr("out_channels").register_mutable(again, 0, 3)
    convert_(model[2]).get_mutable_attr("in_channels").register_mutable(again, 0, 3)
    prune(again, [0, 2])
    for _ in range(2):
        structure = structure_of(model)
        assert structure["tensors"]["0.weight"]["shape"] == [5, 4]
        assert structure["tensors"]["0.weight"]["kept"]["0"].tolist() == [0, 3]
        assert structure["integers"]["2"]["in_features"] == {"full": 5, "kept": 2}
        compact_(model)
    assert model[0].weight.shape == (2, 4)


def test_a_model_without_dynamic_ops_stays_as_it_is():
    model = nn.Sequential(nn.Linear(2, 2))
    compact_(model, optim.SGD(model.parameters(), lr=0.1))
    assert structure_of(model)["tensors"] == {}
    assert "_pruned_structure" not in model.__dict__
