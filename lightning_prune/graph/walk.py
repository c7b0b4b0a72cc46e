"""See every op of a model once, on fake tensors: the walk that the dense trace and the certificate share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_prune.graph.call import axes_of, bind_arguments, tensors_in
from lightning_prune.graph.generators import drawing_alike
from lightning_prune.graph.numbers import number_of
from lightning_prune.graph.results import Results
from lightning_prune.graph.rules import RULES, RuleEntry
from lightning_prune.graph.rules.indexing import unknown
from lightning_prune.graph.rules.pointwise import pointwise
from lightning_prune.graph.shortcuts import shortcut

__all__ = ["ALIAS", "UNKNOWN", "Walk", "identity", "name_tensor"]

# identities that a layout may or may not need: no event, the result is the same value
_TRANSPARENT = frozenset(f"aten::{n}" for n in ("contiguous", "clone", "alias", "detach", "lift_fresh", "lift"))
ALIAS = "aten::alias"
_RESHAPES_SELF = frozenset(f"aten::{n}" for n in ("squeeze_", "unsqueeze_", "transpose_", "t_"))
_IDENTITY = "_lightning_prune_identity"
_LARGEST_CONSTANT = 1_000_000  # elements; larger ones are told apart by shape alone
# arguments of ops that are given functions, by name
_NAMED = {"flex_attention": ("query", "key", "value", "score_mod", "block_mask", "scale")}
_POINTWISE = RuleEntry(pointwise)
UNKNOWN = RuleEntry(unknown)


class Walk(TorchDispatchMode):
    """See every op once, composite ops without a rule taken apart; subclasses say what to do with it.

    Args:
        rules: Rules of the user, by schema name; they go before ours.
        results: What ops on fake tensors returned before, None when the run is on real ones.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled during a run, so that there is nothing to keep out of each op

    def __init__(self, rules: Mapping[str, RuleEntry], results: Results | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.rules = rules
        self.results = results
        self.stand_ins: Mapping[int, Tensor] = {}  # of the run: a parameter that is reached around keeps its name
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        name = func._schema.name
        if name.startswith(("prim::", "profiler::")):
            return func(*args, **kwargs)
        entry = self._entry(func, name)
        if entry is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            entry = UNKNOWN
        named = bind_arguments(func, args, kwargs)
        before = None
        if name in _RESHAPES_SELF:
            before = (tuple(args[0].shape), axes_of(args[0]))
        inputs = tuple(identity(self.stand_ins.get(id(t), t)) for t in tensors_in(named))
        try:
            out = self._result(func, name, named, args, kwargs)
        except Exception as error:  # kernels raise all kinds
            out = self.rescue(name, named, inputs, error)
        if name in _TRANSPARENT:
            if out is not args[0]:
                setattr(out, _IDENTITY, identity(self.stand_ins.get(id(args[0]), args[0])))
                return self.carry(name, args[0], out)
            return out
        return self._seen(name, entry, named, inputs, out, before)

    def _result(self, func: Any, name: str, named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """Run an op, or make what it would return."""
        if self.results is None:
            with drawing_alike(func, kwargs, self.count):
                return func(*args, **kwargs)
        out = shortcut(self.results.mode, func, name, named)
        if out is not None:
            return out
        key = self.results.key(func, name, named)
        out = self.results.recall(key)
        if out is None:
            out = self.results.make(key, func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
            self.results.keep(key, named, out)
        return out

    def _seen(
        self,
        name: str,
        entry: RuleEntry,
        args: Mapping[str, Any],
        inputs: tuple[Any, ...],
        out: Any,
        before: Any = None,
    ) -> Any:
        """Look at one op and name its results."""
        out = self.visit(name, entry, args, inputs, out, before)
        for k, tensor in enumerate(tensors_in(out)):
            setattr(tensor, _IDENTITY, (self.count, k))
        self.count += 1
        return out

    def _higher_order(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """See an op that is given functions as one op: what these do inside is not seen."""
        name = f"higher_order::{func.name()}"
        given = dict(zip(_NAMED.get(func.name(), ()), args, strict=False))
        named: dict[str, Any] = {k: v for k, v in given.items() if isinstance(v, (Tensor, int, float))}
        named["others"] = [t for t in tensors_in([args, kwargs]) if not any(t is v for v in named.values())]
        inputs = tuple(identity(self.stand_ins.get(id(t), t)) for t in tensors_in(named))
        out = func(*args, **kwargs)
        return self._seen(name, self.rules.get(name) or RULES.get(name) or UNKNOWN, named, inputs, out)

    def _entry(self, func: Any, name: str) -> RuleEntry | None:
        entry = self.rules.get(name) or RULES.get(name)
        if entry is not None:
            return entry
        if torch.Tag.pointwise in func.tags:
            return _POINTWISE
        if name.endswith("_copy"):  # of a view, as functional programs have them
            return RULES.get(name.removesuffix("_copy"))
        if name.startswith("aten::") and name.endswith("_") and not name.endswith("__"):
            same = getattr(torch.ops.aten, name[6:-1], None)  # the op that is not in place
            if name[:-1] not in RULES and same and torch.Tag.pointwise in getattr(same, same.overloads()[0]).tags:
                return _POINTWISE
            return RULES.get(name[:-1])
        return None

    def rescue(self, name: str, args: Mapping[str, Any], inputs: tuple[Any, ...], error: Exception) -> Any:
        """Return what an op that failed is to be taken for."""
        raise error

    def carry(self, name: str, source: Tensor, out: Tensor) -> Tensor:
        """Hand the knowledge about a tensor on to its copy; return the copy, or what it is to be taken for."""
        raise NotImplementedError(f"{type(self).__name__} must say how a copy is seen")

    def visit(
        self, name: str, entry: RuleEntry, args: Mapping[str, Any], inputs: tuple[Any, ...], out: Any, before: Any
    ) -> Any:
        """Look at one op; return its result."""
        raise NotImplementedError(f"{type(self).__name__} must say what to do with {name}")


def identity(tensor: Tensor) -> Any:
    """Return which value a tensor is: a parameter's name, `(op number, output number)`, or `("constant", values)`.

    Values are a float where the tensor has no axes, else a digest.

    The values of a constant count: `torch.tensor(self.head_dim)` is another one when the size changes.
    """
    known = getattr(tensor, _IDENTITY, None)
    if known is not None:
        return known
    unreadable = isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.is_quantized or tensor.is_nested
    unreadable = unreadable or tensor.layout != torch.strided
    if unreadable or tensor.numel() > _LARGEST_CONSTANT:
        return "constant", None
    number = number_of(tensor)
    if number is not None:
        return "constant", number
    with _disable_current_modes():
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return "constant", hash(values)


def name_tensor(tensor: Tensor, name: Any) -> None:
    """Give a stand-in the identity of the parameter, buffer or input it stands for."""
    setattr(tensor, _IDENTITY, name)
