"""Integers that a user says follow an axis, for classes whose forward the certificate cannot learn from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.closure import Closure, close
from lightning_prune.graph.holders import is_holder
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.trace import DenseTrace

__all__ = ["register_attributes", "registered_followers"]

_AXIS = re.compile(r"(?P<tensor>\w+(\.\w+)*)\.(?P<dim>\d+)(:(?P<factor>heads|head_dim|groups))?")
_ATTRIBUTE = re.compile(r"(?P<name>[^\W\d]\w*)(\.(?P<element>\w+))?")


@dataclass(frozen=True)
class _Registered:
    """One attribute as it was registered: `name[element]` is the length of `tensor`'s axis `dim`, or of a factor."""

    name: str
    element: int | str | None
    tensor: str
    dim: int
    factor: str | None
    text: str


_REGISTRY: dict[type[nn.Module], dict[str, _Registered]] = {}


def register_attributes(cls: type[nn.Module], attributes: Mapping[str, str]) -> None:
    """Say which integers of a class are the length of an axis, so that they follow when it is pruned.

    Most integers are learned while the structure is certified. Register those that cannot be: private ones, or several
    that only fit together. A wrong entry does no harm: the structure does not certify, and the axis is frozen.

    Args:
        cls: Modules of this class and of its subclasses. What is registered again is replaced.
        attributes: Attribute -> axis. The attribute is an int that each module holds, or one in a tuple, list, dict or
            config object: ``"shape.0"``, ``"config.n_head"``. The axis is a tensor as seen from the module and one of
            its dimensions: ``"weight.0"``, ``"query.weight.0"``. Where forward splits the axis (3 x heads x head_dim),
            the factor of that length is meant; ``":heads"``, ``":head_dim"`` or ``":groups"`` behind the axis tells
            which, if two have it.

    Raises:
        ConfigError: An argument that does not fit. `ChannelMutator.prepare_from_supernet` raises it when a module has
            no such attribute or tensor, or of another length.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.query, self._heads = nn.Linear(48, 48), 4
        >>> register_attributes(Attention, {"_heads": "query.weight.0:heads"})
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"Got cls={cls!r} for register_attributes; expected a class of nn.Module.")
    if not isinstance(attributes, Mapping) or not attributes:
        raise ConfigError(f"Got attributes={attributes!r} for register_attributes; expected attribute -> axis.")
    parsed = {name: _parse(name, axis) for name, axis in attributes.items()}
    _REGISTRY.setdefault(cls, {}).update(parsed)


def _parse(attribute: Any, axis: Any) -> _Registered:
    name = _ATTRIBUTE.fullmatch(attribute) if isinstance(attribute, str) else None
    if name is None:
        raise ConfigError(f"Got attribute {attribute!r} for register_attributes; expected a name, or 'name.element'.")
    place = _AXIS.fullmatch(axis) if isinstance(axis, str) else None
    if place is None:
        raise ConfigError(
            f"Got axis {axis!r} for attribute {attribute!r}; expected 'tensor.dimension' such as 'query.weight.0', and "
            "':heads', ':head_dim' or ':groups' behind it where the axis is split."
        )
    element = int(name["element"]) if (name["element"] or "").isdecimal() else name["element"]
    return _Registered(name["name"], element, place["tensor"], int(place["dim"]), place["factor"], axis)


def registered_followers(trace: DenseTrace) -> list[Follower]:
    """Return the integers of a traced model that were registered for the classes of its modules.

    Raises:
        ConfigError: A module lacks the attribute or the tensor, or the lengths differ.
    """
    found: list[Follower] = []
    factors: _Factors | None = None
    for name, module in trace.sandbox.model.named_modules():
        entries: dict[str, _Registered] = {}
        for cls in reversed(type(module).__mro__):
            entries.update(_REGISTRY.get(cls, {}))
        for entry in entries.values():
            factors = factors or _Factors(trace)
            try:
                labels = factors.find(module, entry)
            except ConfigError as error:
                raise ConfigError(f"{name or type(module).__name__}: {error}") from error
            if labels is not None:
                found.append(Follower(name, entry.name, entry.element, labels))
    return found


class _Factors:
    """The axes of a trace, and what they are split into."""

    def __init__(self, trace: DenseTrace) -> None:
        self.trace = trace
        self.closure: Closure = close(trace.space, trace.space.pairs, [])
        model = trace.sandbox.model
        self.names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}

    def find(self, module: nn.Module, entry: _Registered) -> IntArray | None:
        """Return the labels of an axis; None where it cannot be pruned anyway.

        Raises:
            ConfigError: See `registered_followers`.
        """
        length, axis = _integer(module, entry), self._axis(module, entry)
        if length == 1 or not is_labelled(axis):
            return None
        sized = [factor for factor in self._split(axis) if len(factor) == length]
        if entry.factor is not None:
            fits = [factor for factor in sized if self._has_role(factor, entry.factor)]
        else:
            fits = [axis] if len(axis) == length else sized
        distinct = self.closure.strands(fits)
        if len(distinct) == 1:
            return fits[0]
        have = f"several factors of {length}" if distinct else f"{len(axis)} channels and no factor of {length}"
        raise ConfigError(
            f"Got {entry.name}={length} registered for {entry.text!r}, which has {have}. Name the axis that it is the "
            "length of, with ':heads', ':head_dim' or ':groups' for a part of it."
        )

    def _axis(self, module: nn.Module, entry: _Registered) -> Any:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if entry.tensor not in tensors:
            raise ConfigError(f"Got axis {entry.text!r}. {did_you_mean(entry.tensor, tensors)}")
        tensor = tensors[entry.tensor]
        if entry.dim >= tensor.dim():
            raise ConfigError(f"Got axis {entry.text!r} of a tensor of {tensor.dim()} dimensions.")
        axes = self.trace.axes.get(self.names[id(tensor)])
        return axes[entry.dim] if axes else None

    def _split(self, axis: IntArray) -> Iterator[IntArray]:
        for product in self.closure.products:
            if self.closure.along(product.flat) is self.closure.along(axis):
                yield from product.axes

    def _has_role(self, factor: IntArray, role: str) -> bool:
        """Return whether an op of the model used the factor as that."""
        marked = self.trace.space.marks.get(role, ())
        classes = np.concatenate([self.closure.classes[labels] for labels in marked]) if marked else np.zeros(0)
        return bool(np.isin(self.closure.classes[factor], classes).any())


def _integer(module: nn.Module, entry: _Registered) -> int:
    value = module.__dict__.get(entry.name)
    if isinstance(entry.element, int):
        value = value[entry.element] if isinstance(value, tuple | list) and entry.element < len(value) else None
    elif entry.element is not None:
        held = value if isinstance(value, Mapping) else vars(value) if is_holder(value) else {}
        value = held.get(entry.element)
    if isinstance(value, bool) or not isinstance(value, int):
        element = "" if entry.element is None else f".{entry.element}"
        raise ConfigError(f"Got attribute '{entry.name}{element}' registered, but the module holds no such int.")
    return value
