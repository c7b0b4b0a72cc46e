"""Train mode is traced where it may run other ops than eval mode: where more than torch's own layers ask for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.graph.analyze import analyze
from lightning_prune.graph.modes import watched_mode
from lightning_prune.mutator import ChannelMutator


class Asks(nn.Module):
    """Asks for its mode by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Flagged(Asks):
    """Has a flag that is found before that of its base."""

    training = False


class Own(nn.BatchNorm1d):
    """A norm of somebody's own."""


class Splits(nn.Module):
    """Cuts its channels into fixed parts while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x.view(-1, 2, 4).flatten(1) if self.training else x)


def hooked() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    norm.register_forward_hook(lambda module, args, out: out.view(-1, 2, 4).flatten(1) if module.training else out)
    return norm


def patched() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    norm.forward = lambda x: x * 2 if norm.training else x  # type: ignore[method-assign]
    return norm


class Peeks(nn.Module):
    """Asks a layer of torch for its mode, and cuts channels into fixed parts if that is trained."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x.view(-1, 2, 4).flatten(1) if self.layer.training else x


def peeking_hook() -> nn.Module:
    block = nn.Sequential(nn.BatchNorm1d(8))
    block.register_forward_hook(lambda module, args, out: out * 2 if module[0].training else out)
    return block


def modes_of(*between: nn.Module) -> set[str]:
    model = nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 4))
    return set(analyze(model, (torch.randn(2, 6),), {})[1].events)


def test_layers_of_torch_run_the_same_program_in_both_modes() -> None:
    assert modes_of(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.LayerNorm(8)) == {"eval"}


@pytest.mark.parametrize(
    "make",
    [
        *(Asks, Flagged, lambda: Own(8), hooked, patched),
        *(lambda: Peeks(nn.BatchNorm1d(8)), lambda: Peeks(nn.Dropout(0.5)), peeking_hook),
    ],
    ids=["module", "flag", "subclass", "hook", "forward", "peeks at a norm", "peeks at a dropout", "hook of a parent"],
)
def test_train_mode_is_traced_where_others_ask_for_it(make: Callable[[], nn.Module]) -> None:
    assert modes_of(make()) == {"eval", "train"}


class DropPath(nn.Module):
    """Draws a factor for each example while it is trained, as timm does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), 1).bernoulli_(0.5) if self.training else x


@pytest.mark.parametrize(("between", "alike"), [(DropPath, True), (Splits, False)])
def test_what_is_drawn_for_each_example_makes_no_shape_of_channels(between: type[nn.Module], alike: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), between(), nn.Linear(6 if alike else 4, 4))
    trace = analyze(model, (torch.randn(2, 6),), {})[1]
    assert set(trace.events) == {"eval", "train"}
    assert trace.is_alike is alike


@pytest.mark.parametrize(
    "make", [Splits, lambda: nn.Sequential(nn.Linear(6, 8), Peeks(nn.BatchNorm1d(8)), nn.Linear(8, 4))]
)
def test_a_unit_that_fails_in_train_mode_alone_is_frozen(make: Callable[[], nn.Module]) -> None:
    mutator = ChannelMutator(example_input=torch.randn(2, 6))
    mutator.prepare_from_supernet(make())
    assert not mutator.units


def test_a_model_may_set_the_mode_of_its_parts() -> None:
    class Freezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.norm.eval()
            return self.two(self.norm(self.one(x)))

    model = Freezes().train()
    assert set(analyze(model, (torch.randn(2, 6),), {})[1].events) == {"eval"}
    assert model.norm.training


def test_nothing_is_left_of_watching() -> None:
    module = nn.Linear(2, 2)
    with watched_mode(module) as readers, watched_mode(module) as others:
        assert module.training
        assert readers == {(id(module), __name__): module}
        assert others is None
    assert "training" not in vars(nn.Module)
    assert module.training
