"""Calls that cover the rule table: what each op is given, and which axes of it may lose nothing.

`case(call, *inputs)`: an input is a shape (filled with random numbers) or a tensor. `frozen` and `pooled` name axes as
`input.axis`: a frozen one may lose no entry; a mean, variance or sum runs over a pooled one, so that its result depends
on how many entries are left. Every other axis of a floating input must be free to lose some. `sized`: the call asks how
much is left (its first argument). `literal`: it takes positions by number, and the certificate refuses it where that
no longer gives the same channels. `product`: products are summed, so that removing means zeroing.

Here are the ops that act on each entry, that move entries, and that look them up; `rule_cases_sums` and
`rule_cases_recurrent` have the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

A = torch.ops.aten


class Live:
    """Sizes that a call must follow; here those of the dense inputs."""

    def along(self, source: int, axis: int, start: int, stop: int) -> int:
        """Return how many of the entries in `[start, stop)` of an input's axis are left."""
        return stop - start

    def result(self, axis: int, dense: int) -> int:
        """Return how long an axis of the result is."""
        return dense


@dataclass(frozen=True)
class RuleCase:
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    frozen: frozenset[tuple[int, int]]
    pooled: frozenset[tuple[int, int]]
    sized: bool
    literal: bool
    product: bool

    def __call__(self, live: Live, *inputs: Tensor) -> Any:
        return self.call(live, *inputs) if self.sized else self.call(*inputs)


def case(
    call: Callable[..., Any],
    *inputs: Any,
    frozen: str = "",
    pooled: str = "",
    sized: bool = False,
    literal: bool = False,
    product: bool = False,
) -> RuleCase:
    generator = torch.Generator().manual_seed(0)
    tensors = (x if isinstance(x, Tensor) else torch.randn(x, generator=generator, dtype=torch.float64) for x in inputs)
    return RuleCase(call, tuple(tensors), axes(frozen), axes(pooled), sized, literal, product)


def axes(text: str) -> frozenset[tuple[int, int]]:
    return frozenset((int(a), int(b)) for a, b in (word.split(".") for word in text.split()))


