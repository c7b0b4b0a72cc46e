"""Models that have run before: what they cached is left out of the trace, what they keep is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.checkpoint import load_pruned, save_pruned
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from tests.compare import outputs, scattered, zeroed_outputs

HEADS, TOKENS = 4, 6


class Attention(nn.Module):
    """Adds a bias for each head and distance, which subclasses look up."""

    held: Any

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.held = HEADS, self.nothing()
        self.qkv, self.leave = nn.Linear(10, 3 * HEADS * 5), nn.Linear(HEADS * 5, 3)
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS))
        places = torch.arange(TOKENS)
        self.register_buffer("distances", (places[:, None] - places).abs())

    def nothing(self) -> Any:
        return {}

    def made(self) -> Tensor:
        return self.table[:, self.distances]

    def bias(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.leave(((q @ k.mT + self.bias()).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class InDict(Attention):
    def bias(self) -> Tensor:
        if "cpu" not in self.held:
            self.held["cpu"] = self.made()
        bias: Tensor = self.held["cpu"]
        return bias


class InAttribute(Attention):
    def nothing(self) -> Any:
        return None

    def bias(self) -> Tensor:
        if self.held is None:
            self.held = self.made()
        bias: Tensor = self.held
        return bias


class InList(Attention):
    def nothing(self) -> Any:
        return []

    def bias(self) -> Tensor:
        if not self.held:
            self.held += [(self.made(),)]
        bias: Tensor = self.held[0][0]
        return bias


class InNew(Attention):
    """The attribute is there from the first forward on."""

    def __init__(self) -> None:
        super().__init__()
        del self.held

    def bias(self) -> Tensor:
        if not hasattr(self, "held"):
            self.held = self.made()
        bias: Tensor = self.held
        return bias


class State(Attention):
    """Goes on from what the last forward left."""

    def bias(self) -> Tensor:
        bias = self.made() + self.held.get("last", torch.zeros(1)).mean()
        self.held["last"] = bias
        return bias


class Constant(Attention):
    """Nothing fills it again."""

    def nothing(self) -> Any:
        return {"bias": torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64)}

    def bias(self) -> Tensor:
        bias: Tensor = self.held["bias"]
        return bias + 0 * self.made()


def prepared(cls: Callable[[], nn.Module], change: Callable[[nn.Module], object] = lambda _: None) -> Any:
    torch.manual_seed(0)
    model, x = cls().double().eval(), torch.randn(2, TOKENS, 10, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        change(model)
        expected = model(x)
    held = model.held.copy() if isinstance(model.held, (dict, list)) else model.held
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x, expected, held


@pytest.mark.parametrize("cls", [InDict, InAttribute, InList])
def test_what_a_model_has_cached_hides_no_weight(cls: Callable[[], nn.Module]) -> None:
    model, mutator, x, expected, held = prepared(cls)
    assert "heads" in {unit.axis for unit in mutator.units}
    torch.testing.assert_close(model.held, held, rtol=0, atol=0)
    assert torch.equal(model(x), expected)
    mutator.apply(scattered(mutator.units))
    expected = zeroed_outputs(model, (x,))  # before the small tensors are cached
    torch.testing.assert_close(outputs(model, (x,)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs(export_pruned(model), (x,)), outputs(model, (x,)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        pytest.param(State, lambda _: None, id="state"),
        pytest.param(Constant, lambda _: None, id="constant"),
        pytest.param(InDict, lambda model: model.held["cpu"].mul_(2), id="other values"),
        pytest.param(InDict, lambda model: model.held.update(extra=torch.ones(3)), id="other entries"),
    ],
)
def test_what_a_forward_does_not_fill_with_the_same_stays(cls: Any, change: Callable[[nn.Module], object]) -> None:
    model, mutator, x, _, held = prepared(cls, change)
    if cls is not State:  # which is no constant: it starts anew with each structure
        assert "heads" not in {unit.axis for unit in mutator.units}
    torch.testing.assert_close(model.held, held, rtol=0, atol=0)
    mutator.apply(scattered(mutator.units))
    torch.testing.assert_close(outputs(export_pruned(model), (x,)), outputs(model, (x,)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [InDict, InAttribute, InNew])
@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "dynamic"])
def test_a_structure_empties_what_the_model_it_is_loaded_into_has_cached(
    cls: Callable[[], nn.Module], dynamic: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = cls().double().eval(), torch.randn(2, TOKENS, 10, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    mutator.apply(scattered(mutator.units))
    expected = outputs(model, (x,))
    save_pruned(export_pruned(model), tmp_path / "small.ckpt")
    other = cls().double().eval()
    if dynamic:
        ChannelMutator(example_input=x).prepare_from_supernet(other)
    outputs(other, (x,))
    assert outputs(other, (x,))[0].shape == expected[0].shape
    loaded = load_pruned(tmp_path / "small.ckpt", other)
    torch.testing.assert_close(outputs(loaded.eval(), (x,)), expected, rtol=0, atol=0)
