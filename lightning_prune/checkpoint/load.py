"""Load a pruned model from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_prune.checkpoint.build import build_model
from lightning_prune.checkpoint.check import Structure, check_values
from lightning_prune.checkpoint.hooks import KEY, fit_, without_metadata
from lightning_prune.checkpoint.read import Content, File, name_of, read_file
from lightning_prune.errors import CheckpointError
from lightning_prune.ops.structure import named_tensors, structure_of

__all__ = ["load_content", "load_pruned"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_pruned(
    path: File,
    cls_or_instance: ModelT | type[ModelT] | Callable[..., ModelT],
    *,
    strict: bool = True,
    map_location: Any = "cpu",
    weights_only: bool = True,
    **init_kwargs: Any,
) -> ModelT:
    """Load a pruned model from a checkpoint: plain modules, small, without a trace and without pickled code.

    A class is built from the hyperparameters in the file as Lightning builds it, those of LightningCLI included. What a
    file can be checked for is checked before an instance is touched: checksums, the structure, names, shapes and types,
    and that no weight is NaN.

    Args:
        path: A checkpoint of Lightning, of `save_pruned` (``.safetensors`` too), a dict with ``state_dict``, or a saved
            state dict; full-sized or small. Or such a file, open for reading bytes.
        cls_or_instance: The class of the dense model, or a model built as usual. An instance is changed in place.
        strict: Whether every key must be there on both sides; a module that says ``strict_loading = False`` goes
            before it.
        map_location: As in `torch.load`; the model goes where its weights go.
        weights_only: False also builds Python objects that are in the file, hyperparameters for example, and imports
            the classes it names. That can execute code: only for a file that you trust.
        **init_kwargs: Arguments of the class; they come before the hyperparameters in the checkpoint.

    Returns:
        The model, in the mode it was built in.

    Raises:
        CheckpointError: The file is truncated or damaged, of another model, of a newer version of this library, holds
            Python objects or NaN, or is inconsistent; or the class cannot be built from its hyperparameters. An
            instance is as it was.
        ConfigError: Neither a class nor an instance was given, or an instance and arguments; or a package for the file
            is missing.
    """
    content, name = read_file(path, map_location, weights_only=weights_only), name_of(path)
    try:
        content.structure  # noqa: B018  # a damaged one is told before a model is built
        content.state_dict  # noqa: B018
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    model: ModelT = build_model(cls_or_instance, content, init_kwargs, name, trusted=not weights_only)
    try:
        return load_content(content, model, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def load_content(content: Content, model: ModelT, *, strict: bool = True) -> ModelT:
    """Load what was read into a model; see `load_pruned`."""
    hook = getattr(model, "on_load_checkpoint", None)  # Lightning's, for what a model keeps beside its weights
    if callable(hook) and "state_dict" in content.checkpoint:
        _call(hook, content.checkpoint)
    strict = strict and bool(getattr(model, "strict_loading", True))
    state_dict, structure = dict(content.state_dict), content.structure
    if structure is None:
        structure = _without_structure(model, state_dict)
    check_values(model, state_dict)
    fit_(model, structure, state_dict, strict=strict, keep_dynamic=False)
    _load(model, state_dict, content.metadata, strict)
    first = next((tensor for tensor in state_dict.values() if isinstance(tensor, Tensor)), None)
    return model if first is None else model.to(first.device)


def _call(hook: Callable[[dict[str, Any]], object], checkpoint: dict[str, Any]) -> None:
    try:
        hook(checkpoint)
    except CheckpointError:
        raise
    except Exception as error:  # of the user's module, given what stands in the file
        raise CheckpointError(f"on_load_checkpoint of the model failed on it: {error!r}") from error


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
                f"{list(tensors[name].shape)} here. Save the structure too: save_pruned(model, path); or "
                f"register_structure_hooks(model) before state_dict(); or structure_of(model) under {KEY!r} beside the "
                "state dict."
            )
    return now


def _load(model: nn.Module, state_dict: dict[str, Any], metadata: Mapping[str, Any], strict: bool) -> None:
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
