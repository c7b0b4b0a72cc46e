"""Models that `torch.compile` wraps, as a whole, in part and in place: they are pruned as what they wrap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune.callback.shapes import forget_compiled
from lightning_prune.checkpoint import KEY, load_pruned, structure_of
from lightning_prune.compact import compact_
from lightning_prune.errors import CheckpointError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops
from tests.compare import assert_same, scattered
from tests.lit import LitNet
from tests.partial import CHAIN, Net, chain, conv, image, parts, run


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """Runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.counter = CompileCounter()

    def __call__(self, module: Any) -> Any:
        return torch.compile(module, backend=self.counter)


def uncompiled(model: nn.Module, *, train: bool = False) -> list[Tensor]:
    with torch.compiler.set_stance("force_eager"):
        return run(model, (image(),), train=train)


def plain(**given: Any) -> nn.Module:
    torch.manual_seed(3)
    return Net(chain, **parts(**given)).double()


def whole(backend: Backend) -> nn.Module:
    return backend(plain())


def part(backend: Backend) -> nn.Module:
    model = plain()
    model.body = backend(model.body)
    return model


def in_place(backend: Backend) -> nn.Module:
    model = plain()
    model.compile(backend=backend.counter)
    return model


def function(backend: Backend) -> nn.Module:
    gate = backend(lambda y: y * y.sigmoid())

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(gate(net.body(net.norm(net.stem(x)))))

    torch.manual_seed(3)
    return Net(forward, **parts()).double()


WAYS: dict[str, tuple[Callable[..., nn.Module], Callable[[str], str]]] = {
    "whole": (whole, lambda name: f"_orig_mod.{name}"),
    "part": (part, lambda name: name.replace("body_", "body._orig_mod_")),
    "in place": (in_place, str),
    "function": (function, str),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


@EVERY_WAY
def test_a_compiled_model_goes_on_through_conversion_choices_export_and_compaction(way: str) -> None:
    backend = Backend()
    model = WAYS[way][0](backend)
    before, types = run(model, (image(),)), [type(m) for m in model.modules() if isinstance(m, OptimizedModule)]
    compiled = backend.counter.frame_count
    assert compiled
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    assert backend.counter.frame_count == compiled, "the trace runs the original"
    assert {u.name: u.num_channels for u in mutator.units} == {WAYS[way][1](n): size for n, size in CHAIN.items()}
    assert_same(run(model, (image(),)), before)
    for seed, train in enumerate((False, True)):
        mutator.apply(scattered(mutator.units, seed))
        small = export_pruned(model)
        assert_same(run(model, (image(),), train=train), uncompiled(small, train=train))
        assert_same(small.state_dict().values(), export_pruned(model).state_dict().values())
    assert backend.counter.frame_count > compiled
    assert [type(m) for m in small.modules() if isinstance(m, OptimizedModule)] == types
    expected = uncompiled(export_pruned(model))
    compact_(model)
    assert not dynamic_ops(model)
    assert_same(run(model, (image(),)), expected)


def test_an_exported_compiled_model_has_weights_of_its_own() -> None:
    model = whole(Backend())
    ChannelMutator(example_input=image()).prepare_from_supernet(model)
    small = export_pruned(model)
    expected = run(model, (image(),))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert not any(t.any() for t in run(small, (image(),)))
    assert_same(run(model, (image(),)), expected)


@pytest.mark.parametrize("train", [pytest.param(False, id="eval"), pytest.param(True, id="train")])
def test_new_choices_do_not_break_the_graph(train: bool) -> None:
    model = torch.compile(plain(), backend="eager", fullgraph=True)
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    for seed in range(2):
        mutator.apply(scattered(mutator.units, seed))
        small = export_pruned(model)
        assert_same(run(model, (image(),), train=train), uncompiled(small, train=train))


def test_gradients_are_those_of_the_model_that_is_not_compiled() -> None:
    models = [whole(Backend()), plain()]
    for model in models:
        mutator = ChannelMutator(example_input=image())
        mutator.prepare_from_supernet(model)
        mutator.apply(scattered(mutator.units))
        model.train()(image()).square().mean().backward()
    assert_same(*[[p.grad for p in model.parameters()] for model in models])


@EVERY_WAY
def test_structure_and_checkpoints_carry_its_names(way: str, tmp_path: Path) -> None:
    model = WAYS[way][0](Backend())
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    mutator.apply(scattered(mutator.units))
    expected = uncompiled(model)
    for k, saved in enumerate((model, export_pruned(model))):
        torch.save({"state_dict": saved.state_dict(), KEY: structure_of(saved)}, tmp_path / f"{k}.ckpt")
        loaded = load_pruned(tmp_path / f"{k}.ckpt", WAYS[way][0](Backend()))
        assert_same(uncompiled(loaded), expected)
    other, twin = ChannelMutator.from_config(mutator.config_template(with_channels=True)), WAYS[way][0](Backend())
    other.prepare_from_supernet(twin)
    other.apply(mutator.current_plan())
    twin.load_state_dict(model.state_dict())
    assert_same(uncompiled(twin), expected)


def test_a_checkpoint_of_a_compiled_model_does_not_fit_one_that_is_not(tmp_path: Path) -> None:
    model = whole(Backend())
    torch.save({"state_dict": model.state_dict(), KEY: structure_of(model)}, tmp_path / "compiled.ckpt")
    with pytest.raises(CheckpointError, match="_orig_mod"):
        load_pruned(tmp_path / "compiled.ckpt", plain())


def test_made_weights_are_compiled_too() -> None:
    model = torch.compile(plain(body=weight_norm(conv(8, 12))), backend="eager")
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    for seed in range(2):
        mutator.apply(scattered(mutator.units, seed))
        assert_same(run(model, (image(),)), uncompiled(export_pruned(model)))


@pytest.mark.parametrize("where", ["nowhere", "whole", "part"])
def test_the_callback_forgets_code_that_was_compiled_in_place(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    module = LitNet()
    if where != "nowhere":
        (module if where == "whole" else module.head).compile(backend="eager")
    forget_compiled(module)
    assert len(resets) == (where != "nowhere")
