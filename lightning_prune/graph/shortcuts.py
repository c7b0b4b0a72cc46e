"""Results of the hottest ops from their shapes alone, on fake tensors: the op itself is not run.

Only plain cases are taken (contiguous, shapes that fit); anything else, and every error, is left to the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_prune.graph.call import axes_of
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.memory import may_be_part
from lightning_prune.graph.rules.recurrent import Weights, weights_of

__all__ = ["shortcut"]

_IN_PLACE = frozenset(
    f"aten::{n}_" for n in ("relu", "silu", "hardswish", "hardtanh", "hardsigmoid", "relu6", "dropout", "bernoulli")
)
_SAME_SHAPE = frozenset(
    f"aten::{n}"
    for n in (
        *("batch_norm", "layer_norm", "group_norm", "softmax", "sigmoid", "dropout"),
        *("relu", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "relu6"),
    )
)
_PAIRS = frozenset(f"aten::{n}" for n in ("add", "mul", "sub", "div", "add_", "mul_", "sub_", "div_"))
_CONVOLUTIONS = frozenset({"aten::conv1d", "aten::conv2d", "aten::conv3d"})
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_RECURRENT = {f"aten::{kind}": gates for kind, gates in _GATES.items()}
_CELLS = {f"aten::{kind}_cell": gates for kind, gates in _GATES.items()}
_CHANNELS_FIRST = frozenset({"aten::batch_norm", "aten::group_norm"})
_UPSAMPLED = frozenset(
    f"aten::{n}"
    for n in (
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    )
)


def shortcut(mode: FakeMode, func: Any, name: str, args: dict[str, Any]) -> Any:
    """Return what an op would return (a tensor or several), or None where it has to be run.

    Args:
        mode: The mode that fake tensors belong to.
        func: The ATen overload.
        name: Its schema name.
        args: Its arguments by schema name.
    """
    if name == "aten::cat":
        return _cat(mode, args["tensors"], args["dim"])
    x = args.get("input", args.get("self", args.get("query")))
    if name == "aten::detach_":  # not fake is a constant made on the meta device: fake mode lets none change itself
        return x
    if not isinstance(x, FakeTensor) or x.constant is not None or "out" in args:
        return None  # what is made of a constant is one
    if name in _RECURRENT:  # step by step they would be thousands of ops
        return _recurrent(mode, x, args, _RECURRENT[name])
    if name in _CELLS:
        return _cell(mode, x, args, _CELLS[name])
    return _plain(mode, func, name, x, args) if x.is_contiguous() else None


def _plain(mode: FakeMode, func: Any, name: str, x: Tensor, args: dict[str, Any]) -> Any:
    """Return what an op on a contiguous tensor would return, or None."""
    if name in _IN_PLACE:
        return x
    if name in _SAME_SHAPE and args.get("dtype") is None:
        fits = name not in _CHANNELS_FIRST and name != "aten::layer_norm"
        return mode.like(x, x.shape) if fits or _norm_fits(name, x, args) else None
    if name in _PAIRS and func._overloadname == "Tensor":
        shape = _broadcast(x, args["other"], name)
        if shape is None or (name.endswith("_") and shape != x.shape):
            return None
        return x if name.endswith("_") else mode.like(x, shape)
    special = _SPECIAL.get(name)
    # a view of a tensor that knows its version shares it; what is written to a view of a constant must be seen in it
    if special is None or (name in _MOVES and (not x.is_inference() or may_be_part(axes_of(x)))):
        return None
    return special(mode, x, args)


def _broadcast(x: Tensor, other: Any, name: str) -> Sequence[int] | None:
    """Return the shape that a tensor and a number, or a tensor of its dtype, have together."""
    if isinstance(other, (int, float)):
        is_counted = name == "aten::add_" and x.dtype == torch.int64 and type(other) is int  # as norms count batches
        return x.shape if x.dtype.is_floating_point or is_counted else None
    if not isinstance(other, FakeTensor) or other.dtype != x.dtype or not other.is_contiguous():
        return None
    if other.shape == x.shape:
        return x.shape
    rank = max(x.dim(), other.dim())
    one, two = ([1] * (rank - t.dim()) + list(t.shape) for t in (x, other))
    if any(a != b and 1 not in (a, b) for a, b in zip(one, two, strict=True)):
        return None
    return [b if a == 1 else a for a, b in zip(one, two, strict=True)]


def _norm_fits(name: str, x: Tensor, args: dict[str, Any]) -> bool:
    """Return whether weight, bias and statistics fit; and no statistics of a single value are asked for."""
    names = ("weight", "bias", "running_mean", "running_var")
    given = [args[n] for n in names if isinstance(args.get(n), Tensor)]
    if name == "aten::layer_norm":
        shape = tuple(args["normalized_shape"])
        return tuple(x.shape[-len(shape) :]) == shape and all(tuple(t.shape) == shape for t in given)
    if not all(t.shape == (x.shape[1],) for t in given):
        return False
    return (name == "aten::group_norm" and x.shape[1] % args["num_groups"] == 0) or name == "aten::batch_norm"


def _linear(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    w, b = args["weight"], args["bias"]
    fits = w.dim() == 2 and w.shape[1] == x.shape[-1] and w.dtype == x.dtype and (b is None or b.shape == w.shape[:1])
    return mode.like(x, (*x.shape[:-1], w.shape[0])) if fits else None


def _convolution(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    w, b, padding, groups = args["weight"], args["bias"], args["padding"], args["groups"]
    plain = not isinstance(padding, str) and x.dim() == w.dim() and w.dtype == x.dtype and 0 not in w.shape
    if (
        not plain
        or w.shape[1] * groups != x.shape[1]
        or w.shape[0] % groups
        or (b is not None and b.shape != w.shape[:1])
    ):
        return None
    space = []
    for k, (size, kernel) in enumerate(zip(x.shape[2:], w.shape[2:], strict=True)):
        pad, stride, dilation = (_at(args[n], k) for n in ("padding", "stride", "dilation"))
        space.append((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1)
    return mode.like(x, (x.shape[0], w.shape[0], *space)) if min(space) > 0 else None


def _at(values: Sequence[int], k: int) -> int:
    return values[k] if len(values) > 1 else values[0]


def _addmm(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    a, b = args["mat1"], args["mat2"]
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype == x.dtype
    shape = (a.shape[0], b.shape[1])
    return mode.like(x, shape) if fits and _fits_into(x, shape) else None


def _attention(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    k, v, mask = args["key"], args["value"], args["attn_mask"]
    shape, heads = tuple(x.shape), x.shape[-3] if args["enable_gqa"] and x.dim() > 2 else None
    if heads is not None and k.dim() == x.dim() and k.shape[-3] and not heads % k.shape[-3]:
        shape = (*shape[:-3], k.shape[-3], *shape[-2:])  # queries that share keys count as one
    fits = x.dim() > 1 and k.shape[:-1] == v.shape[:-1] and x.dtype == k.dtype == v.dtype
    if not fits or tuple(k.shape) != (*shape[:-2], k.shape[-2], shape[-1]):
        return None
    if mask is not None:
        plain = isinstance(mask, FakeTensor) and mask.dtype in (torch.bool, x.dtype) and not args["is_causal"]
        if not plain or not _fits_into(mask, (*x.shape[:-1], k.shape[-2])):
            return None
    return mode.like(x, (*x.shape[:-1], v.shape[-1]))


def _fits_into(x: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor broadcasts to a shape."""
    return x.dim() <= len(shape) and all(n in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False))


