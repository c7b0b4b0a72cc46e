"""Build the dense model that a checkpoint is of, from its class and the arguments that were saved."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_prune.checkpoint.read import Content
from lightning_prune.errors import CheckpointError, ConfigError

__all__ = ["build_model"]

INSTANTIATORS = frozenset(
    {"lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module"}
)  # what LightningCLI writes; no other name in a file is followed


class Attributes(dict[str, Any]):
    """A mapping whose entries are attributes too, for models that take one object of settings."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def build_model(source: Any, content: Content, init_kwargs: Mapping[str, Any], name: str, *, trusted: bool) -> Any:
    """Return the dense model, with the layers that `configure_model` makes.

    Args:
        source: An instance, which is taken as it is, or what makes one.
        content: Of the file.
        init_kwargs: Arguments; they come before saved ones.
        name: Of the file.
        trusted: Whether classes that the file names may be imported.

    Raises:
        CheckpointError: The class cannot be built; the message shows the call to write.
        ConfigError: Arguments were given beside an instance; or neither a module nor what makes one.
    """
    if isinstance(source, nn.Module):
        if init_kwargs:
            raise ConfigError(
                f"Got an instance of {type(source).__name__} and the arguments {sorted(init_kwargs)} to make one. "
                "Give its class, or leave the arguments out."
            )
        model: Any = source
    elif not callable(source):
        raise ConfigError(
            f"Got {source!r} of type {type(source).__name__}; expected the class of the dense model, or a model built "
            "as usual."
        )
    else:
        model = _make(source, content, init_kwargs, name, trusted)
    configure = getattr(model, "configure_model", None)
    if callable(configure):
        configure()
    return model


def _make(source: Any, content: Content, init_kwargs: Mapping[str, Any], name: str, trusted: bool) -> Any:
    saved = content.hyper_parameters
    instantiator = saved.pop("_instantiator", None)
    is_from_cli = isinstance(instantiator, str) and instantiator in INSTANTIATORS
    if not is_from_cli and instantiator is not None:
        raise CheckpointError(
            f"Got {name}, which wants its model made by {instantiator!r}; expected one of {sorted(INSTANTIATORS)}. It "
            "is not followed: build the model and give that."
        )
    class_path = saved.pop("_class_path", None)
    parameters = inspect.signature(source).parameters
    if is_from_cli:
        arguments = {**saved, **init_kwargs}
    else:
        arguments = {**_fitting(saved, parameters, content.checkpoint.get("hparams_name")), **init_kwargs}
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
    ]
    own = getattr(source, "__name__", str(source))
    call = f"load_pruned({name!r}, {own}{''.join(f', {p}=...' for p in missing)})"
    try:
        if missing and not class_path:
            raise TypeError(f"{own} needs {', '.join(map(repr, missing))}")  # before it does half of its work
        if is_from_cli and isinstance(source, type):
            return _from_config(source, arguments, class_path, trusted)
        return source(**arguments)
    except Exception as error:  # of the user's class, given what stands in the file
        raise CheckpointError(
            f"Got {own!r}, which cannot be built from the arguments {sorted(arguments)}: {error}. Write {call} with "
            "what is missing or else, or build the model and give that."
        ) from error


def _fitting(saved: dict[str, Any], parameters: Mapping[str, inspect.Parameter], whole: Any) -> dict[str, Any]:
    """Return the saved arguments that a class takes: one by one, or all of them as one object."""
    if isinstance(whole, str) and whole in parameters:
        return {whole: Attributes(saved)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {
        name: value for name, value in saved.items() if not name.startswith("_") and (takes_all or name in parameters)
    }


def _from_config(source: type, config: dict[str, Any], class_path: Any, trusted: bool) -> Any:
    """Build a module from what LightningCLI saved: as its parser does, from classes named in the configuration."""
    from jsonargparse import ArgumentParser

    named = [*_class_paths(config), *([class_path] if class_path is not None else [])]
    unknown = [path for path in named if not _is_imported(path)]
    if unknown and not trusted:
        raise TypeError(
            f"the file names {unknown[0]!r}, of a package that is not imported; import it first if that is yours"
        )
    parser = ArgumentParser(exit_on_error=False)
    if class_path is None:
        parser.add_class_arguments(source, "module", fail_untyped=False)
        found = parser.parse_object({"module": config})
    else:
        parser.add_subclass_arguments(source, "module", fail_untyped=False)
        found = parser.parse_object({"module": {"class_path": class_path, "dict_kwargs": config}})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name until jsonargparse 4.53
    return instantiate(found).module


def _class_paths(config: Any) -> Iterator[Any]:
    """Yield what a configuration names as classes, at any depth."""
    if isinstance(config, Mapping):
        if "class_path" in config:
            yield config["class_path"]
        for value in config.values():
            yield from _class_paths(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _class_paths(value)


def _is_imported(class_path: Any) -> bool:
    """Whether the package of a class is in use already, so that a file decides on no import of another."""
    return isinstance(class_path, str) and class_path.split(".", 1)[0] in sys.modules
