"""`register_attributes`: integers that no certificate can learn follow the axis that a user names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned, register_attributes
from lightning_prune.errors import ConfigError
from tests.compare import assert_same, outputs, scattered, zeroed_outputs


class Attention(nn.Module):
    """Keeps its sizes where nobody looks for them, as many heads as channels of a head."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.query, self.key, self.value = (nn.Linear(20, width) for _ in range(3))
        self.leave = nn.Linear(width, 20)
        self._shape = (heads, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], *self._shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.leave(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Linear(5, 20), attention, nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.attention(x))


def prepared(attention: nn.Module) -> tuple[nn.Module, ChannelMutator, Tensor]:
    model, x = Net(attention).double(), torch.randn(2, 6, 5, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


def axes_of(mutator: ChannelMutator) -> set[tuple[str, int]]:
    return {(unit.axis, unit.num_channels) for unit in mutator.units}


def registered(*attributes: tuple[str, str], base: type[nn.Module] = Attention) -> Any:
    """Return a class of its own, so that what is registered for it holds for one test."""
    cls = type("Own", (base,), {})
    register_attributes(cls, dict(attributes))
    return cls


def test_what_nobody_registers_keeps_its_size() -> None:
    _, mutator, _ = prepared(Attention(4, 6))
    assert axes_of(mutator) == {("channels", 20)}


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 6), (5, 5)], ids=["two lengths", "one length"])
def test_a_registered_integer_follows_its_axis(heads: int, head_dim: int) -> None:
    cls = registered(("_shape.0", "query.weight.0:heads"), ("_shape.1", "value.weight.0:head_dim"))
    model, mutator, x = prepared(cls(heads, head_dim))
    # queries and keys, and values, have one head_dim each; one integer holds them both, so they are one unit
    assert axes_of(mutator) == {("channels", 20), ("heads", heads), ("head_dim", head_dim)}
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    small = export_pruned(model)
    assert small.attention._shape == tuple(
        next(u for u in mutator.units if u.axis == axis).activated_channels for axis in ("heads", "head_dim")
    )


class Configured(Attention):
    """Keeps them in a dict that is its own affair."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self._config = {"heads": heads, "head_dim": head_dim}

    @property
    def _shape(self) -> tuple[int, int]:
        return self._config["heads"], self._config["head_dim"]

    @_shape.setter
    def _shape(self, shape: tuple[int, int]) -> None:
        """The dict has it."""


def test_a_registered_integer_may_be_in_a_dict_or_config() -> None:
    names = (("_config.heads", "query.weight.0:heads"), ("_config.head_dim", "query.weight.0:head_dim"))
    model, mutator, x = prepared(registered(*names, base=Configured)(4, 6))
    assert axes_of(mutator) == {("channels", 20), ("heads", 4), ("head_dim", 6)}
    mutator.set_choices({"*heads": 0.5})
    assert export_pruned(model).attention._config == {"heads": 2, "head_dim": 6}
    assert model.attention.__dict__["_config"] == {"heads": 4, "head_dim": 6}
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


def test_the_factor_of_the_length_is_meant_where_only_one_has_it() -> None:
    _, mutator, _ = prepared(registered(("_shape.0", "query.weight.0"))(4, 6))
    assert axes_of(mutator) == {("channels", 20), ("heads", 4)}


class Flat(nn.Module):
    """Writes the width of its hidden channels out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self._width = nn.Linear(20, 32), nn.Linear(32, 20), 32

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu().view(*x.shape[:-1], self._width))


def test_a_whole_axis_is_registered_for_subclasses_too() -> None:
    assert axes_of(prepared(Flat())[1]) == {("channels", 20)}
    cls = registered(("_width", "enter.weight.0"), base=Flat)
    assert axes_of(prepared(type("Sub", (cls,), {})())[1]) == {("channels", 20), ("channels", 32)}


def test_a_wrong_entry_does_no_harm() -> None:
    model, mutator, x = prepared(registered(("_shape.1", "leave.weight.0"))(4, 20))
    assert ("heads", 4) not in axes_of(mutator)
    for unit in mutator.units:  # what the entry claims to be one is one
        assert unit.axis != "head_dim" or "attention.leave" in {c.name for c in unit.output_related}
    mutator.apply(scattered(mutator.units))
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


@pytest.mark.parametrize(
    ("cls", "attributes", "message"),
    [
        (int, {"a": "weight.0"}, "expected a class of nn.Module"),
        (Attention, {}, "expected attribute -> axis"),
        (Attention, {"a b": "weight.0"}, "expected a name"),
        (Attention, {"heads": "weight"}, "expected 'tensor.dimension'"),
        (Attention, {"heads": 0}, "expected 'tensor.dimension'"),
        (Attention, {"heads": "weight.0:rows"}, "expected 'tensor.dimension'"),
    ],
    ids=["no module", "nothing", "no name", "no dimension", "no text", "no factor"],
)
def test_arguments_that_do_not_fit_are_refused(cls: Any, attributes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_attributes(cls, attributes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (("heads", "query.weight.0"), "attention: Got attribute 'heads' registered, but the module holds no such int"),
        (("_shape.2", "query.weight.0"), r"attention: Got attribute '_shape\.2' registered, but"),
        (("_shape.0", "quary.weight.0"), "Did you mean 'query.weight'"),
        (("_shape.0", "query.weight.2"), "of a tensor of 2 dimensions"),
        (("_shape.0", "leave.weight.0"), "_shape=5 registered for 'leave.weight.0', which has 20 channels and no"),
        (("_shape.0", "query.weight.0"), "several factors of 5"),
    ],
    ids=["no attribute", "no element", "no tensor", "no axis", "another length", "two factors"],
)
def test_an_entry_that_does_not_fit_a_module_is_an_error(attributes: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(registered(attributes)(5, 5))
