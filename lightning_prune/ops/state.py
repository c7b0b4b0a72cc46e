"""What a dynamic op remembers: the axes of its tensors, the integers that follow, and the buffers it has lent out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.mutables import MaskChanges, MutableChannelContainer
from lightning_prune.ops.slicing import Cut, find_places, is_prefix, put_, take

__all__ = ["DynamicState", "integer_with", "is_holder", "read_from", "with_elements"]


class _Loan(NamedTuple):
    """A kept copy of a buffer that somebody may write to."""

    part: Tensor
    full: Tensor
    cuts: tuple[Cut, ...]
    snapshot: Tensor | None
    """What the copy held when it was lent; None: take it as written to."""


@dataclass(eq=False)
class DynamicState:
    """The only attribute that conversion adds to a module.

    Args:
        static: The class of the module before conversion.
        containers: Attribute name -> mask of that axis.
        axes: Tensor name -> attribute name of each of its axes; None is an axis nothing cuts.
        follows: Attribute -> the int in it that follows (None: the attribute itself; an index, a key of a dict, an
            attribute of an object) -> container whose count it reads.
    """

    static: type[nn.Module]
    containers: dict[str, MutableChannelContainer] = field(default_factory=dict)
    axes: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    follows: dict[str, dict[int | str | None, MutableChannelContainer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop everything that is derived from the masks."""
        self._version = -1
        self._seen: object = None
        self._cuts: dict[str, tuple[Cut, ...]] = {}
        self._places: dict[str, tuple[torch.Size, Tensor | None]] = {}
        self._integers: dict[str, Any] = {}
        self._watched: tuple[MutableChannelContainer, ...] | None = None
        self._loans: dict[str, _Loan] = {}
        self._depth = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("static", "containers", "axes", "follows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def refresh(self) -> None:
        """Drop what is derived from the masks if one of its own has changed since."""
        is_compiled = is_dynamo_compiling()
        latest = None if is_compiled else MaskChanges.latest
        if self._watched is None:
            found = [*self.containers.values(), *(c for parts in self.follows.values() for c in parts.values())]
            self._watched = tuple({id(container): container for container in found}.values())
        # Versions only grow, so an unchanged sum means unchanged masks.
        version = 0
        for container in self._watched:
            version += container.version
        if version != self._version:
            self._version = version
            self._cuts.clear()
            self._places.clear()
            self._integers.clear()
        if not is_compiled:
            self._seen = latest

    def _may_be_stale(self) -> bool:
        """Whether any mask of the process has changed since; compiled code is to be guarded by the versions instead."""
        return is_dynamo_compiling() or self._seen is not MaskChanges.latest

    def cuts(self, module: Any, name: str) -> tuple[Cut, ...]:
        """Return the cut axes of the tensor `name`; empty when it keeps everything."""
        if self._may_be_stale():
            self.refresh()
        found = self._cuts.get(name)
        if found is None:
            kept = ((dim, module._axis_kept(attr)) for dim, attr in enumerate(self.axes.get(name, ())) if attr)
            found = self._cuts[name] = tuple(Cut(dim, indices) for dim, indices in kept if indices is not None)
        return found

    def part(self, name: str, full: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
        """Return what `take` does of a parameter; a small one is cut on all its axes in one step.

        Args:
            name: Name of the parameter.
            full: The parameter, of the dense size.
            cuts: Its cut axes, at least one.
        """
        places = self._places_of(name, full, cuts)
        return take(full, cuts) if places is None else full.take(places)

    def _places_of(self, name: str, full: Tensor, cuts: tuple[Cut, ...]) -> Tensor | None:
        """Return where the kept entries of a small parameter lie, found once; None where `take` is to be used."""
        # Only a parameter itself: for what stands in its place under torch.func, `Tensor.take` may have no rule.
        if len(cuts) < 2 or type(full) is not nn.Parameter or not full.is_cpu or not full.is_contiguous():
            return None
        known = self._places.get(name)
        if known is None or known[0] != full.shape:
            known = self._places[name] = (full.shape, find_places(full, cuts))
        return known[1]

    def settle(self, module: Any) -> None:
        """Work out now what follows from the masks: compiled code finds it there, and need not break off to do so."""
        for name in self.axes:
            cuts, full = self.cuts(module, name), module._parameters.get(name, module._buffers.get(name))
            for cut in cuts if full is not None else ():
                cut.kept.on(full.device)
            if cuts and full is not None:
                self._places_of(name, full, cuts)
        for name in module._integer_names():
            self.integer(module, name)

    def integer(self, module: Any, name: str) -> Any:
        """Return the live value of the integer attribute `name`."""
        if self._may_be_stale():
            self.refresh()
        if name not in self._integers:
            value = module._live_integer(name)
            if is_holder(value):
                return value  # what else is in it may change
            self._integers[name] = value
        return self._integers[name]

    def dense_integer(self, module: Any, name: str) -> Any:
        """Return the dense value of an integer attribute.

        Raises:
            ConfigError: The module stores no such attribute.
        """
        fields = module.__dict__
        value = fields[name] if name in fields else inspect.getattr_static(self.static, name, None)
        if value is None and name in fields:
            return None  # such as no padding index
        if isinstance(value, bool) or not (isinstance(value, Integral | tuple | list) or is_holder(value)):
            valid = [
                attr for attr, number in fields.items() if isinstance(number, int) and not isinstance(number, bool)
            ]
            raise ConfigError(
                f"Got integer attribute {name!r} of {self.static.__name__}; expected one that the module stores. "
                f"{did_you_mean(name, valid)}"
            )
        return value

    # Buffers. An in-place write to a kept copy must reach the buffer itself, so copies are lent and collected again.
    # They are never kept as a cache: `buffer.data.copy_()`, as weight averaging does it, leaves no sign to notice.

    @property
    def has_loans(self) -> bool:
        """Whether copies are lent that have not been collected yet."""
        return bool(self._loans)

    def lend(self, name: str, full: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
        """Return the kept entries of a buffer; writes to them reach `full` at the next `collect`.

        Args:
            name: Name of the buffer.
            full: The buffer, of the dense size.
            cuts: Its cut axes, at least one.

        Returns:
            Tensor of the kept size; the same one all through a forward.
        """
        loan = self._loans.get(name)
        if loan is not None and self._depth and loan.full is full and loan.cuts is cuts:
            return loan.part
        if loan is not None:
            self.collect(name)
        if is_prefix(full, cuts):
            return take(full, cuts)
        part = take(full, cuts)
        # The version of a tensor does not tell whether it was written to: batch_norm moves its statistics unnoticed.
        self._loans[name] = _Loan(part, full, cuts, None if self._depth else part.clone())
        return part

    def collect(self, name: str) -> None:
        """Write the lent copy of one buffer back, if it was written to."""
        loan = self._loans.pop(name)
        if loan.snapshot is None or not torch.equal(loan.part, loan.snapshot):
            put_(loan.full, loan.part, loan.cuts)

    def collect_all(self) -> None:
        """Write every lent copy back that was written to."""
        for name in list(self._loans):
            self.collect(name)

    def enter_forward(self) -> None:
        """Begin a forward: every read of a buffer sees the same copy until `leave_forward`."""
        if not self._depth:
            self.collect_all()
        self._depth += 1

    def leave_forward(self, written: bool = True) -> None:
        """End a forward, and write its buffers back.

        Args:
            written: False when this forward is known to have changed none.
        """
        self._depth -= 1
        if self._depth:
            return
        if written:
            self.collect_all()
        else:
            self._loans.clear()


def is_holder(value: Any) -> bool:
    """Return whether a value is a dict or an object with attributes, such as a config."""
    if isinstance(value, Mapping):
        return True
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)


def read_from(holder: Any, element: int | str) -> Any:
    """Return what a tuple, list, dict or object holds there; None for nothing.

    Args:
        holder: What is read.
        element: Position, key or attribute; `sizes.3` for what the list `sizes` in a dict or object holds.
    """
    if isinstance(element, int):
        inside = isinstance(holder, tuple | list) and -len(holder) <= element < len(holder)
        return holder[element] if inside else None
    fields = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
    name, place = _listed(fields, element)
    return fields.get(name) if place is None else read_from(fields.get(name), place)


def with_elements(holder: Any, values: Mapping[str, int]) -> Any:
    """Return a copy of a dict or object with some of its ints, and of those in its lists, replaced."""
    changed = copy.copy(holder)
    fields: Any = changed if isinstance(changed, Mapping) else vars(changed)
    for element, value in values.items():
        name, place = _listed(fields, element)
        if place is not None:
            value = type(fields[name])([value if k == place else v for k, v in enumerate(fields[name])])
        fields[name] = value
    return changed


def _listed(fields: Mapping[str, Any], element: str) -> tuple[str, int | None]:
    """Return the name of a field, and the position in it if the element is one of a list."""
    name, _, place = element.rpartition(".")
    return (name, int(place)) if element not in fields and name in fields and place.isdecimal() else (element, None)


def integer_with(full: Any, parts: dict[int | str | None, MutableChannelContainer], where: str) -> Any:
    """Return `full` with the followed elements replaced by live counts.

    Args:
        full: The dense value: an int, or a tuple, list, dict or object that holds some.
        parts: Element (None: the value itself) -> container.
        where: Name for the message.

    Raises:
        ConfigError: `full` is no longer what the parts were registered for.
    """
    if None in parts:
        return parts[None].activated_channels
    if is_holder(full):
        counts = {str(element): container.activated_channels for element, container in parts.items()}
        cut = {key: count for key, count in counts.items() if count != read_from(full, key)}
        return with_elements(full, cut) if cut else full
    if not isinstance(full, tuple | list):
        raise ConfigError(f"Got {where} = {full!r}; expected a tuple or list of sizes.")
    values = list(full)
    for element, container in parts.items():
        assert isinstance(element, int), "the attribute itself and names were handled above"
        values[element] = container.activated_channels
    if isinstance(full, tuple) and hasattr(full, "_fields"):
        return type(full)(*values)
    return type(full)(values)
