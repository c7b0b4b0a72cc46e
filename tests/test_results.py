"""Results that are made from memory are those that the op would return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.call import bind_arguments, tensors_in
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.results import Results

REMEMBERED: dict[str, Callable[[Tensor], Any]] = {
    "pool": lambda x: F.max_pool2d(x, 2),
    "pool with indices": lambda x: torch.ops.aten.max_pool2d_with_indices(x, [2, 2]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "reduction": lambda x: x.mean((2, 3), keepdim=True),
    "comparison": lambda x: x > 0,
    "positions": lambda x: x[:, x.new_zeros(3, dtype=torch.int64)],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]).sum(0),
    "chunk": lambda x: x.chunk(2, 1),
    "not contiguous": lambda x: x.transpose(1, 2) * 2,
}
MADE_ANEW: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.mul_(2),
    "a view that is no move": lambda x: x.diagonal(),
    "its argument, though the schema does not say so": lambda x: x.type_as(x),
    "out": lambda x: torch.add(x, 1, out=x),
}
BY_FAKE_MODE: dict[str, Callable[[Tensor], Any]] = {
    **MADE_ANEW,
    "a device": lambda x: torch.empty_like(x, device="cpu"),
}


class Remembering(TorchDispatchMode):
    """Makes what it can from memory, and compares that with what the op returns."""

    def __init__(self, results: Results, makes: bool = False) -> None:
        super().__init__()
        self.results = results
        self.makes = makes
        self.recalled = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = bind_arguments(func, args, kwargs or {})
        key = self.results.key(func, func._schema.name, named)
        made = self.results.recall(key)
        if made is None and self.makes:
            made = self.results.make(key, func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if made is not None:
            self.recalled += 1
            assert type(made) is type(out)
            assert layouts(made) == layouts(out)
            assert not {id(t) for t in tensors_in(made)} & {id(t) for t in tensors_in(out)}
        self.results.keep(key, named, out)
        return out


def layouts(out: Any) -> list[Any]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors_in(out)]


def count_recalled(call: Callable[[Tensor], Any], *sizes: tuple[int, ...], makes: bool = False) -> list[int]:
    mode = FakeMode()
    watch = Remembering(Results(mode), makes)
    counts = []
    with torch.inference_mode(), mode:
        inputs = [torch.empty(size) for size in sizes]
        for x in inputs:
            before = watch.recalled
            with watch:
                call(x)
            counts.append(watch.recalled - before)
    return counts


@pytest.mark.parametrize("name", REMEMBERED)
def test_the_same_call_is_made_from_memory(name: str) -> None:
    first, again, other = count_recalled(REMEMBERED[name], (2, 4, 6, 8), (2, 4, 6, 8), (2, 6, 6, 8))
    assert first == 0
    assert again >= 1
    assert other < again


@pytest.mark.parametrize("name", MADE_ANEW)
def test_what_shares_memory_is_made_each_time(name: str) -> None:
    assert count_recalled(MADE_ANEW[name], (2, 2), (2, 2)) == [0, 0]


@pytest.mark.parametrize("name", [n for n in REMEMBERED if n != "expanded"])
def test_an_op_alone_makes_what_fake_mode_returns(name: str) -> None:
    assert count_recalled(REMEMBERED[name], (2, 4, 6, 8), makes=True)[0] >= 1


@pytest.mark.parametrize("name", BY_FAKE_MODE)
def test_fake_mode_is_asked_for_what_an_op_alone_cannot_tell(name: str) -> None:
    assert count_recalled(BY_FAKE_MODE[name], (2, 2), makes=True) == [0]


def test_what_a_mask_takes_depends_on_its_values() -> None:
    mode = FakeMode()
    op, results = torch.ops.aten.index.Tensor, Results(mode)
    with torch.inference_mode(), mode:
        x, kept = torch.empty(2, 2), torch.empty(2, dtype=torch.bool)
    assert results.key(op, "aten::index", {"self": x, "indices": [kept]}) is None
    assert results.key(op, "aten::index", {"self": x, "indices": [None, kept.long()]}) is not None


def test_a_convolution_is_made_where_its_groups_are_checked() -> None:
    results = Results(FakeMode())
    x, weight = (results.mode.make(torch.float32, torch.device("cpu"), size) for size in ((1, 9, 4, 4), (2, 3, 1, 1)))
    args = dict(
        zip(
            ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
            (x, weight, None, [1, 1], [0, 0], [1, 1], 3),
            strict=True,
        )
    )
    func = torch.ops.aten.conv2d.default
    key = results.key(func, "aten::conv2d", args)
    assert key is not None
    assert results.make(key, func, tuple(args.values()), {}) is None
