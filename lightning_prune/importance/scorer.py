"""`Importance`: a criterion by name, with its reduction over layers and its normalisation over channels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError, did_you_mean
from lightning_prune.importance.activation import ActivationObserver, activation, apoz, wanda
from lightning_prune.importance.aggregate import NORMALIZERS, REDUCTIONS, SHARE, normalize
from lightning_prune.importance.energy import count_readers, magnitude
from lightning_prune.importance.fisher import FisherObserver, fisher
from lightning_prune.importance.gradient import GradientObserver, hessian, taylor, taylor2
from lightning_prune.importance.magnitude import bn_scale, check_p, l1, l2, lp, random
from lightning_prune.importance.observer import MeansObserver, Observer
from lightning_prune.importance.relative import fpgm, lamp

if TYPE_CHECKING:
    from lightning_prune.units import MutableChannelUnit

__all__ = [
    "IMPORTANCES",
    "Importance",
    "Scorer",
    "Watching",
    "arguments_of",
    "is_priced",
    "load",
    "observer_of",
    "score_units",
    "window_of",
]

WATCHING: dict[Callable[..., Tensor], type[MeansObserver]] = {
    taylor: GradientObserver,
    taylor2: GradientObserver,
    hessian: GradientObserver,
    fisher: FisherObserver,
    activation: ActivationObserver,
    wanda: ActivationObserver,
    apoz: ActivationObserver,
}
"""Criteria that have to see training, and what watches it for them."""

IMPORTANCES: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude,
    "l1": l1,
    "l2": l2,
    "lp": lp,
    "bn_scale": bn_scale,
    "lamp": lamp,
    "fpgm": fpgm,
    "taylor": taylor,
    "taylor2": taylor2,
    "hessian": hessian,
    "fisher": fisher,
    "activation": activation,
    "wanda": wanda,
    "apoz": apoz,
    "random": random,
}

_ENERGIES = frozenset({magnitude, taylor, taylor2, hessian, fisher})
"""Criteria whose scores add up, to what layers get or a loss changes by, so that one is a share of the sum."""

_COMPARABLE = frozenset({lamp, apoz})
"""Criteria whose scores compare between units as they are."""

BATCHES = 8


@runtime_checkable
class Scorer(Protocol):
    """Scores all units at once.

    A `scores` that also takes ``living=True`` is told when removed channels do not come back, so that it can leave
    them out of statistics over a unit.
    """

    def scores(self, units: Iterable[MutableChannelUnit], scope: str = "global") -> dict[str, Tensor]:
        """Return unit name -> float32 `[C]` on the CPU, finite, higher = keep."""
        ...


@runtime_checkable
class Watching(Protocol):
    """A `Scorer` that has to see training batches before it can score."""

    @property
    def window(self) -> int:
        """How many training batches it asks for; 0 for none."""
        ...

    def observer(self, units: Iterable[MutableChannelUnit]) -> Observer | None:
        """Return what watches them and then scores; None where nothing has to be seen."""
        ...


def window_of(scorer: Scorer) -> int:
    """Return how many training batches a scorer asks for."""
    return scorer.window if isinstance(scorer, Watching) else 0


def is_priced(scorer: Scorer) -> bool:
    """Return whether scores are meant per what a channel costs, unless a user says otherwise."""
    return bool(getattr(scorer, "is_priced", False))


def observer_of(scorer: Scorer, units: Iterable[MutableChannelUnit]) -> Observer | None:
    """Return what watches training for a scorer; None where it need not."""
    return scorer.observer(units) if isinstance(scorer, Watching) else None


def score_units(
    scorer: Scorer, units: Iterable[MutableChannelUnit], scope: str, living: bool = False
) -> dict[str, Tensor]:
    """Return the scores of the units; those who can tell are told when removed channels do not come back."""
    if living and "living" in parameters_of(scorer.scores):
        return scorer.scores(units, scope, living=True)  # type: ignore[call-arg]  # looked up in its signature
    return scorer.scores(units, scope)


@dataclass(frozen=True)
class Importance:
    """A criterion with its reduction over layers and its normalisation over channels.

    Args:
        name: One of `IMPORTANCES`, the import path of a function, or a function: unit -> float `[C]`, higher = keep.
        reduction: How the layers of a unit combine: "mean", "sum", "max", "prod" or "first".
        normalizer: What the scores of a unit are divided by: "mean", "max", "sum", "std", "none" or "share" (of those
            that are not lower; then times the layers that read the unit, and meant per cost). None is "share" for
            "magnitude", "taylor", "taylor2", "hessian" and "fisher", "mean" for others, and "none" in scope "local"
            and for scores that compare between units as they are: "lamp" and "apoz".
        input_related: Whether the weights that read a channel count beside those that make it.
        batches: How many training batches a criterion of gradients or activations watches before it scores; None is 8.
        arguments: Further arguments of the function, such as ``p`` of "lp"; a mapping may give them beside `name`.

    Raises:
        ConfigError: An unknown name, reduction or normalizer; a path that cannot be imported; an argument that the
            criterion does not take.

    Example:
        >>> Importance("lp", arguments={"p": 3}).arguments, Importance("taylor").window
        ({'p': 3}, 8)
    """

    name: str | Callable[..., Tensor] = "magnitude"  # str first: jsonargparse writes a name back as it was read
    reduction: str = "mean"
    normalizer: str | None = None
    input_related: bool = False
    batches: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ConfigError(f"Got reduction={self.reduction!r}. {did_you_mean(self.reduction, REDUCTIONS)}")
        if self.normalizer is not None and self.normalizer not in (*NORMALIZERS, SHARE):
            near = did_you_mean(self.normalizer, (*NORMALIZERS, SHARE))
            raise ConfigError(f"Got normalizer={self.normalizer!r}. {near}")
        arguments = self._arguments(self._function())
        if "p" in arguments and self._function() is lp:
            check_p(arguments["p"])
        if self.batches is not None and (
            isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1
        ):
            raise ConfigError(f"Got batches={self.batches!r} for importance {self.name!r}; expected at least 1.")

    @property
    def window(self) -> int:
        """How many training batches are watched; 0 for a criterion of weights alone."""
        return (self.batches or BATCHES) if self._function() in WATCHING else 0

    @property
    def is_priced(self) -> bool:
        """Whether the scores are meant per what a channel costs."""
        return self._normalizer("global") == SHARE

    def observer(self, units: Iterable[MutableChannelUnit]) -> MeansObserver | None:
        """Return what watches training for the criterion; None where the weights are enough.

        Args:
            units: Whose channels; their layers dense.

        Raises:
            PlanError: A unit that the criterion cannot score.
        """
        function = self._function()
        return WATCHING[function](self, units, function) if function in WATCHING else None

    def scores(
        self, units: Iterable[MutableChannelUnit], scope: str = "global", *, living: bool = False
    ) -> dict[str, Tensor]:
        """Score the channels of every unit by their weights.

        Args:
            units: Read only.
            scope: Of the ranking that follows: "global", "isomorphic" or "local"; it decides a `normalizer` of None.
            living: Whether statistics over a unit are of the channels that remain alone; what removed ones get then
                means nothing.

        Returns:
            Unit name -> float32 `[C]` on the CPU, higher = keep.

        Raises:
            PlanError: Scores that are not a tensor `[C]` of finite numbers, with the unit's name; a unit that the
                function cannot score; a criterion that has to see training: its `observer` scores.
        """
        function = self._function()
        if function in WATCHING:
            raise PlanError(
                f"Got importance {self.name!r} without batches to look at; it has to watch training. Use it with "
                "PruningCallback, or let importance.observer(units) watch and score."
            )
        arguments = self._arguments(function)
        if living and "living" in parameters_of(function):
            arguments["living"] = True
        return {unit.name: self.finished(function(unit, **arguments), unit, scope, living) for unit in units}

    def finished(self, scores: object, unit: MutableChannelUnit, scope: str, living: bool) -> Tensor:
        """Check and normalise the raw scores of a unit; see `scores`."""
        normalizer = self._normalizer(scope)
        over = unit.mutable.current_mask if living else None
        readers = count_readers(unit) if normalizer == SHARE else 1
        return _checked(readers * normalize(_checked(scores, unit), normalizer, over), unit)

    def _normalizer(self, scope: str) -> str:
        """Return the normalizer of a scope."""
        if self.normalizer is not None:
            return self.normalizer
        if scope == "local" or self._function() in _COMPARABLE:
            return "none"
        return SHARE if self._function() in _ENERGIES else "mean"

    def _function(self) -> Callable[..., Tensor]:
        function = load(self.name)
        if not callable(function) or inspect.isclass(function):
            raise ConfigError(f"Got importance {self.name!r}, which is not a function; expected unit -> scores [C].")
        return cast(Callable[..., Tensor], function)

    def _arguments(self, function: Callable[..., Tensor]) -> dict[str, Any]:
        """Return what the function is called with; what it does not take must have its default."""
        watching = WATCHING.get(function)
        taken = {*arguments_of(function), *(() if watching is None else watching.options)}
        asked = {"reduction": self.reduction, "input_related": self.input_related}
        defaults = {"reduction": "mean", "input_related": False}
        if watching is None and self.batches is not None:
            asked["batches"] = self.batches
        for name, value in (asked | self.arguments).items():
            if name not in taken and (name not in defaults or value != defaults[name]):
                raise ConfigError(
                    f"Got {name}={value!r} for importance {self.name!r}, which takes no {name!r}; leave it out."
                )
        return {name: value for name, value in asked.items() if name in taken} | self.arguments


def load(path: object) -> object:
    """Return the built-in or the object that a name or an import path stands for; anything but a text as it is.

    Raises:
        ConfigError: An unknown name, or a path that cannot be imported.
    """
    if not isinstance(path, str):
        return path
    if path in IMPORTANCES:
        return IMPORTANCES[path]
    if path == "mixture":
        raise ConfigError(
            "Got importance 'mixture' without its parts; expected a mapping such as {'name': 'mixture', 'of': "
            "{'l1': 1, 'taylor': 0.5}}."
        )
    if path == "sensitivity":
        raise ConfigError(
            "Got importance 'sensitivity' without what was measured; expected a mapping such as {'name': "
            "'sensitivity', 'table': 'sensitivity.json'}, of what lightning_prune.sensitivity(...).save wrote."
        )
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


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of a criterion's own arguments, without what it scores."""
    if function in WATCHING:
        parameters = inspect.signature(function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return list(parameters_of(function))[1:]


def parameters_of(function: Callable[..., Any]) -> Collection[str]:
    """Return the names of a function's parameters; none where it has no signature, as some written in C."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return ()


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
