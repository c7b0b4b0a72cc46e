"""Find the structure of a checkpoint where it is lost on the way: in the file's own entry.

The structure travels in the metadata of the state dict. Callbacks that average weights, and asynchronous writing,
rebuild that dict without it; the file has it under a key of its own as well, which hooks of modules cannot see.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune.callback.shapes import averages_of
from lightning_prune.checkpoint import KEY, check_structure, register_structure_hooks, reshape_
from lightning_prune.ops.structure import named_tensors

__all__ = ["register_hooks"]


def register_hooks(pl_module: LightningModule, averages: list[nn.Module]) -> bool:
    """Let the module and its averages carry and follow structures; calling it again changes nothing.

    Args:
        pl_module: The root of the state dict.
        averages: Copies that exist already; later ones are copied with their hooks.

    Returns:
        Whether the module followed structures before.
    """
    had = [getattr(hook, "hook", None) for hook in pl_module._load_state_dict_pre_hooks.values()]
    if _from_file not in had:
        # before the hook that follows the metadata
        pl_module.register_load_state_dict_pre_hook(_from_file)  # type: ignore[no-untyped-call]
    for module in (pl_module, *averages):
        register_structure_hooks(module)
    return any(getattr(hook, "__module__", "").startswith("lightning_prune.") for hook in had)


def _from_file(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Hand the structure of the file that the Trainer is loading to the hook that follows the metadata."""
    trainer = getattr(module, "_trainer", None)
    connector = getattr(trainer, "_checkpoint_connector", None)
    checkpoint = getattr(connector, "_loaded_checkpoint", None) or {}
    if trainer is None or KEY not in checkpoint:
        return
    structure = check_structure(checkpoint[KEY])
    local_metadata.setdefault(KEY, structure)
    for copy in averages_of(trainer):  # they load later, from a dict that other callbacks build
        if _is_smaller(state_dict, copy, prefix):
            reshape_(copy, structure, loaded=[name for name, _, _, _ in named_tensors(copy)])


def _is_smaller(state_dict: dict[str, Any], copy: nn.Module, prefix: str) -> bool:
    """Whether the file holds tensors of other shapes than an average."""
    tensors = ((state_dict.get(prefix + name), tensor) for name, _, _, tensor in named_tensors(copy))
    return any(isinstance(new, Tensor) and new.shape != old.shape for new, old in tensors)
