"""What code remembers outside of its modules: it would hand what a trace made to a real run, and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["PLAIN", "Memos", "differ", "find_memos", "is_own", "refill", "tensors_below"]

Memo = functools._lru_cache_wrapper
CONTAINERS = (dict, list, set)
PLAIN = frozenset({bool, int, float, str, type(None), tuple})
_FOREIGN = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}
)


@dataclass
class Memos:
    """Where the code of a model can leave tensors.

    Args:
        functions: Those under `functools.lru_cache`.
        containers: Dicts, lists and sets of classes and Python modules, and the attributes of plain objects.
        names: What the code mentions: names of attributes and others, and words in quotes.
        noted: `id(container) -> (container, what it held before the first run)` of those that a run left tensors in.
    """

    functions: list[Memo[Any]] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    noted: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Let nothing be remembered from real runs, and nothing of this time afterwards."""
        self._clear_functions()
        before = [(container, container.copy()) for container in self.containers]
        self.forget()
        try:
            yield
        finally:
            self._clear_functions()
            for container, copy in before:
                if id(container) in self.noted or (differ(container, copy) and tensors_below(container)):
                    self.noted.setdefault(id(container), (container, copy))
                    refill(container, copy)

    def forget(self) -> None:
        """Put back what containers held before the first run: tensors in them may be of another structure."""
        for container, first in self.noted.values():
            refill(container, first)

    def _clear_functions(self) -> None:
        for function in self.functions:
            function.cache_clear()


def find_memos(model: nn.Module) -> Memos:
    """Return what a forward of the model can remember by, as far as its names lead.

    Looked at are the objects and functions that the parts of the model hold, `forward` of their classes, and whatever
    is mentioned by name in a function that was reached: functions, classes, methods and containers, in any file but
    those of torch and Lightning; also what hides in closures.
    """
    search = _Search()
    for module in model.modules():
        search.waiting.append(type(module))
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        held = [value for value in (*vars(module).values(), *hooks) if type(value) not in PLAIN]
        search.waiting += (v for v in held if not isinstance(v, (*CONTAINERS, nn.Module)))  # containers are watched
    search.run()
    return search.memos


class _Search:
    """Follow names from one value to the next."""

    def __init__(self) -> None:
        self.memos = Memos()
        self.waiting: list[Any] = []
        self._names = self.memos.names
        self._names.add("forward")
        self._members: dict[str, list[Any]] = {}  # of classes, under names that nothing has mentioned so far
        self._seen: dict[int, Any] = {}  # holds what it has met: an address is not given away again

    def run(self) -> None:
        """Look at all that waits, and at all that this leads to."""
        while self.waiting:
            value = _unwrapped(self.waiting.pop())
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._open(value)

    def _open(self, value: Any) -> None:
        """Note a value that remembers, and let what it leads to wait."""
        if isinstance(value, Memo):
            self.memos.functions.append(value)
            self.waiting.append(value.__wrapped__)
        elif isinstance(value, FunctionType):
            if is_own(value.__module__):
                self._mention(value)
        elif isinstance(value, type):
            if is_own(value.__module__):
                self.waiting += value.__mro__
                self._offer(value)
        elif type(value) in CONTAINERS:
            self.memos.containers.append(value)
        elif not isinstance(value, (Tensor, nn.Module, ModuleType)) and is_own(type(value).__module__):
            held = getattr(value, "__dict__", None)
            if type(held) is dict:
                self.memos.containers.append(held)
                self.waiting += (type(value), *(v for v in held.values() if type(v) in CONTAINERS))

    def _offer(self, cls: type) -> None:
        """Let the members of a class wait that were mentioned, or that Python itself calls; keep the others."""
        for name, value in vars(cls).items():
            if name in self._names or (name.startswith("__") and name != "__init__"):
                self.waiting.append(value)
            else:
                self._members.setdefault(name, []).append(value)

    def _mention(self, function: FunctionType) -> None:
        """Let what the names in a function and its closure stand for wait."""
        names = set(_names(function.__code__))
        for name in names - self._names:
            self.waiting += self._members.pop(name, ())
        self._names |= names
        values = [function.__globals__[name] for name in names if name in function.__globals__]
        for cell in function.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        parts = [v for v in values if isinstance(v, ModuleType) and is_own(v.__name__)]
        self.waiting += values + [vars(part)[name] for part in parts for name in names if name in vars(part)]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # getattr(self, "width")
            yield constant


def is_own(module: str | None) -> bool:
    """Return whether a Python module is of the model, or of a library of models: not of torch and what it stands on."""
    return (module or "builtins").partition(".")[0] not in _FOREIGN


def _unwrapped(value: Any) -> Any:
    """Return the function behind a method, property or partial."""
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, functools.partial) else value


def tensors_below(value: Any, depth: int = 3) -> bool:
    """Return whether a container holds a tensor, itself or in containers and objects below it."""
    if isinstance(value, Tensor) or not depth:
        return isinstance(value, Tensor)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    held = getattr(value, "__dict__", None) if not children else None
    return any(tensors_below(child, depth - 1) for child in (*children, *(held.values() if type(held) is dict else ())))


def differ(container: Any, copy: Any) -> bool:
    """Return whether a container no longer holds the same objects."""
    if not container and not copy:
        return False
    pairs = zip(_items(container), _items(copy), strict=False)
    return len(container) != len(copy) or any(a is not b for a, b in pairs)


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def refill(container: Any, copy: Any) -> None:
    """Let a container hold what its copy holds."""
    container.clear()
    if isinstance(container, list):
        container.extend(copy)
    else:
        container.update(copy)
