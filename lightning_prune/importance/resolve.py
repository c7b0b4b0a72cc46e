"""What a user writes as an importance -> an object with `scores(units)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError, did_you_mean
from lightning_prune.importance.aggregate import NORMALIZERS, REDUCTIONS, normalize
from lightning_prune.importance.magnitude import bn_scale, l1, l2, random

if TYPE_CHECKING:
    from lightning_prune.units import MutableChannelUnit

__all__ = ["IMPORTANCES", "Importance", "Scorer", "resolve_importance"]

IMPORTANCES: dict[str, Callable[..., Tensor]] = {"l1": l1, "l2": l2, "bn_scale": bn_scale, "random": random}


@runtime_checkable
class Scorer(Protocol):
    """Scores all units at once."""

    def scores(self, units: Iterable[MutableChannelUnit], scope: str = "global") -> dict[str, Tensor]:
        """Return unit name -> float32 `[C]` on the CPU, finite, higher = keep."""
        ...


@dataclass(frozen=True)
class Importance:
    """A score function with its reduction over layers and its normalisation over channels.

    Args:
        name: "l1", "l2", "bn_scale", "random", the import path of a function, or a function: unit -> float `[C]`,
            higher = keep.
        reduction: How the layers of a unit combine: "mean", "sum", "max", "prod" or "first".
        normalizer: What the scores of a unit are divided by: "mean", "max", "sum", "std" or "none". None is "mean"
            where units are compared with one another (scopes "global" and "isomorphic"), "none" in scope "local".
        input_related: Whether the weights that read a channel count beside those that make it.

    Raises:
        ConfigError: An unknown name, reduction or normalizer; a path that cannot be imported; `reduction` or
            `input_related` for a function that does not take them.

    Example:
        >>> Importance("l2", reduction="max", normalizer="none")
        Importance(name='l2', reduction='max', normalizer='none', input_related=False)
    """

    name: str | Callable[..., Tensor] = "l1"  # str first: jsonargparse writes a name back as it was read
    reduction: str = "mean"
    normalizer: str | None = None
    input_related: bool = False

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ConfigError(f"Got reduction={self.reduction!r}. {did_you_mean(self.reduction, REDUCTIONS)}")
        if self.normalizer is not None and self.normalizer not in NORMALIZERS:
            raise ConfigError(f"Got normalizer={self.normalizer!r}. {did_you_mean(self.normalizer, NORMALIZERS)}")
        self._arguments(self._function())

    def scores(self, units: Iterable[MutableChannelUnit], scope: str = "global") -> dict[str, Tensor]:
        """Score the channels of every unit.

        Args:
            units: Read only.
            scope: Of the ranking that follows: "global", "isomorphic" or "local"; it decides a `normalizer` of None.

        Returns:
            Unit name -> float32 `[C]` on the CPU, higher = keep.

        Raises:
            PlanError: Scores that are not a tensor `[C]` of finite numbers, with the unit's name; a unit that the
                function cannot score.
        """
        function = self._function()
        arguments = self._arguments(function)
        normalizer = self.normalizer or ("none" if scope == "local" else "mean")
        return {
            unit.name: _checked(normalize(_checked(function(unit, **arguments), unit), normalizer), unit)
            for unit in units
        }

    def _function(self) -> Callable[..., Tensor]:
        function = _load(self.name)
        if not callable(function) or inspect.isclass(function):
            raise ConfigError(f"Got importance {self.name!r}, which is not a function; expected unit -> scores [C].")
        return cast(Callable[..., Tensor], function)

    def _arguments(self, function: Callable[..., Tensor]) -> dict[str, Any]:
        """Return those of our arguments that the function takes; those it does not take must have their default."""
        taken = _parameters(function)
        asked = {"reduction": self.reduction, "input_related": self.input_related}
        for name, default in (("reduction", "mean"), ("input_related", False)):
            if name not in taken and asked[name] != default:
                raise ConfigError(
                    f"Got {name}={asked[name]!r} for importance {self.name!r}, which takes no {name!r}; leave it out."
                )
        return {name: value for name, value in asked.items() if name in taken}


def resolve_importance(importance: Scorer | Callable[..., Tensor] | Mapping[str, Any] | str) -> Scorer:
    """Return the object that scores units.

    Args:
        importance: The name of a built-in, a function unit -> float `[C]`, the import path of such a function or of a
            class whose instances score, a mapping (DictConfig too) of `Importance`'s arguments or of `class_path` and
            `init_args`, or an object with a method `scores`, returned as is.

    Returns:
        An object whose `scores(units, scope)` gives unit name -> float32 `[C]` on the CPU.

    Raises:
        ConfigError: None of these, an unknown name or key, or a path that cannot be imported.

    Example:
        >>> resolve_importance({"name": "l2", "reduction": "max"}).reduction
        'max'
    """
    if isinstance(importance, Mapping):
        return _from_mapping(importance)
    asked: Any = importance
    found = _load(asked)
    if inspect.isclass(found):
        asked = found = _made(found, {})
    if isinstance(found, Scorer):
        return found
    if callable(found):
        return Importance(asked)  # a name stays a name: it prints and compares as it was written
    raise ConfigError(
        f"Got importance {importance!r}; expected one of {', '.join(map(repr, IMPORTANCES))}, a function unit -> "
        "scores [C], its import path, or a mapping such as {'name': 'l1', 'reduction': 'mean'}."
    )


def _from_mapping(mapping: Mapping[str, Any]) -> Scorer:
    """Build from `class_path` and `init_args`, or from the arguments of `Importance`."""
    has_class = "class_path" in mapping
    names = ["class_path", "init_args"] if has_class else [field.name for field in fields(Importance)]
    for key in mapping:
        if key not in names:
            raise ConfigError(f"Got key {key!r} in importance. {did_you_mean(key, names)}")
    if not has_class:
        return Importance(**{str(key): value for key, value in mapping.items()})
    found = _load(mapping["class_path"])
    if not inspect.isclass(found):
        raise ConfigError(f"Got class_path={mapping['class_path']!r}, which is not a class; write it as 'name'.")
    return resolve_importance(_made(found, dict(mapping.get("init_args") or {})))


def _made(cls: type, arguments: dict[str, Any]) -> Any:
    """Return an instance of a user's class."""
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"Got init_args={arguments!r} for importance {cls.__qualname__!r}: {error}") from error


