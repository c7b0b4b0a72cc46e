"""Results that are made from shapes alone are those that the op would return; what does not fit is left to the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.call import bind_arguments, tensors_in
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.shortcuts import shortcut

aten = torch.ops.aten
Op = Callable[..., Any]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return aten.scaled_dot_product_attention(q, k, v, mask, **options)


TAKEN: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "attention": (attend, [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3)]),
    "attention with a mask": (attend, [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3), (2, 1, 5, 7)]),
    "attention with a mask for all": (attend, [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3), (5, 7)]),
    "attention of one head": (attend, [(5, 6), (7, 6), (7, 3)]),
    "grouped queries": (lambda *t: attend(*t, enable_gqa=True), [(2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 3)]),
    "addmm": (aten.addmm, [(5,), (3, 4), (4, 5)]),
    "addmm of a matrix": (aten.addmm, [(3, 1), (3, 4), (4, 5)]),
    "bilinear": (lambda x: aten.upsample_bilinear2d.vec(x, [7, 9], False, None), [(2, 3, 4, 5)]),
    "nearest": (lambda x: aten.upsample_nearest1d.vec(x, [7], None), [(2, 3, 4)]),
    "roll": (lambda x: aten.roll(x, [1, -2], [1, 3]), [(2, 3, 4, 5)]),
    "mean": (lambda x: aten.mean(x, [2, -1]), [(2, 3, 4, 5)]),
    "mean that keeps axes": (lambda x: aten.mean(x, [1], True), [(2, 3, 4, 5)]),
    "pool": (lambda x: aten.adaptive_avg_pool2d(x, [1, 2]), [(2, 3, 4, 5)]),
    "pool of one image": (lambda x: aten.adaptive_avg_pool2d(x, [1, 1]), [(3, 4, 5)]),
    "chunk": (lambda x: aten.chunk(x, 3, -1), [(2, 8)]),
    "chunk of few": (lambda x: aten.chunk(x, 3, 1), [(2, 4)]),
    "split": (lambda x: aten.split(x, 3, 0), [(8, 2)]),
    "split by sizes": (lambda x: aten.split_with_sizes(x, [3, 0, 5], 1), [(2, 8)]),
    "alias": (aten.alias, [(2, 3)]),
    "contiguous": (aten.contiguous, [(2, 3)]),
    "the same dtype": (lambda x: aten.to(x, dtype=torch.float32, layout=torch.strided, device="cpu"), [(2, 3)]),
    "another dtype": (lambda x: aten.to(x, torch.float64), [(2, 3)]),
    "linear": (aten.linear, [(2, 3, 4), (5, 4), (5,)]),
    "matmul": (aten.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)]),
    "convolution": (lambda *t: aten.conv2d(*t, [2, 1], [1, 0], [1, 2], 2), [(2, 4, 9, 9), (6, 2, 3, 3), (6,)]),
    "batch norm": (lambda x, w: aten.batch_norm(x, w, w, w, w, True, 0.1, 1e-5, False), [(2, 3, 4), (3,)]),
    "sum of two": (aten.add, [(2, 1, 4), (3, 1)]),
    "view": (lambda x: aten.view(x, [-1, 6]), [(3, 4, 5, 6)]),
    "unbind": (lambda x: aten.unbind(x, 1), [(2, 3, 4)]),
    "slice": (lambda x: aten.slice(x, 1, -3, 100, 2), [(2, 5)]),
    "cat": (lambda *t: aten.cat(list(t), -1), [(2, 3), (2, 0), (2, 4)]),
}
LEFT: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "keys of another width": (attend, [(2, 4, 5, 6), (2, 4, 7, 5), (2, 4, 7, 3)]),
    "more keys than values": (attend, [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 8, 3)]),
    "fewer heads of keys": (attend, [(2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3)]),
    "groups that do not fit": (lambda *t: attend(*t, enable_gqa=True), [(2, 6, 5, 4), (2, 4, 5, 4), (2, 4, 5, 3)]),
    "a mask that does not fit": (attend, [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3), (2, 3, 5, 7)]),
    "two masks": (lambda *t: attend(*t, is_causal=True), [(5, 6), (5, 6), (5, 6), (5, 5)]),
    "a bias that does not fit": (aten.addmm, [(4,), (3, 4), (4, 5)]),
    "matrices that do not fit": (aten.addmm, [(5,), (3, 4), (3, 5)]),
    "an axis that is not there": (lambda x: aten.roll(x, [1], [2]), [(2, 3)]),
    "an axis twice": (lambda x: aten.mean(x, [1, -1]), [(2, 3)]),
    "sizes of another sum": (lambda x: aten.split_with_sizes(x, [3, 4], 1), [(2, 8)]),
    "sizes of another image": (lambda x: aten.upsample_bilinear2d.vec(x, [7, 9], False, None), [(3, 4, 5)]),
    "no chunk": (lambda x: aten.chunk(x, 0, 1), [(2, 8)]),
    "a weight that does not fit": (aten.linear, [(2, 4), (5, 3)]),
    "groups": (lambda *t: aten.conv2d(*t, None, [1, 1], [0, 0], [1, 1], 2), [(1, 4, 9, 9), (6, 3, 3, 3)]),
    "sizes that do not broadcast": (aten.add, [(2, 3), (2, 4)]),
    "a view of another size": (lambda x: aten.view(x, [4, -1]), [(2, 3)]),
}
OTHERS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "out": (lambda x, y: aten.mean(x, [1], out=y), [(2, 3), (2,)]),
    "a copy": (lambda x: aten.to(x, torch.float32, False, True), [(2, 3)]),
    "another format": (lambda x: x.contiguous(memory_format=torch.channels_last), [(2, 3, 4, 5)]),
    "a mean of another dtype": (lambda x: aten.mean(x, [1], dtype=torch.float64), [(2, 3)]),
}


class Watch(TorchDispatchMode):
    """Asks for the shortcut of every op."""

    def __init__(self, mode: FakeMode) -> None:
        super().__init__()
        self.mode = mode
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = bind_arguments(func, args, kwargs or {})
        made = shortcut(self.mode, func, func._schema.name, named)
        self.found.append(made)
        return func(*args, **(kwargs or {})) if made is None else made


def run(op: Op, shapes: list[tuple[int, ...]]) -> tuple[list[Any], Any]:
    """Return what was made of each op, and the result."""
    mode = FakeMode()
    watch = Watch(mode)
    with torch.inference_mode(), mode:
        inputs = [torch.empty(shape) for shape in shapes]
        with watch:
            out = op(*inputs)
    return watch.found, out


def specs(out: Any) -> list[Any]:
    return [(tuple(t.shape), t.dtype) for t in tensors_in(out)]


@pytest.mark.parametrize("name", TAKEN)
def test_a_shortcut_makes_what_the_op_returns(name: str) -> None:
    op, shapes = TAKEN[name]
    found, out = run(op, shapes)
    assert len(found) == 1
    assert found[0] is not None
    expected = op(*(torch.ones(shape) for shape in shapes))
    assert specs(out) == specs(expected)
    assert isinstance(out, Tensor) is isinstance(expected, Tensor)


@pytest.mark.parametrize("name", LEFT)
def test_an_error_is_left_to_the_op(name: str) -> None:
    op, shapes = LEFT[name]
    with pytest.raises((RuntimeError, IndexError)):
        op(*(torch.ones(shape) for shape in shapes))
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        run(op, shapes)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_special_is_left_to_the_op(name: str) -> None:
    found, _ = run(*OTHERS[name])
    assert found
    assert all(made is None for made in found)


def test_a_mask_of_another_dtype_is_left_to_the_op() -> None:
    mode = FakeMode()
    with torch.inference_mode(), mode:
        q = torch.empty(2, 4, 5, 6)
        mask = torch.empty(5, 5, dtype=torch.float64)
    args = bind_arguments(aten.scaled_dot_product_attention.default, (q, q, q), {"attn_mask": mask})
    op = aten.scaled_dot_product_attention.default
    assert shortcut(mode, op, op._schema.name, args) is None
    assert shortcut(mode, op, op._schema.name, {**args, "attn_mask": None}) is not None
