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


def words(text: str) -> list[str]:
    return text.split()


def aten(name: str, *given: Any) -> Callable[..., Any]:
    """Return a call of an op with its last arguments given."""
    return lambda *x: getattr(A, name)(*x, *given)


def in_place(name: str, *given: Any) -> Callable[..., Any]:
    return lambda x, *more: getattr(A, name)(x.clone(), *more, *given)


def constant(name: str) -> Callable[[Tensor], Tensor]:
    """Return a call that meets a constant as long as its input; of a random one, only that it is finite shows."""

    def call(x: Tensor) -> Tensor:
        value = (2.0,) if "full" in name else ()
        made = getattr(x if "new" in name else torch, name)([x.shape[1]], *value)
        return x + (made * 0).nan_to_num() if name in words("rand randn empty new_empty") else x * made

    return call


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
    detach logical_not zeros_like ones_like lift lift_fresh _to_copy
""")
IN_PLACE = words("""
    hardswish_ hardsigmoid_ hardtanh_ relu6_ celu_ gelu_ silu_ mish_ relu_ square_ nan_to_num_ zero_ detach_ eq_ gt_
""")
BINARY = words("divide multiply subtract true_divide floor_divide remainder fmod arctan2 ldexp type_as")
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
    "swapaxes": case(lambda x: A.swapaxes(x, 1, 2), (4, 5, 6)),
    "swapdims": case(lambda x: A.swapdims(x, 1, 2), (4, 5, 6)),
    "transpose_": case(in_place("transpose_", 1, 2), (4, 5, 6)),
    "swapaxes_": case(in_place("swapaxes_", 1, 2), (4, 5, 6)),
    "swapdims_": case(in_place("swapdims_", 1, 2), (4, 5, 6)),
    "t": case(A.t, (4, 6)),
    "t_": case(in_place("t_"), (4, 6)),
    "expand": case(lambda x: x.expand(3, -1, 5, -1), (4, 1, 6)),
    "expand_as": case(lambda x, y: x.expand_as(y) + y, (1, 6), (4, 6)),
    "broadcast_to": case(lambda x: A.broadcast_to(x, [3, 4, x.shape[1]]), (1, 6)),
    "repeat": case(lambda x: x.repeat(2, 1, 3), (4, 6)),
    "repeat_interleave": case(lambda x: x.repeat_interleave(2, 1), (4, 6)),
    "slice": case(lambda n, x: x[:, n.along(0, 1, 0, 2) : n.along(0, 1, 0, 7)], (4, 9), sized=True),
    "slice, from the end": case(lambda n, x: x[:, -n.along(0, 1, 4, 9) :], (4, 9), sized=True),
    "narrow": case(lambda n, x: A.narrow(x, 1, n.along(0, 1, 0, 2), n.along(0, 1, 2, 7)), (4, 9), sized=True),
    "select": case(lambda x: x[:, 2], (4, 5, 6), frozen="0.1"),
    "unbind": case(lambda x: x.unbind(1), (4, 5, 6), frozen="0.1"),
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
    "pixel_shuffle": case(lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 3), frozen="0.2 0.3"),
    "pixel_unshuffle": case(lambda x: F.pixel_unshuffle(x, 2), (2, 6, 4, 4), frozen="0.2 0.3"),
    "channel_shuffle": case(lambda x: F.channel_shuffle(x, 3), (2, 12, 3, 3)),
    "native_channel_shuffle": case(lambda x: A.native_channel_shuffle(x, 3), (2, 12, 3, 3)),
}

ROWS = torch.tensor([[0, 3, 8], [1, 1, 7]])
SIX, FIVE = torch.tensor([5, 0, 3]), torch.tensor([4, 1, 1])
OFFSETS = torch.tensor([0, 4])
CONSTANTS = words("zeros ones new_zeros new_ones full new_full rand randn empty new_empty")

INDEXING = {
    **{f"{name}, as long as its partner": case(constant(name), (4, 6)) for name in CONSTANTS},
    "_embedding_bag": case(lambda w: A._embedding_bag(w, ROWS.flatten(), OFFSETS)[0], (9, 6), frozen="0.0"),
    "_embedding_bag_forward_only": case(
        lambda w: A._embedding_bag_forward_only(w, ROWS.flatten(), OFFSETS)[0], (9, 6), frozen="0.0"
    ),
    "embedding": case(lambda w: F.embedding(ROWS, w), (9, 6), frozen="0.0"),
    "embedding_bag": case(lambda w: F.embedding_bag(ROWS, w), (9, 6), frozen="0.0"),
    "index": case(lambda x: x[:, SIX], (4, 6, 5), frozen="0.1"),
    "index, two apart": case(lambda x: x[FIVE % 4, :, FIVE], (4, 6, 5), frozen="0.0 0.2"),
    "index, two adjacent": case(lambda x: x[:, SIX[:, None], FIVE[:2]], (4, 6, 5), frozen="0.1 0.2"),
    "index by a mask": case(lambda x: x[:, torch.arange(6) > 2], (4, 6, 5), frozen="0.0 0.1 0.2"),
    "_unsafe_index": case(lambda x: A._unsafe_index(x, [None, SIX]), (4, 6, 5), frozen="0.1"),
    "index_select": case(lambda x: x.index_select(-1, SIX), (4, 6), frozen="0.1"),
    "gather": case(lambda x: x.gather(1, torch.zeros_like(x[:, :2]).long() + 1), (4, 6, 5), frozen="0.1"),
    "take_along_dim": case(
        lambda x: A.take_along_dim(x, torch.zeros_like(x[:, :2]).long() + 1, 1), (4, 6, 5), frozen="0.1"
    ),
    "scalar_tensor": case(lambda x: x * torch.scalar_tensor(2.0).double(), (4, 6)),
    "arange": case(lambda x: x + torch.arange(6), (4, 6), frozen="0.1"),
    "linspace": case(lambda x: x + torch.linspace(0, 1, 6), (4, 6), frozen="0.1"),
    "eye": case(lambda x: x + torch.eye(4, 6), (4, 6), frozen="0.0 0.1"),
}