def _parameters(function: Callable[..., Tensor]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some functions written in C have no signature
        return ()


def _load(path: object) -> object:
    """Return the built-in or the object that a name or an import path stands for; anything but a text as it is."""
    if not isinstance(path, str):
        return path
    if path in IMPORTANCES:
        return IMPORTANCES[path]
    module, _, name = path.rpartition(".")
    if not module:
        raise ConfigError(f"Got importance {path!r}. {did_you_mean(path, IMPORTANCES)} Or a path 'package.function'.")
    try:
        return cast(object, getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"Got importance {path!r}, which cannot be imported: {error}. Expected 'package.module.function'. "
            f"{did_you_mean(path, IMPORTANCES)}"
        ) from error


def _checked(scores: object, unit: MutableChannelUnit) -> Tensor:
    """Return scores as float32 `[C]` on the CPU, finite."""
    if not isinstance(scores, Tensor) or scores.shape != (unit.num_channels,) or scores.is_complex():
        got = f"shape {tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        raise PlanError(
            f"Got scores of {got} for unit {unit.name!r}; expected a real tensor of shape ({unit.num_channels},)."
        )
    row = scores.detach().to("cpu", torch.float32)
    bad = (~row.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise PlanError(
            f"Got score {row[bad[0]].item()} for channel {bad[0]} of unit {unit.name!r} ({len(bad)} of {len(row)} are "
            "not finite); expected numbers. Check the weights, or lower the learning rate if training diverged."
        )
    return row
