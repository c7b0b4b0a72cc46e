"""Hooks that carry the structure in a state dict, and reshape a model before tensors are copied into it.

They are module-level functions: averaging callbacks deepcopy the module they sit on, and spawning pickles it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune.checkpoint.check import Structure, check_fit, check_structure, shape_after
from lightning_prune.errors import CheckpointError
from lightning_prune.ops import dynamic_ops
from lightning_prune.ops.slicing import is_full, is_kept, take
from lightning_prune.ops.structure import named_tensors, reshape_, set_masks_, structure_of, target_cuts

__all__ = ["KEY", "fit_", "register_structure_hooks", "without_metadata"]

KEY = "lightning_prune"
"""Name of the structure in a checkpoint and in the metadata of a state dict."""


def fit_(
    model: nn.Module,
    structure: Structure,
    state_dict: dict[str, Any],
    prefix: str = "",
    *,
    strict: bool = True,
    keep_dynamic: bool = True,
) -> None:
    """Reshape `model`, and slice entries of `state_dict`, so that the one loads into the other.

    A dynamic model stays dynamic as long as the tensors fit it: then its masks are set. In every other case the model
    becomes, or stays, plain and as small as the structure says.

    Args:
        model: Dense, small or dynamic.
        structure: Well formed.
        state_dict: Its tensors are replaced by kept slices where the model is small and they are not.
        prefix: Of the keys that are the model's.
        strict: Whether every key must be there on both sides.
        keep_dynamic: Whether a dynamic model may stay so.

    Raises:
        CheckpointError: The structure, the tensors and the model do not belong together. The model is as it was.
    """
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    state = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    check_fit(model, structure, own, strict)
    tensors = {name: tensor for name, _, _, tensor in named_tensors(model)}
    if (
        keep_dynamic
        and dynamic_ops(model)
        and all(tensors[name].shape == tensor.shape for name, tensor in state.items() if name in tensors)
    ):
        set_masks_(model, structure)
        return
    cuts = {name: target_cuts(structure, name) for name in state}
    for name, tensor in state.items():
        if cuts[name] and is_full(tensor, cuts[name]):
            state_dict[prefix + name] = take(tensor, cuts[name])
        elif not is_kept(tensor, cuts[name]):
            raise CheckpointError(
                f"Got {list(tensor.shape)} for tensor {name!r}, cut on some axes only; it is damaged."
            )
    reshape_(model, structure, loaded=state.keys())


def without_metadata(model: nn.Module, state: Mapping[str, Any]) -> Structure | None:
    """Return the structure that the shapes of a state dict speak for; None when there is nothing to do, or to guess."""
    now = structure_of(model)
    tensors = {name: tensor for name, _, _, tensor in named_tensors(model)}
    shapes = {name: list(t.shape) for name, t in state.items() if isinstance(t, Tensor) and name in tensors}
    if all(list(tensors[name].shape) == shape for name, shape in shapes.items()):
        return None
    dense = {name: {"shape": entry["shape"], "kept": {}} for name, entry in now["tensors"].items()}
    for candidate in ({**now, "tensors": dense, "integers": {}}, now):
        sizes = {name: shape_after(candidate["tensors"][name]["shape"], target_cuts(candidate, name)) for name in dense}
        if all(shape == sizes.get(name, list(tensors[name].shape)) for name, shape in shapes.items()):
            return candidate
    return None


def _after_state_dict(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Write the structure into the metadata of a state dict; keys and tensors stay the module's own."""
    local_metadata[KEY] = structure_of(module)


def _before_load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Reshape the module before the tensors of a state dict are copied into it."""
    structure = local_metadata.get(KEY)
    if structure is not None:
        structure = check_structure(structure)
    else:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        structure = without_metadata(module, own)
    if structure is not None:
        fit_(module, structure, state_dict, prefix, strict=strict)


def register_structure_hooks(module: nn.Module) -> None:
    """Let `state_dict()` carry the structure, and `load_state_dict()` reshape for it.

    The structure travels in the metadata of the state dict, which `torch.save` keeps and which adds no keys. Loading
    into a model that is dense, small or dynamic works in every combination: a dynamic model whose tensors fit gets its
    masks set; any other becomes plain and small (or dense again) first. Calling it again changes nothing.

    Args:
        module: The root whose state dict is saved, for example a LightningModule.
    """
    if _after_state_dict not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_after_state_dict)
    if all(getattr(hook, "hook", None) is not _before_load for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_before_load)
