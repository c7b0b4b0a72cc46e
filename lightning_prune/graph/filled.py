"""Lazy caches that were filled before the first trace: a model that has run already hides the weights behind them.

LeViT and others keep in a dict what their weights make of a table, so that the trace would find a constant there. An
attribute is such a cache if a forward does not touch it while it is full, fills it again with the very same values when
it is empty, and returns the same either way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_prune.graph.contents import named_tensors, tensors_within
from lightning_prune.graph.memos import CONTAINERS, tensors_below
from lightning_prune.graph.sandbox import Sandbox

__all__ = ["Unwatched", "find_filled"]

Slot = tuple[str, str]  # module, attribute
_USUAL = frozenset(vars(nn.Module()))


class Unwatched:
    """Stands where a dispatch mode would watch a run."""

    stand_ins: Mapping[int, Tensor] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def find_filled(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Slot, Any]:
    """Return `(module name, attribute) -> what it holds when empty` of the lazy caches that are full.

    A model that has any candidate runs a few times on real copies, in eval mode; it is left as it was.

    Args:
        model: With its own classes.
        args: Positional example input.
        kwargs: Keyword example input.
    """
    modules = dict(model.named_modules())
    own = {id(t) for t in named_tensors(model).values()}
    held = {slot: modules[slot[0]].__dict__[slot[1]] for slot in _candidates(modules, own)}
    if not held or any(t.is_meta for t in (*model.parameters(), *tensors_within([args, kwargs]))):
        return {}
    trial = _Trial(model, args, kwargs, held)
    usual = trial.run(())
    if usual is None:
        return {}
    kinds: dict[tuple[type, str], list[Slot]] = {}
    for slot in sorted(held.keys() - trial.changed):
        kinds.setdefault((type(modules[slot[0]]), slot[1]), []).append(slot)
    found = [slot for slots in kinds.values() for slot in slots]
    if len(kinds) > 1 and not trial.refills(found, usual):
        found = [slot for slots in kinds.values() if trial.refills(slots, usual) for slot in slots]
    return {slot: _empty(held[slot]) for slot in found} if found and trial.refills(found, usual) else {}


def _candidates(modules: Mapping[str, nn.Module], own: set[int]) -> Iterable[Slot]:
    """Yield the attributes that hold tensors which are neither parameters nor buffers."""
    for name, module in modules.items():
        for attribute, value in () if isinstance(module, torch.jit.ScriptModule) else vars(module).items():
            if attribute in _USUAL or not isinstance(value, (Tensor, *CONTAINERS)) or not tensors_below(value):
                continue
            if not any(id(t) in own for t in tensors_within(value)):
                yield name, attribute


def _empty(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    empty = copy.copy(value)
    empty.clear()
    return empty


class _Trial:
    """Runs a model with some of its attributes emptied.

    Attributes:
        changed: Attributes that the last run left with something else.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], held: Mapping[Slot, Any]
    ) -> None:
        self.model, self.given, self.held = model, (args, dict(kwargs)), held
        self.changed: set[Slot] = set()
        self._before = {slot: copy.copy(value) for slot, value in held.items()}

    def refills(self, slots: Iterable[Slot], usual: list[Tensor]) -> bool:
        """Return whether a run fills these again with what they hold, and returns the usual tensors."""
        slots = set(slots)
        found = self.run(slots)
        return found is not None and not self.changed & slots and _same(found, usual)

    def run(self, emptied: Iterable[Slot]) -> list[Tensor] | None:
        """Return the output of a run, None where it fails."""
        sandbox, outputs = Sandbox(self.model, fake=False), list[Tensor]()
        sandbox.caches.update({slot: _empty(self.held[slot]) for slot in emptied})
        modules = dict(self.model.named_modules())

        def forward() -> None:
            outputs.extend(sandbox.outputs(self.model(*args, **kwargs)))
            now = {slot: modules[slot[0]].__dict__.get(slot[1]) for slot in self.held}
            self.changed = {slot for slot, value in now.items() if not _same(value, self._before[slot])}

        with sandbox.without_gradients():
            args, kwargs = sandbox.inputs(self.given)
            tensors = {id(t): sandbox.make_like(t) for t in named_tensors(self.model).values()}
        try:
            sandbox.run(tensors, forward, Unwatched(), train=False)
        except Exception:  # of the user's forward
            return None
        return outputs


def _same(one: Any, other: Any) -> bool:
    """Return whether two trees hold equal values."""
    (ones, form), (others, other_form) = tree_flatten(one), tree_flatten(other)
    return form == other_form and all(_equal(a, b) for a, b in zip(ones, others, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        return alike and torch.equal(one, other)
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))