def quiet(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of something deprecated that does not say so."""

    def silent(*inputs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*inputs)

    return silent


def words(text: str) -> list[str]:
    return text.split()


def aten(name: str, *given: Any) -> Callable[..., Any]:
    """Return a call of an op with its last arguments given."""
    return lambda *x: getattr(A, name)(*x, *given)


def in_place(name: str, *given: Any) -> Callable[..., Any]:
    return lambda x, *more: getattr(A, name)(x.clone(), *more, *given)


def parts(live: Live) -> list[int]:
    return [live.along(0, 1, 0, 2), live.along(0, 1, 2, 6), live.along(0, 1, 6, 9)]


# Random ops have parameters that leave nothing to chance.
GIVEN: dict[str, tuple[Any, ...]] = {
    "clamp": (-0.5, 0.5),
    "clip": (-0.5, 0.5),
    "full_like": (2.0,),
    "fill": (2.0,),
    "dropout": (0.0, True),
    "native_dropout": (0.0, True),
    "alpha_dropout": (0.0, True),
    "feature_dropout": (0.0, True),
    "feature_alpha_dropout": (0.0, True),
    "rrelu": (0.25, 0.25, True),
    "float_power": (2.0,),
    "to": (torch.float32,),
    "clamp_": (-0.5, 0.5),
    "clip_": (-0.5, 0.5),
    "fill_": (2.0,),
    "dropout_": (0.0, True),
    "rrelu_": (0.25, 0.25, True),
    "uniform_": (1.0, 1.0),
    "normal_": (1.0, 0.0),
    "random_": (0, 1),
    "bernoulli_": (1.0,),
    "requires_grad_": (False,),
}
UNARY = words("""
    hardswish hardsigmoid hardtanh relu6 selu celu gelu silu mish relu log_sigmoid log_sigmoid_forward softplus square
    nan_to_num isnan isinf isfinite absolute negative abs real positive resolve_conj resolve_neg contiguous clone alias
    detach logical_not zeros_like ones_like lift lift_fresh _to_copy _neg_view _lazy_clone zero
""")
IN_PLACE = words("""
    hardswish_ hardsigmoid_ hardtanh_ relu6_ celu_ gelu_ silu_ mish_ relu_ square_ nan_to_num_ zero_ detach_ eq_ gt_
""")
BINARY = words("divide multiply subtract true_divide floor_divide remainder fmod arctan2 ldexp rsub _add_relu")
COMPLEX = torch.complex(torch.arange(24.0).view(4, 6), torch.ones(4, 6)).to(torch.complex128)

POINTWISE = {
    **{name: case(aten(name), (4, 6, 5)) for name in UNARY},
    **{name: case(in_place(name, *([0.5] if name in ("eq_", "gt_") else [])), (4, 6, 5)) for name in IN_PLACE},
    **{n: case((in_place if n.endswith("_") else aten)(n, *given), (4, 6, 5)) for n, given in GIVEN.items()},
    **{name: case(aten(name), (4, 6, 5), (4, 6, 5)) for name in BINARY},
    "empty_like": case(lambda x: x + torch.isnan(torch.empty_like(x)) * 0, (4, 6)),
    "add, broadcast": case(torch.add, (4, 6, 5), (6, 1)),
    "mul, a row and a column": case(torch.mul, (6, 1), (5,)),
    "add_": case(lambda x, y: x.clone().add_(y), (4, 6), (6,)),
    "copy_": case(in_place("copy_"), (4, 6), (6,)),
    "copy": case(A.copy, (4, 6), (4, 6)),
    "where": case(lambda a, b, c: torch.where(a > 0, b, c), (4, 6), (6,), (4, 6)),
    "masked_fill": case(lambda a, b: A.masked_fill(a, b > 0, 7.0), (4, 6), (6,)),
    "masked_fill_": case(lambda a, b: A.masked_fill_(a.clone(), b > 0, 7.0), (4, 6), (6,)),
    "addcmul": case(A.addcmul, (4, 6), (6,), (4, 6)),
    "addcdiv": case(A.addcdiv, (4, 6), (6,), (4, 6)),
    "lerp": case(A.lerp, (4, 6), (4, 6), (6,)),
    "imag": case(aten("imag"), COMPLEX),
    "_conj": case(lambda x: A._conj(x) * 1, COMPLEX),
    "rrelu_with_noise": case(lambda x, n: A.rrelu_with_noise(x, n.clone(), 0.25, 0.25, False), (4, 6), (4, 6)),
    "bitwise_not": case(lambda x: A.bitwise_not(x > 0), (4, 6)),
    "max of two": case(torch.max, (4, 6), (6,)),
    "min of two": case(torch.min, (4, 6), (6,)),
    "bernoulli": case(lambda x: A.bernoulli((x > 0).double()), (4, 6)),
    "type_as": case(lambda x, y: x.type_as(y.float()), (6,), (3, 4, 5, 2)),
    "add, into a result": case(lambda x, y: torch.add(x, y, out=torch.empty_like(x)), (4, 6), (6,)),
    "mul, into a part of a result": case(
        lambda n, x, y: torch.mul(x[:, : n.along(0, 1, 0, 4)], y, out=torch.zeros_like(x)[:, : n.along(0, 1, 0, 4)]),
        (4, 6),
        (4,),
        sized=True,
    ),
    "add_, to a half": case(lambda x: x.clone().chunk(2, 1)[0].add_(x.chunk(2, 1)[1]), (4, 12), literal=True),
    "__irshift__": case(lambda x: A.__irshift__((x * 9).long(), 1), (4, 6)),
    "random": case(lambda x: A.random(x, 0, 1), (4, 6)),
    "uniform": case(lambda x: A.uniform(x, 1.0, 1.0), (4, 6)),
    "exponential": case(lambda x: A.exponential(x) >= 0, (4, 6)),
    "cauchy": case(lambda x: A.cauchy(x).isnan(), (4, 6)),
    "geometric": case(lambda x: A.geometric(x, 0.5) > 0, (4, 6)),
    "log_normal": case(lambda x: A.log_normal(x) > 0, (4, 6)),
    "_standard_gamma": case(lambda x: A._standard_gamma(x.abs() + 1) > 0, (4, 6)),
    "randint_like": case(lambda x: torch.randint_like(x, 1), (4, 6)),
    "rand_like": case(lambda x: torch.rand_like(x) >= 0, (4, 6)),
    "randn_like": case(lambda x: torch.randn_like(x).isnan(), (4, 6)),
    "exponential_": case(lambda x: A.exponential_(x.clone()) >= 0, (4, 6)),
    "prelu": case(F.prelu, (3, 6, 5), (6,)),
    "prelu, one slope": case(F.prelu, (3, 6, 5), (1,)),
    "_prelu_kernel": case(A._prelu_kernel, (3, 6, 5), (1, 6, 1)),
    "glu": case(lambda x: F.glu(x, 1), (3, 12, 5)),
    "tril": case(torch.tril, (3, 6, 6), frozen="0.1 0.2"),
    "triu": case(torch.triu, (3, 6, 6), frozen="0.1 0.2"),
    "tril_": case(in_place("tril_"), (3, 6, 6), frozen="0.1 0.2"),
    "triu_": case(in_place("triu_"), (3, 6, 6), frozen="0.1 0.2"),
}

MOVEMENT = {
    **{n: case(aten(n, 3 if "split" in n else 2, 1), (4, 6), literal=True) for n in words("split chunk tensor_split")},
    **{n: case(aten(n, 3 if "split" in n else 2, 1), (4, 6), literal=True) for n in words("unsafe_split unsafe_chunk")},
    "view, merge": case(lambda x: x.view(x.shape[0], -1, x.shape[3]), (4, 3, 5, 6)),
    "view, split": case(lambda n, x: x.view(-1, n.result(1, 3), n.result(2, 4)), (5, 12), sized=True),
    "reshape": case(lambda x: x.transpose(0, 1).reshape(-1), (4, 6)),
    "_unsafe_view": case(lambda x: A._unsafe_view(x, [-1]), (4, 6)),
    "_reshape_alias": case(lambda x: A._reshape_alias(x, [x.numel()], [1]), (4, 6)),
    "view_copy": case(lambda x: A.view_copy(x, [-1]), (4, 6)),
    "_reshape_copy": case(lambda x: A._reshape_copy(x, [-1]), (4, 6)),
    "flatten": case(lambda x: x.flatten(1, 2), (4, 3, 5, 6)),
    "unflatten": case(lambda n, x: x.unflatten(1, (n.result(1, 3), -1)), (5, 12), sized=True),
    "view_as": case(lambda x: x.view_as(x * 2), (5, 12)),
    "reshape_as": case(lambda x: x.reshape_as(x * 2), (5, 12)),
    "squeeze": case(lambda x: x.squeeze(1), (4, 1, 6)),
    "squeeze, all": case(torch.squeeze, (4, 1, 6, 1)),
    "squeeze_": case(in_place("squeeze_", 1), (4, 1, 6)),
    "unsqueeze": case(lambda x: x.unsqueeze(1), (4, 6)),
    "unsqueeze_": case(in_place("unsqueeze_", 1), (4, 6)),
    "permute": case(lambda x: x.permute(2, 0, -2), (4, 5, 6)),
    "transpose": case(lambda x: x.transpose(-1, 1), (4, 5, 6)),
    "swapaxes": case(lambda x: x.swapaxes(1, 2), (4, 5, 6)),
    "transpose_": case(in_place("transpose_", 1, 2), (4, 5, 6)),
    "swapaxes_": case(in_place("swapaxes_", 1, 2), (4, 5, 6)),
    "swapdims_": case(in_place("swapdims_", 1, 2), (4, 5, 6)),
    "t": case(A.t, (4, 6)),
    "t_": case(in_place("t_"), (4, 6)),
    "expand": case(lambda x: x.expand(3, -1, 5, -1), (4, 1, 6)),
    "expand_as": case(lambda x, y: x.expand_as(y) + y, (1, 6), (4, 6)),
    "broadcast_to": case(lambda x: A.broadcast_to(x, [3, 4, x.shape[1]]), (1, 6)),
    "repeat": case(lambda x: x.repeat(2, 1, 3), (4, 6)),
    "repeat, a constant as often as there are channels": case(
        lambda x: x * torch.ones(1, 1).repeat(1, x.shape[1]), (4, 6)
    ),
    "repeat_interleave": case(lambda x: A.repeat_interleave(x, 2, 1), (4, 6)),
    "repeat_interleave, of all": case(lambda x: A.repeat_interleave(x, 2), (4, 6)),
    "repeat_interleave, as data says": case(
        lambda x: A.repeat_interleave(x, torch.tensor([1, 0, 3, 1]), 0), (4, 6), frozen="0.0"
    ),
    "view, of another type": case(lambda x: x.view(torch.int64), (4, 6)),
    "view, of a smaller type": case(lambda x: x.view(torch.float32), (4, 6), frozen="0.1"),
    "as_strided, as it is": case(lambda x: x.as_strided(x.shape, x.stride()), (4, 6)),
    "as_strided": case(lambda x: x.as_strided((3, 2), (7, 1)), (4, 6), frozen="0.0 0.1"),
    "unfold": case(lambda x: x.unfold(1, 2, 2), (4, 6, 5), frozen="0.1"),
    "_stack": case(lambda *x: A._stack(x, 1), (4, 6), (4, 6)),
    "hstack": case(lambda *x: torch.hstack(x), (4, 3), (4, 5)),
    "dstack": case(lambda *x: torch.dstack(x), (4, 3), (4, 3)),
    "column_stack": case(lambda *x: torch.column_stack(x), (4, 3), (4,)),
    "tile": case(lambda x: x.tile(2, 3), (4, 6)),
    "movedim": case(lambda x: x.movedim(1, -1), (4, 5, 6)),
    "flipud": case(torch.flipud, (4, 6)),
    "tensor_split at indices": case(lambda x: x.tensor_split((4, 8), 1), (4, 12), literal=True),
    "squeeze, several": case(lambda x: x.squeeze((0, 2)), (1, 6, 1, 4)),
    "broadcast_tensors": case(lambda x, y: sum(torch.broadcast_tensors(x, y)), (4, 1, 6), (5, 6)),
    **{f"rot90, {k}": case(lambda x, k=k: torch.rot90(x, k, (1, 2)), (4, 5, 6)) for k in range(-1, 4)},
    "permute_copy": case(lambda x: A.permute_copy(x, [2, 0, 1]), (4, 5, 6)),
    "slice": case(lambda n, x: x[:, n.along(0, 1, 0, 2) : n.along(0, 1, 0, 7)], (4, 9), sized=True),
    "slice, from the end": case(lambda n, x: x[:, -n.along(0, 1, 4, 9) :], (4, 9), sized=True),
    "narrow": case(lambda n, x: A.narrow(x, 1, n.along(0, 1, 0, 2), n.along(0, 1, 2, 7)), (4, 9), sized=True),
    "select": case(lambda x: x[:, 2].neg(), (4, 5, 6), frozen="0.1"),
    "unbind": case(lambda x: [part.neg() for part in x.unbind(1)], (4, 5, 6), frozen="0.1"),
    "split_with_sizes": case(lambda n, x: x.split(parts(n), 1), (4, 9), sized=True),
    "unsafe_split_with_sizes": case(lambda n, x: A.unsafe_split_with_sizes(x, parts(n), 1), (4, 9), sized=True),
    "cat": case(lambda *x: torch.cat(x, 1), (4, 3), (4, 5), (4, 6)),
    "concat": case(lambda *x: A.concat(x, 1), (4, 3), (4, 5)),
    "concatenate": case(lambda *x: A.concatenate(x, -1), (4, 3), (4, 5)),
    "stack": case(lambda *x: torch.stack(x, 1), (4, 6), (4, 6)),
    "constant_pad_nd": case(lambda x: F.pad(x, (1, 2, 2, 0), value=0.5), (4, 6, 5)),
    "constant_pad_nd, cropped": case(lambda n, x: F.pad(x, (-n.along(0, 1, 0, 2), 1)), (4, 9), sized=True),
    "roll": case(lambda x: x.roll(1, 1), (4, 6), literal=True),
    "flip": case(lambda x: x.flip(1), (4, 9)),
}
