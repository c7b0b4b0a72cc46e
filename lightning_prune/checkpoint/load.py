"""Load a pruned model from a file."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint.check import Structure, check_structure
from lightning_prune.checkpoint.hooks import KEY, fit_, without_metadata
from lightning_prune.errors import CheckpointError
from lightning_prune.ops.structure import named_tensors, structure_of

__all__ = ["load_pruned"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_pruned(
    path: str | os.PathLike[str],
    cls_or_instance: ModelT | type[ModelT] | Callable[..., ModelT],
    *,
    map_location: Any = "cpu",
    **init_kwargs: Any,
) -> ModelT:
    """Load a pruned model from a checkpoint: plain modules, small, without a trace and without pickled code.

    Args:
        path: A checkpoint of Lightning, a dict with ``state_dict``, or a saved state dict; full-sized or small.
        cls_or_instance: The class of the dense model, or a model built as usual. An instance is changed in place.
        map_location: As in `torch.load`; the model goes where its weights go.
        **init_kwargs: Arguments of the class; they come before the hyperparameters in the checkpoint.

    Returns:
        The model, in the mode it was built in.

    Raises:
        CheckpointError: The file is truncated, of another model, of a newer version of this library, or inconsistent;
            or the class cannot be built from its hyperparameters. An instance is as it was.
    """
    checkpoint = _read(path, map_location)
    model: ModelT = _build(cls_or_instance, checkpoint, init_kwargs)
    hook = getattr(model, "on_load_checkpoint", None)  # Lightning's, for what a model keeps beside its weights
    if callable(hook) and "state_dict" in checkpoint:
        hook(checkpoint)
    state: Any = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"Got {os.fspath(path)}, whose state_dict is no mapping of names; it is damaged.")
    metadata = dict(getattr(state, "_metadata", {}))
    structure = checkpoint.get(KEY, metadata.get("", {}).get(KEY))
    strict = bool(getattr(model, "strict_loading", True))
    state_dict = dict(state)
    try:
        structure = _without_structure(model, state_dict) if structure is None else check_structure(structure)
        fit_(model, structure, state_dict, strict=strict, keep_dynamic=False)
        _load(model, state_dict, metadata, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    first = next((tensor for tensor in state_dict.values() if isinstance(tensor, Tensor)), None)
    return model if first is None else model.to(first.device)


def _read(path: str | os.PathLike[str], map_location: Any) -> dict[str, Any]:
    """Return the dict in a file.

    Raises:
        CheckpointError: It cannot be read as plain data, or is no dict.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Got {os.fspath(path)}, which is damaged or holds Python objects; expected only tensors and plain data. "
            "Save hyperparameters as numbers, strings, lists and dicts."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"Got {os.fspath(path)}, which cannot be read: it is truncated or damaged.") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"Got {type(checkpoint).__name__} in {os.fspath(path)}; expected a checkpoint or a state dict."
        )
    return checkpoint


def _build(source: Any, checkpoint: Mapping[str, Any], init_kwargs: dict[str, Any]) -> Any:
    """Return the dense model, with the layers that `configure_model` makes."""
    model = source
    if not isinstance(source, nn.Module):
        saved = checkpoint.get("hyper_parameters")
        signature = inspect.signature(source)
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
        usable = {
            str(name): value
            for name, value in (dict(saved) if isinstance(saved, Mapping) else {}).items()
            if not str(name).startswith("_") and (takes_all or name in signature.parameters)
        }
        arguments = {**usable, **init_kwargs}
        try:
            model = source(**arguments)
        except TypeError as error:
            raise CheckpointError(
                f"Got {getattr(source, '__name__', source)!r}, which cannot be built from the arguments "
                f"{sorted(arguments)}: {error}. Give the missing ones to load_pruned, or build the model and give that."
            ) from error
    configure = getattr(model, "configure_model", None)
    if callable(configure):
        configure()
    return model


def _without_structure(model: nn.Module, state: Mapping[str, Any]) -> Structure:
    """Return the structure of a file that has none: dense, or as small as the model is already."""
    found = without_metadata(model, state)
    if found is not None:
        return found
    now = structure_of(model)
    tensors = {name: tensor for name, _, _, tensor in named_tensors(model)}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and name in tensors and tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"Got no structure in the file, and {list(tensor.shape)} for tensor {name!r}, which is "
                f"{list(tensors[name].shape)} here. Save the structure too: register_structure_hooks(model) before "
                f"state_dict(), or structure_of(model) under {KEY!r} beside the state dict."
            )
    return now


def _load(model: nn.Module, state_dict: dict[str, Any], metadata: dict[str, Any], strict: bool) -> None:
    """Copy the tensors; torch's complaint becomes ours."""
    carrier = type(nn.Module().state_dict())(state_dict)
    carrier._metadata = {  # type: ignore[attr-defined] # where torch keeps the versions of modules
        name: {key: value for key, value in entry.items() if key != KEY} for name, entry in metadata.items()
    }
    try:
        model.load_state_dict(carrier, strict=strict)
    except CheckpointError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint does not fit the model: {error}") from error