def _upsample(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    sizes = args.get("output_size")
    if "scale_factors" not in args or sizes is None or len(sizes) != x.dim() - 2 or min(sizes) < 1:
        return None
    return mode.like(x, (*x.shape[:2], *sizes)) if 0 not in x.shape else None


def _mean(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dims = args.get("dim")
    if not dims or args["dtype"] is not None or not x.dtype.is_floating_point:
        return None
    dims = {d % x.dim() for d in dims if -x.dim() <= d < x.dim()}
    if len(dims) != len(args["dim"]):
        return None
    sizes = [1 if d in dims else n for d, n in enumerate(x.shape) if d not in dims or args["keepdim"]]
    return mode.like(x, sizes)


def _adaptive_pool(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    sizes = args["output_size"]
    fits = len(sizes) < x.dim() <= len(sizes) + 2 and min(sizes) > 0 and 0 not in x.shape
    return mode.like(x, (*x.shape[: -len(sizes)], *sizes)) if fits and x.dtype.is_floating_point else None


def _roll(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dims = args["dims"]
    fits = len(dims) == len(args["shifts"]) > 0 and all(-x.dim() <= d < x.dim() for d in dims)
    return mode.like(x, x.shape) if fits else None


def _states(args: dict[str, Any]) -> list[Tensor]:
    return [args["hx"]] if isinstance(args["hx"], Tensor) else list(args["hx"])


def _recurrent(mode: FakeMode, x: Tensor, args: dict[str, Any], gates: int) -> tuple[Tensor, ...] | None:
    states = _states(args)
    weights, directions = weights_of(args), 2 if args["bidirectional"] else 1
    width, hidden = states[0].shape[-1], states[-1].shape[-1]
    rows, outputs = gates * hidden, directions * width
    batch = x.shape[0 if args["batch_first"] else 1]
    fits = x.dim() == 3 and (weights[0].hr is not None) == (width != hidden)
    for k, layer in enumerate(weights):
        inputs = outputs if k >= directions else x.shape[2]
        hr = None if layer.hr is None else (width, hidden)
        expected = Weights((rows, inputs), (rows, width), ((rows,),) * len(layer.biases), hr)
        fits = fits and layer.map(lambda t: tuple(t.shape)) == expected
    fits = fits and all(tuple(s.shape) == (len(weights), batch, s.shape[-1]) for s in states)
    if not fits or any(s.dtype != x.dtype for s in states):  # those of weights may differ: autocast casts further down
        return None
    return tuple(mode.like(x, shape) for shape in ((*x.shape[:2], outputs), *(s.shape for s in states)))


def _cell(mode: FakeMode, x: Tensor, args: dict[str, Any], gates: int) -> Any:
    states = _states(args)
    hidden = states[0].shape[-1]
    rows, biases = gates * hidden, [b for b in (args["b_ih"], args["b_hh"]) if b is not None]
    weights = Weights(args["w_ih"], args["w_hh"], tuple(biases), None)
    expected = Weights((rows, x.shape[-1]), (rows, hidden), ((rows,),) * len(biases), None)
    fits = x.dim() == 2 and weights.map(lambda t: tuple(t.shape)) == expected
    if not fits or any(tuple(s.shape) != (len(x), hidden) or s.dtype != x.dtype for s in states):
        return None
    new = tuple(mode.like(x, s.shape) for s in states)
    return new[0] if isinstance(args["hx"], Tensor) else new


def _to(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    special = "other" in args or args["copy"] or args.get("pin_memory") or args["memory_format"] is not None
    if special or args.get("layout") not in (None, torch.strided) or args.get("device") not in (None, x.device):
        return None
    dtype = args.get("dtype") or x.dtype
    return x if dtype == x.dtype else mode.make(dtype, x.device, x.shape)


def _contiguous(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    return x if args["memory_format"] in (0, torch.contiguous_format) else None  # 0: what the schema says by default


# Ops that move data: the result counts as contiguous. Whether a view of it is legal is a matter of strides, which
# removing channels does not change.


def _view(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    shape = list(args.get("size", args.get("shape", (0,))))  # an overload takes a dtype
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or (-1 in shape and (not known or x.numel() % known)) or 0 in shape:
        return None
    shape = [x.numel() // known if n == -1 else n for n in shape]
    return mode.like(x, shape) if math.prod(shape) == x.numel() and min(shape, default=1) > 0 else None


def _flatten(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    first, last = args["start_dim"] % max(x.dim(), 1), args["end_dim"] % max(x.dim(), 1)
    if not x.dim() or first > last:
        return None
    return mode.like(x, (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]))


def _unflatten(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dim, sizes = args["dim"] % max(x.dim(), 1), list(args["sizes"])
    known = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) > 1 or known <= 0 or (-1 in sizes and x.shape[dim] % known):
        return None
    sizes = [x.shape[dim] // known if n == -1 else n for n in sizes]
    fits = math.prod(sizes) == x.shape[dim]
    return mode.like(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :])) if fits else None


def _permute(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dims = [d % x.dim() for d in args["dims"]] if x.dim() else []
    return mode.like(x, [x.shape[d] for d in dims]) if sorted(dims) == list(range(x.dim())) else None


def _transpose(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    if x.dim() < 2 or not (-x.dim() <= args["dim0"] < x.dim() and -x.dim() <= args["dim1"] < x.dim()):
        return None
    shape = list(x.shape)
    i, j = args["dim0"], args["dim1"]
    shape[i], shape[j] = shape[j], shape[i]
    return mode.like(x, shape)


def _unsqueeze(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dim = args["dim"] % (x.dim() + 1)
    return mode.like(x, (*x.shape[:dim], 1, *x.shape[dim:]))


def _select(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dim = args["dim"] % max(x.dim(), 1)
    if not x.dim() or not -x.shape[dim] <= args["index"] < x.shape[dim]:
        return None
    return mode.like(x, (*x.shape[:dim], *x.shape[dim + 1 :]))


def _slice(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    dim = args["dim"] % max(x.dim(), 1)
    if not x.dim():
        return None
    count = len(range(x.shape[dim])[args["start"] : args["end"] : args["step"]])
    return mode.like(x, (*x.shape[:dim], count, *x.shape[dim + 1 :]))


def _unbind(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> list[Tensor] | None:
    dim = args["dim"] % max(x.dim(), 1)
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    return [mode.like(x, shape) for _ in range(x.shape[dim])] if x.dim() else None


def _split(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> list[Tensor] | None:
    dim = args["dim"] % max(x.dim(), 1)
    total = x.shape[dim] if x.dim() else 0
    given = args.get("split_sizes", args.get("split_size"))
    if given is None and args["chunks"] > 0:
        given = -(-total // args["chunks"])
    if isinstance(given, int) and given > 0:
        given = [min(given, total - start) for start in range(0, total, given)]
    if not isinstance(given, (list, tuple)) or not total or sum(given) != total or min(given) < 0:
        return None
    return [mode.like(x, (*x.shape[:dim], n, *x.shape[dim + 1 :])) for n in given]


def _cat(mode: FakeMode, tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    tensors = [t for t in tensors if t.shape != (0,)] or tensors  # torch leaves these out, as an empty cache is one
    first = tensors[0]
    dim %= max(first.dim(), 1)
    others = [(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors]
    plain = all(isinstance(t, FakeTensor) and t.dtype == first.dtype and t.is_contiguous() for t in tensors)
    if not plain or not first.dim() or any(shape != others[0] for shape in others):
        return None
    return mode.like(first, (*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]))


def _matmul(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    y = args["other"] if "other" in args else args["mat2"]
    fits = x.dim() == y.dim() >= 2 and x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-2]
    return mode.like(x, (*x.shape[:-1], y.shape[-1])) if fits and x.dtype == y.dtype else None


def _grouped_matmul(mode: FakeMode, x: Tensor, args: dict[str, Any]) -> Tensor | None:
    """Fake mode knows this op for one dtype alone."""
    y, bounds = args["mat2"], args["offs"]
    fits = (x.dim(), y.dim()) == (2, 3) and x.shape[1] == y.shape[1] and x.dtype == y.dtype and args["bias"] is None
    return mode.like(x, (x.shape[0], y.shape[2])) if fits and bounds is not None and len(bounds) == len(y) else None


_MOVES: dict[str, Callable[[FakeMode, Tensor, dict[str, Any]], Any]] = {
    **dict.fromkeys(("aten::view", "aten::reshape", "aten::_unsafe_view"), _view),
    "aten::flatten": _flatten,
    "aten::unflatten": _unflatten,
    "aten::permute": _permute,
    "aten::transpose": _transpose,
    "aten::unsqueeze": _unsqueeze,
    "aten::select": _select,
    "aten::slice": _slice,
    "aten::unbind": _unbind,
    **dict.fromkeys(("aten::chunk", "aten::split", "aten::split_with_sizes"), _split),
    "aten::alias": lambda mode, x, _: mode.like(x, x.shape),
}
_SPECIAL = {
    **_MOVES,
    "aten::linear": _linear,
    "aten::to": _to,
    "aten::contiguous": _contiguous,
    "aten::_grouped_mm": _grouped_matmul,
    "aten::addmm": _addmm,
    "aten::scaled_dot_product_attention": _attention,
    "aten::roll": _roll,
    "aten::mean": _mean,
    **dict.fromkeys((f"aten::adaptive_avg_pool{n}d" for n in (1, 2, 3)), _adaptive_pool),
    **dict.fromkeys(_UPSAMPLED, _upsample),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(("aten::matmul", "aten::bmm", "aten::mm"), _matmul),
}
