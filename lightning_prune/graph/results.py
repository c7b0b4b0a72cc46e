"""Results of ops that were seen with such arguments before: made from what is known of them, the op is not run again.

A model repeats its blocks, and every certificate repeats the model: nearly all ops of a run were seen before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

from lightning_prune.graph.call import axes_of, tensors_in
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.memory import may_be_part, storage_of

__all__ = ["Results"]

# views whose results may count as tensors of their own; see `shortcuts`
_MOVES = frozenset(
    f"aten::{n}"
    for n in (
        *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "slice", "select", "t", "mT"),
        *("expand", "expand_as", "view", "view_as", "reshape", "reshape_as", "_unsafe_view", "flatten", "unflatten"),
        *("permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
    )
)
_UNSURE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _NoKeyError(Exception):
    """An argument that a key cannot hold."""


class Results:
    """Knows the sizes, strides and dtypes of what ops returned.

    Args:
        mode: The mode that fake tensors belong to.
    """

    def __init__(self, mode: FakeMode) -> None:
        self.mode = mode
        self._known: dict[Any, Any] = {}

    def key(self, func: Any, name: str, args: Mapping[str, Any]) -> Any:
        """Return what tells the results of a call apart; None where they have to be made each time.

        Args:
            func: The ATen overload.
            name: Its schema name.
            args: Its arguments by schema name.
        """
        is_move = name in _MOVES
        # the size of what is taken depends on values where a mask takes it, not where positions do
        takes = name == "aten::index" and all(t.dtype == torch.int64 for t in tensors_in(args["indices"]))
        if not (is_move or takes or _is_pure(func)):
            return None
        try:
            return func, tuple([_part(value, is_move) for value in args.values()])
        except _NoKeyError:
            return None

    def recall(self, key: Any) -> Any:
        """Return new results of a call that was seen before, None otherwise."""
        known = self._known.get(key) if key is not None else None
        if known is None:
            return None
        kind, specs = known
        made = [self.mode.make(*spec) for spec in specs]
        return made[0] if kind is None else kind(made)

    def make(self, key: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return results that the op alone makes, on tensors without data; None where fake mode has to be asked.

        Fake mode takes an op apart in Python and asks where each part runs, which takes milliseconds.

        Args:
            key: What `key` returned.
            func: The ATen overload.
            args: Its arguments as it was given them.
            kwargs: Its named arguments.
        """
        given = tensors_in((args, kwargs))
        devices = {t.device for t in given}
        placed = key is None or any(kind is torch.device for kind, *_ in key[1])
        # without data a convolution takes groups, and a bias, that do not fit its weight
        checked = "conv" in func._schema.name
        if placed or checked or len(devices) != 1 or any(not t.dim() for t in given):
            return None
        try:
            with no_dispatch():
                bare = _without_data(args), _without_data(kwargs)
                out = func(*bare[0], **bare[1])
        except Exception:  # fake mode knows more ops, and says what is wrong
            return None
        self._remember(key, tensors_in(bare), out, devices.pop())
        return self.recall(key)

    def keep(self, key: Any, args: Mapping[str, Any], out: Any) -> None:
        """Remember what a call returned, if it is fake tensors alone that share no memory with arguments."""
        if key is not None and all(type(t) is FakeTensor and t.constant is None for t in tensors_in(out)):
            self._remember(key, tensors_in(args), out)

    def _remember(self, key: Any, given: Sequence[Tensor], out: Any, device: torch.device | None = None) -> None:
        made = [out] if isinstance(out, Tensor) else out
        if type(made) not in (tuple, list) or not all(isinstance(t, Tensor) for t in made):
            return
        memory = {storage_of(t) for t in given}
        if key[0]._schema.name not in _MOVES and any(storage_of(t) in memory for t in made):
            return
        if all(t.layout == torch.strided for t in made):
            specs = [(t.dtype, device or t.device, t.shape, t.stride()) for t in made]
            self._known[key] = (None if isinstance(out, Tensor) else type(out), specs)


def _without_data(value: Any) -> Any:
    """Return an argument with new tensors on the meta device in the place of fake ones."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, Mapping):
        return {name: _without_data(v) for name, v in value.items()}
    return type(value)(map(_without_data, value)) if type(value) in (list, tuple) else value


_pure: dict[Any, bool] = {}


def _is_pure(func: Any) -> bool:
    """Return whether an op neither returns nor changes an argument, and sizes do not depend on values."""
    known = _pure.get(func)
    if known is None:
        ends = (*func._schema.arguments, *func._schema.returns)
        known = _pure[func] = not _UNSURE.intersection(func.tags) and all(a.alias_info is None for a in ends)
    return known


def _part(value: Any, moves: bool) -> Any:
    """Return the part of a key that stands for one argument."""
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.constant is not None or value.layout != torch.strided:
            raise _NoKeyError
        if moves and (not value.is_inference() or may_be_part(axes_of(value))):
            raise _NoKeyError
        # the type tells sizes of tensors from those that are arguments
        return Tensor, value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), tuple([_part(v, moves) for v in value])
    if value is None or isinstance(
        value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    ):
        return type(value), value
    raise _NoKeyError
