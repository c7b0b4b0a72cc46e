"""Small models put together from parts and a function, and one check of all that pruning them promises."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.export import export_pruned
from lightning_prune.graph.contents import tensors_within
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, full, scattered, zeroed_outputs

IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    """Runs a function of itself and its inputs; tensors that are no parameters become buffers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = (function,)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function[0](self, *args, **kwargs)


def conv(inputs: int, outputs: int, **arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **arguments)


def parts(**more: Any) -> dict[str, Any]:
    """Return stem (3 to 8), norm, body (8 to 12) and head (12 to 5), and what else is given."""
    return {"stem": conv(3, 8), "norm": nn.BatchNorm2d(8), "body": conv(8, 12), "head": conv(12, 5), **more}


def chain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.body(self.norm(self.stem(x)).relu()).relu())


CHAIN = {"stem_(0, 8)_out_2_in_2": 8, "body_(0, 12)_out_1_in_1": 12}


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model: nn.Module, inputs: Any, *, train: bool = False) -> list[Tensor]:
    """Return every output of one forward; whatever is random is so in the same way every time."""
    torch.manual_seed(0)
    random.seed(0)
    model.train(train)
    with torch.no_grad():
        return tensors_within(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs))


def check(model: nn.Module, inputs: Any, units: Mapping[str, int], seeds: int = 2) -> ChannelMutator:
    """Prepare, prune and export a model; assert its units, and that each step computes what it must.

    Returns:
        The mutator; the model is pruned.
    """
    run(model, inputs)  # hooks leave weights without a history behind, which can be copied
    plain = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    found = {unit.name: unit.num_channels for unit in mutator.units}
    assert found == dict(units), found
    assert list(model.state_dict()) == list(state)
    assert_same(model.state_dict().values(), state.values())
    for train in (False, True):
        assert_same(run(model, inputs, train=train), run(plain, inputs, train=train))
        assert_same(model.state_dict().values(), plain.state_dict().values())
    for seed in range(seeds):
        mutator.apply(scattered(mutator.units, seed))
        assert_pruned_alike(model, inputs)
    assert_zeroed_alike(mutator, inputs)
    return mutator


def assert_pruned_alike(model: nn.Module, inputs: Any) -> nn.Module:
    """Assert that the exported model computes what the masked one does, buffers included; return it."""
    for train in (False, True):
        small = export_pruned(model)
        assert not any(type(m).__module__.startswith("lightning_prune.") for m in small.modules())
        assert_same(run(small, inputs, train=train), run(model, inputs, train=train))
        assert_same(small.state_dict().values(), export_pruned(model).state_dict().values())
    return small


def assert_zeroed_alike(mutator: ChannelMutator, inputs: Any) -> None:
    """Assert that removing channels is setting them to zero, units that are renormalizing left whole."""
    if isinstance(inputs, Mapping) or not mutator.units:
        return
    plan = {**scattered(mutator.units).kept, **full([u for u in mutator.units if u.renormalizing]).kept}
    mutator.apply(KeepPlan(plan))
    for found, expected in zip(run(mutator.model, inputs), zeroed_outputs(mutator.model, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
