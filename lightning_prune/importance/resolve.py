"""What a user writes as an importance -> an object with `scores(units)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from torch import Tensor

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.importance.mixture import Mixture
from lightning_prune.importance.scorer import IMPORTANCES, Importance, Scorer, arguments_of, load

__all__ = ["resolve_importance"]

_SENSITIVITY = "lightning_prune.importance.measured.SensitivityScores"  # it resolves what it ranks by here


def resolve_importance(importance: Scorer | Callable[..., Tensor] | Mapping[str, Any] | str) -> Scorer:
    """Return the object that scores units.

    Args:
        importance: The name of a built-in, a function unit -> float `[C]`, the import path of such a function or of a
            class whose instances score, a mapping (DictConfig too) of `Importance`'s arguments and the function's own,
            of `class_path` and `init_args`, of a mixture: ``{"name": "mixture", "of": {"l1": 1, "taylor": 0.5}}``, or
            of what was measured: ``{"name": "sensitivity", "table": path, "of": "l1"}``; or an object with a method
            `scores`, returned as is.

    Returns:
        An object whose `scores(units, scope)` gives unit name -> float32 `[C]` on the CPU.

    Raises:
        ConfigError: None of these, an unknown name or key, or a path that cannot be imported.

    Example:
        >>> resolve_importance({"name": "lp", "reduction": "max", "p": 3}).arguments
        {'p': 3}
    """
    if isinstance(importance, Mapping):
        return _from_mapping(importance)
    asked: Any = importance
    found = load(asked)
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
    """Build from `class_path` and `init_args`, or from the arguments of `Importance` and of its function."""
    if mapping.get("name") == "mixture" and "of" in mapping:
        return _mixture(mapping)
    if mapping.get("name") == "sensitivity" and "table" in mapping:
        return cast(Scorer, _made(cast(type, load(_SENSITIVITY)), _without(dict(mapping), "name")))
    if "class_path" not in mapping:
        return _importance(mapping)
    for key in mapping:
        if key not in ("class_path", "init_args"):
            raise ConfigError(f"Got key {key!r} in importance. {did_you_mean(key, ('class_path', 'init_args'))}")
    found = load(mapping["class_path"])
    if not inspect.isclass(found):
        raise ConfigError(f"Got class_path={mapping['class_path']!r}, which is not a class; write it as 'name'.")
    return resolve_importance(_made(found, dict(mapping.get("init_args") or {})))


def _importance(mapping: Mapping[str, Any]) -> Importance:
    """Tell the arguments of `Importance` from those of its function."""
    own = [field.name for field in fields(Importance)]
    function = load(mapping.get("name", "magnitude"))
    further = arguments_of(function) if callable(function) else []
    given = {str(key): value for key, value in mapping.items()}
    for key in given:
        if key not in (*own, *further):
            raise ConfigError(f"Got key {key!r} in importance. {did_you_mean(key, [*own, *further])}")
    extra = {key: given.pop(key) for key in list(given) if key not in own}
    return Importance(**{**given, "arguments": {**(given.get("arguments") or {}), **extra}})


def _mixture(mapping: Mapping[str, Any]) -> Mixture:
    """Build from the parts: name -> weight, or a list of mappings of which each may have a weight beside the others."""
    for key in mapping:
        if key not in ("name", "of"):
            raise ConfigError(f"Got key {key!r} in a mixture. {did_you_mean(key, ('name', 'of'))}")
    of = mapping["of"]
    if isinstance(of, Mapping):
        return Mixture([(resolve_importance(str(name)), weight) for name, weight in of.items()])
    if isinstance(of, Sequence) and not isinstance(of, str) and all(isinstance(part, Mapping) for part in of):
        parts = [(dict(part), part.get("weight", 1.0)) for part in of]
        return Mixture([(resolve_importance(_without(part, "weight")), weight) for part, weight in parts])
    raise ConfigError(
        f"Got of={of!r} in a mixture; expected names and weights such as {{'l1': 1, 'taylor': 0.5}}, or a list of "
        "importances such as [{'name': 'taylor', 'batches': 16, 'weight': 0.5}]."
    )


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def _made(cls: type, arguments: dict[str, Any]) -> Any:
    """Return an instance of a user's class."""
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"Got init_args={arguments!r} for importance {cls.__qualname__!r}: {error}") from error
