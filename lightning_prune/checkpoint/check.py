"""Check what a file holds before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError
from lightning_prune.ops.caches import is_cache_entry
from lightning_prune.ops.slicing import Cut
from lightning_prune.ops.structure import VERSION, named_tensors, structure_of, target_cuts

__all__ = ["check_fit", "check_structure", "check_values", "shape_after"]

Structure = dict[str, Any]
HOOKS = "lightning_prune.checkpoint.hooks"


def check_structure(structure: object) -> Structure:
    """Return a structure that was read from a file if it is well formed.

    Raises:
        CheckpointError: It was written by a newer version, or is not what `structure_of` makes.
    """
    if not isinstance(structure, dict) or type(structure.get("version")) is not int or structure["version"] < 1:
        raise CheckpointError(
            f"Got a structure of type {type(structure).__name__} without a version; the file is damaged."
        )
    if structure["version"] > VERSION:
        raise CheckpointError(
            f"Got a structure of version {structure['version']}; this library reads up to {VERSION}. Upgrade "
            "lightning-prune."
        )
    for part in ("tensors", "integers"):
        if not isinstance(structure.get(part), dict):
            raise CheckpointError(f"Got a structure without a mapping {part!r}; the file is damaged.")
    for name, entry in structure["tensors"].items():
        _check_entry(name, entry)
    for name, attrs in structure["integers"].items():
        for pair in attrs.values() if isinstance(attrs, dict) else [None]:
            if not isinstance(pair, dict) or not _is_shrunk(pair.get("full", ""), pair.get("kept", "")):
                raise CheckpointError(
                    f"Got integers {attrs!r} of module {name!r}; expected whole numbers, none greater than the dense "
                    "one. It is damaged."
                )
    caches = structure.get("caches", {})  # older files have none
    if not isinstance(caches, dict) or not all(isinstance(k, str) and is_cache_entry(v) for k, v in caches.items()):
        raise CheckpointError(f"Got caches {caches!r} that no model has; the structure is damaged.")
    return structure


def _is_shrunk(full: object, kept: object) -> bool:
    """Whether two values are None, or sizes, of which the second is what can remain of the first."""
    if isinstance(full, list) and isinstance(kept, list):
        return bool(full) and len(full) == len(kept) and all(map(_is_shrunk, full, kept))
    if full is None or kept is None:
        return full is kept or type(full if kept is None else kept) is int
    return type(full) is int and type(kept) is int and (0 <= kept <= full or kept == full)


def _check_entry(name: object, entry: object) -> None:
    """Check the shape and the kept indices of one tensor."""
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("shape"), list)
        or not isinstance(entry.get("kept"), dict)
    ):
        raise CheckpointError(f"Got no shape and kept indices for tensor {name!r}; the structure is damaged.")
    shape = entry["shape"]
    if not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(
            f"Got shape {shape!r} for tensor {name!r}; expected whole numbers. The structure is damaged."
        )
    for dim, kept in entry["kept"].items():
        if not isinstance(dim, str) or not dim.isdigit() or int(dim) >= len(shape):
            raise CheckpointError(
                f"Got kept indices for axis {dim!r} of tensor {name!r} {shape}; there is no such axis."
            )
        good = isinstance(kept, Tensor) and _is_plain(kept) and kept.dtype == torch.long and kept.dim() == 1
        good = good and kept.is_contiguous() and 0 < kept.numel() <= shape[int(dim)]  # before anything is computed
        if good:
            good = int(kept[0]) >= 0 and int(kept[-1]) < shape[int(dim)] and bool((kept.diff() > 0).all())
        if not good:
            raise CheckpointError(
                f"Got kept indices of axis {dim} of tensor {name!r} that are not ascending positions in "
                f"[0, {shape[int(dim)]}); the structure is damaged."
            )


def check_fit(model: nn.Module, structure: Structure, state: Mapping[str, Any], strict: bool) -> None:
    """Check that a structure and the tensors beside it belong to a model; nothing changes.

    Args:
        model: Dense, small or dynamic.
        structure: Well formed.
        state: A state dict.
        strict: Whether every key must be there on both sides.

    Raises:
        CheckpointError: They are of another model, or contradict each other.
    """
    known = structure_of(model)["tensors"]
    shapes = {name: list(tensor.shape) for name, _, _, tensor in named_tensors(model)}
    shapes |= {name: entry["shape"] for name, entry in known.items()}
    for name, entry in structure["tensors"].items():
        if shapes.get(name) != entry["shape"]:
            raise CheckpointError(
                f"Got a checkpoint of another model: its tensor {name!r} is {entry['shape']} when dense; here it is "
                f"{shapes.get(name, 'missing')}."
            )
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or name not in shapes:
            continue
        cuts = target_cuts(structure, name)
        fits = [list(tensor.shape) == shape_after(shapes[name], side) for side in ((), cuts)]
        if not any(fits):
            raise CheckpointError(
                f"Got {list(tensor.shape)} for tensor {name!r}; expected {shapes[name]} or, pruned as the checkpoint "
                f"says, {shape_after(shapes[name], cuts)}. It is of another model, or damaged."
            )
    if strict and not _rewrites_names(model):
        expected = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
        difference = sorted(expected ^ {name for name in state if not name.endswith("num_batches_tracked")})
        if difference:
            where = "the model but not in the file" if difference[0] in expected else "the file but not in the model"
            raise CheckpointError(f"Got a checkpoint of another model: tensor {difference[0]!r} is in {where}.")


def check_values(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that the tensors of a file can be the weights of a model, apart from their shapes; nothing changes.

    A single number that is NaN passes: it is no weight, a metric for example.

    Raises:
        CheckpointError: One is not dense, of another kind of number than the model's, or holds NaN.
    """
    for name, _, _, own in named_tensors(model):
        tensor = state.get(name)
        if not isinstance(tensor, Tensor):
            continue
        if not _is_plain(tensor) or _kind(tensor) != _kind(own):
            raise CheckpointError(
                f"Got a tensor {name!r} of {tensor.dtype}, {tensor.layout} on {tensor.device}; expected a dense one of "
                f"{own.dtype}. It is of another model, or damaged."
            )
        if tensor.dim() and tensor.dtype.itemsize > 1 and bool(tensor.isnan().any()):
            raise CheckpointError(
                f"Got NaN in {int(tensor.isnan().sum())} of {tensor.numel()} entries of tensor {name!r}; expected "
                "numbers. The training diverged, or the file is damaged: take an earlier checkpoint."
            )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its values in memory."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def shape_after(shape: Sequence[int], cuts: Iterable[Cut]) -> list[int]:
    """Return a dense shape with cuts made."""
    kept = {dim: indices.count for dim, indices in cuts}
    return [kept.get(dim, size) for dim, size in enumerate(shape)]


def _rewrites_names(model: nn.Module) -> bool:
    """Whether somebody else's hooks may rename the keys of a state dict."""
    hooks = (hook for module in model.modules() for hook in module._load_state_dict_pre_hooks.values())
    return any(getattr(getattr(hook, "hook", None), "__module__", "") != HOOKS for hook in hooks)
