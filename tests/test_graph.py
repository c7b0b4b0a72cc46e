"""The channel graph: a trace that leaves no trace, what is frozen and why, costs by formula."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.graph import ChannelGraph, analyze, certify_kept
from lightning_prune.graph.call import Call
from tests.zoo import ZOO


def graph_of(name: str, **arguments: Any) -> ChannelGraph:
    return analyze(ZOO[name].make(), ZOO[name].inputs(), {}, **arguments)[0]


# The trace leaves no trace


class Lazy(nn.Module):
    """Draws random numbers, counts its calls, and caches what it makes, as attribute, in a dict and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)
        self.calls, self.bias, self.cache, self.log = 0, None, {}, []
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.conv(x)).mean((2, 3))
        if self.bias is None:
            self.bias = torch.ones(x.shape[1]).to(x)
            self.cache["bias"] = self.bias * 2
            self.log.append(self.bias)
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return self.linear(x + self.bias + self.cache["bias"] + 0 * noise)


def test_the_trace_leaves_the_model_and_the_process_as_they_were() -> None:
    model, fired, x = Lazy(), [], torch.randn(2, 3, 6, 6)
    model.conv.register_forward_hook(lambda *_: fired.append(1))
    model.conv.weight.requires_grad_(False)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    cache, log = model.cache, model.log
    values = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    flags = [module.training for module in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    hooks = [list(module._forward_hooks) for module in model.modules()]

    graph, trace = analyze(model, (x,), {})
    certify_kept(graph, trace, {graph.units[0].name: [0, 3]})

    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
        assert all(module.__dict__[key] is value for key, value in attributes[name].items()), name
    assert (model.calls, model.bias, model.cache, model.log) == (0, None, {}, [])
    assert model.cache is cache
    assert model.log is log
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == values[name][0]
        assert torch.equal(tensor, values[name][1]), name
    assert [module.training for module in model.modules()] == flags
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == grads
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.is_grad_enabled()
    assert {key for _, key in graph.caches} >= {"bias", "cache", "log"}
    assert type(model(x)) is Tensor


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cache = nn.Conv2d(3, 8, 3), {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["x"] = self.conv(x)
        return self.cache["x"] @ x


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    model = Failing()
    before = dict(model.conv._parameters)
    with pytest.raises(TraceError, match=r"RuntimeError: "):
        analyze(model, (torch.randn(2, 3, 6, 6),), {})
    assert model.cache == {}
    assert model.training
    assert model.conv._parameters == before


def test_an_output_without_a_tensor_is_an_error() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "nothing"

    with pytest.raises(TraceError, match="Got an output of type str without any tensor; forward must return some"):
        analyze(Silent(), (torch.randn(2, 3),), {})


def test_outputs_are_found_in_any_object() -> None:
    class Result:
        def __init__(self, maps: Any) -> None:
            self.maps = maps

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Result:
            x = self.one(x)
            return Result({"a": [self.two(x)], "b": self.three(x)})

    graph, _ = analyze(Model(), (torch.randn(2, 3, 4, 4),), {})
    assert [unit.name for unit in graph.units] == ["one_(0, 8)_out_1_in_2"]


def test_a_model_that_reads_values_is_traced_on_real_tensors() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(7, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * (2.0 if x.sum().item() > 0 else 1.0))

    graph, trace = analyze(Reads(), (torch.ones(2, 7),), {})
    assert not trace.sandbox.fake
    assert {unit.name: unit.num_channels for unit in graph.units} == {"one_(0, 12)_out_1_in_1": 12}


def test_a_constant_tensor_that_is_viewed_twice_needs_no_real_data() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(7, 12), nn.Linear(12, 5)
            self.order = torch.arange(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * self.order[None][:, None].to(x)[0])

    _, trace = analyze(Views(), (torch.ones(2, 7),), {})
    assert trace.sandbox.fake


def test_a_batch_of_one_is_doubled_for_statistics_of_the_batch() -> None:
    class Norm(nn.BatchNorm1d):
        """Not one of torch's own, so that train mode is traced too."""

    model = nn.Sequential(nn.Linear(7, 12), Norm(12), nn.Linear(12, 5))
    graph, trace = analyze(model, (torch.randn(1, 7),), {})
    assert set(trace.events) == {"eval", "train"}
    assert graph.notes == ()
    assert graph.cost.measure("macs", graph.cost.full) == 7 * 12 + 12 * 5


def test_a_model_that_fails_in_train_mode_says_so() -> None:
    class EvalOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(7, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise NotImplementedError("targets are needed")
            return self.two(self.one(x))

    graph, _ = analyze(EvalOnly(), (torch.randn(2, 7),), {})
    assert graph.notes == ("traced in eval mode only; in train mode: NotImplementedError: targets are needed",)
    assert len(graph.units) == 1


def test_a_model_that_makes_a_constant_on_the_meta_device_is_traced_on_fake_tensors() -> None:
    class Appends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(7, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            before = torch.tensor([], dtype=x.dtype, device=x.device)
            return self.two(torch.cat([before, self.one(x)], 0))

    with torch.device("meta"):
        model, x = Appends(), torch.randn(2, 7)
    graph, trace = analyze(model, (x,), {})
    assert trace.sandbox.fake
    assert [unit.num_channels for unit in graph.units] == [8]


# What is frozen, and why


def reasons(graph: ChannelGraph) -> dict[tuple[str, int], tuple[int, str]]:
    return {(f.tensor, f.dim): (f.size, f.reason) for f in graph.frozen}


def test_frozen_axes_say_why_in_words() -> None:
    found = reasons(graph_of("unknown_op"))
    assert found["head.linear.weight", 0] == (5, "model output")
    size, reason = found["two.conv.weight", 0]
    assert size == 12
    assert reason.startswith("no rule for lightning_prune_zoo::position_scale in ")
    assert "zoo_attention.py" in reason
    assert reasons(graph_of("unused_branch"))["unused.conv.weight", 0] == (14, "no traced op reads it")
    size, reason = reasons(graph_of("slice_literal"))["stem.conv.weight", 0]
    assert (size, reason) == (6, "a slice by constant numbers in SliceLiteral")


class SplitAttention(nn.Module):
    """Two groups that a softmax weighs against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.split(self.stem(x))
        x = x.reshape(len(x), 2, x.shape[1] // 2, *x.shape[2:])
        return self.out((x * x.softmax(1)).sum(1))


def test_a_frozen_factor_of_an_axis_says_why() -> None:
    graph, _ = analyze(SplitAttention(), (torch.randn(2, 3, 5, 5),), {})
    assert [(unit.axis, unit.num_channels) for unit in graph.units] == [("channels", 4), ("channels", 6)]
    size, reason = reasons(graph)["split.weight", 0]
    assert size == 12
    assert reason.startswith("its 2 groups: softmax over channels in `softmax` of SplitAttention")
    assert ("split.weight", 1) not in reasons(graph)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        pytest.param((), ["stem", "one"], id="nothing"),
        pytest.param(("one.*",), ["stem"], id="children"),
        pytest.param(("one",), ["stem"], id="module"),
        pytest.param(("*.conv.weight",), [], id="parameters"),
        pytest.param(("two.norm.bias",), ["one"], id="a norm of the residual stream"),
        pytest.param(("head*",), ["stem", "one"], id="only what it makes is kept"),
        pytest.param(("nothing",), ["stem", "one"], id="no match"),
    ],
)
def test_an_ignored_layer_keeps_its_outputs(patterns: tuple[str, ...], left: list[str]) -> None:
    graph = graph_of("residual", ignore=patterns)
    assert [unit.name.split(".")[0] for unit in graph.units] == left
    if patterns == ("one",):
        assert reasons(graph)["one.conv.weight", 0] == (12, "ignore='one'")
        assert ("one.conv.weight", 1) not in reasons(graph)


def test_strict_raises_where_something_would_freeze() -> None:
    with pytest.raises(TraceError, match=r"strict=True.*no rule for lightning_prune_zoo::position_scale.*Pass rules="):
        graph_of("unknown_op", strict=True)
    with pytest.raises(TraceError, match=r"strict=True.*where the dense model takes \('other', 8\)"):
        analyze(Divided(), (torch.randn(2, 3, 4, 4),), {}, strict=True)
    assert graph_of("residual", strict=True).units


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x / x.shape[1])


def scale_each(call: Call) -> None:
    call.put(call.out, call.axes(call["x"]))


def test_a_rule_of_the_user_goes_before_ours() -> None:
    graph = graph_of("unknown_op", rules={"lightning_prune_zoo::position_scale": scale_each})
    assert graph.unknown == {}
    assert "two.conv_(0, 12)_out_2_in_2" in [unit.name for unit in graph.units]


def test_certifying_a_wrong_structure_says_where() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    graph, trace = analyze(model, (torch.randn(2, 3, 8, 8),), {})
    certify_kept(graph, trace, {"0_(0, 8)_out_1_in_1": [1, 2, 5]})
    model[0].register_forward_hook(lambda module, args, out: out.roll(1, 1))
    with pytest.raises(TraceError, match=r"does not run the dense program: `aten::roll` runs where .* `aten::"):
        certify_kept(graph, trace, {"0_(0, 8)_out_1_in_1": [1, 2, 5]})


# Units


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param("attention", ["channels", "heads", "head_dim"], id="attention"),
        pytest.param("grouped", ["groups", "channels", "channels"], id="grouped"),
        pytest.param("residual", ["channels", "channels"], id="residual"),
    ],
)
def test_a_unit_knows_its_axis(name: str, axes: list[str]) -> None:
    graph = graph_of(name)
    assert sorted(unit.axis for unit in graph.units) == sorted(axes)
    for unit in graph.units:
        suffix = "" if unit.axis == "channels" else f"_{unit.axis}"
        assert unit.name.endswith(suffix)


def test_units_that_look_alike_are_of_one_kind() -> None:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6), nn.Softmax(1))

    graph, _ = analyze(nn.Sequential(block(10), block(10), block(11)), (torch.randn(2, 6),), {})
    kinds = {unit.name: unit.kind for unit in graph.units}
    assert list(kinds) == ["0.0_(0, 10)_out_1_in_1", "1.0_(0, 10)_out_1_in_1", "2.0_(0, 11)_out_1_in_1"]
    first, second, third = kinds.values()
    assert first == second != third


def test_what_a_unit_says_of_its_channels() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(7, 12), nn.Linear(7, 12), nn.Linear(7, 10)
            self.norm, self.out = nn.LayerNorm(10), nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))))

    graph, _ = analyze(Normed(), (torch.randn(2, 9, 7),), {})
    assert [(u.num_channels, u.rescaling, u.renormalizing) for u in graph.units] == [
        (12, True, False),
        (10, False, True),
    ]
