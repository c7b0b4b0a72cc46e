"""What a module holds before a run, so that it can be given back; what a run changed of it is a lazy cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import nn

from lightning_prune.graph.contents import tensors_within
from lightning_prune.graph.memos import CONTAINERS, PLAIN, differ, refill

__all__ = ["Absent", "Snapshot", "do_nothing", "reset_caches"]

_OWN = frozenset({"_parameters", "_buffers", "training"})
_HOOKS = tuple(n for n, v in vars(nn.Module()).items() if isinstance(v, dict) and n not in {*_OWN, "_modules"})
_NO_HOOKS: dict[Any, Any] = {}
_LEFT_OUT = _OWN.union(_HOOKS)


class Absent:
    """Stands for an attribute that was not there; a class, so that copies know it."""


class Snapshot:
    """What one module holds, its containers copied.

    Args:
        name: Of the module.
        module: Not a scripted one, whose attributes are out of reach.

    Attributes:
        objects: What it holds that is neither plain data nor a container.
    """

    __slots__ = ("_contents", "_module", "_no_hooks", "attributes", "name", "objects")

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module
        self.attributes = dict(module.__dict__)
        self.objects: list[Any] = []
        hooks = [self.attributes.get(key, _NO_HOOKS) for key in _HOOKS]
        self._no_hooks: list[dict[Any, Any]] = [] if any(hooks) else hooks  # which are empty nearly always
        self._contents: dict[str, tuple[Any, Any]] = {}  # attribute -> container, what it held
        left_out = _LEFT_OUT if self._no_hooks else _OWN
        for key, value in self.attributes.items():
            if key in left_out or type(value) in PLAIN:
                continue
            if isinstance(value, CONTAINERS):
                self._contents[key] = (value, value.copy())
            else:
                self.objects.append(value)

    def put_back(self, set_here: Sequence[str], note: Callable[[str, Mapping[str, Any]], None]) -> bool:
        """Give the module its attributes back.

        Args:
            set_here: Attributes that the run was given.
            note: Is told the name, and what changed attributes held, if there are tensors among what they hold now.

        Returns:
            Whether anything but what the run was given had changed; containers are not refilled yet.
        """
        now, before = self._module.__dict__, self.attributes
        for key in (*_OWN, *set_here):
            if key in before:
                now[key] = before[key]
            else:
                now.pop(key, None)  # a compiled module has no flag of its own
        if any(self._no_hooks):
            for hooks in self._no_hooks:
                hooks.clear()
        same = now.keys() == before.keys() and all(map(is_, now.values(), before.values()))
        if same and not any(differ(held, copy) for held, copy in self._contents.values()):
            return False
        changed = self._changes(now)
        if tensors_within([now.get(key) for key in changed]):
            note(self.name, changed)
        now.clear()
        now.update(before)
        return True

    def _changes(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """Return what attributes held that a run changed: with tensors among them, flags and sizes go with these."""
        changed: dict[str, Any] = {}
        before, contents = self.attributes, self._contents
        other = [key for key, value in now.items() if before.get(key, Absent) is not value]
        filled = [key for key, (held, copy) in contents.items() if now.get(key) is held and differ(held, copy)]
        for key in [*other, *(before.keys() - now.keys()), *filled]:
            if key.startswith("_flat_weight") or now.get(key) is do_nothing:  # an RNN lists its weights
                continue
            value, later = before.get(key, Absent), now.get(key, Absent)
            container, copy = contents.get(key, (None, value))
            same = later is value or (isinstance(value, (bool, int, float, str)) and later == value)
            if not same or differ(container, copy if container is not None else None):
                changed[key] = copy
        return changed

    def refill(self) -> None:
        """Let the containers hold what they held."""
        for container, copy in self._contents.values():
            if differ(container, copy):
                refill(container, copy)


def do_nothing() -> None:
    """Stand in for a method that has no place in a trace."""


def reset_caches(model: nn.Module, caches: Mapping[tuple[str, str], Any]) -> None:
    """Put lazy caches back to what they were before the first trace: they may hold tensors of another structure.

    Args:
        model: The model.
        caches: `(module name, attribute) -> value, or a copy of a container` (see `Sandbox`).
    """
    modules = dict(model.named_modules()) if caches else {}
    for (name, attribute), value in caches.items():
        held = modules[name].__dict__
        if value is Absent:
            held.pop(attribute, None)
        elif isinstance(value, CONTAINERS) and type(held.get(attribute)) is type(value):
            refill(held[attribute], value)
        else:
            held[attribute] = value.copy() if isinstance(value, CONTAINERS) else value
