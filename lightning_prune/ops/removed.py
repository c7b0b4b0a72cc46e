"""The values of removed entries: kept aside while decay and momentum move them, and put back before they are judged.

Gradients of removed entries are zero, but an optimizer still moves them: weight decay shrinks them, momentum carries
them on. Scores of a removed channel would then depend on how long it has been away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError
from lightning_prune.ops.base import DynamicOp

__all__ = ["put_back_", "removed_entries"]


def removed_entries(model: nn.Module) -> dict[str, Tensor]:
    """Return the removed entries of every parameter of a masked model.

    Args:
        model: With dynamic ops.

    Returns:
        Parameter name -> its removed entries in row-major order, `[n]`, copies on the parameter's device. Parameters
        that keep everything are left out.
    """
    return {name: full.detach()[mask] for name, full, mask in _cut_parameters(model)}


def put_back_(model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    """Write removed entries back where they were; kept entries are not touched.

    Args:
        model: With dynamic ops and the masks in force when `removed_entries` was called.
        entries: What it returned; on any device.

    Raises:
        CheckpointError: The entries are of other masks. Nothing has changed.
    """
    found = list(_cut_parameters(model))
    for name, _, mask in found:
        if name in entries and entries[name].numel() != int(mask.sum()):
            raise CheckpointError(
                f"Got {entries[name].numel()} removed entries for {name!r}; the masks remove {int(mask.sum())}."
            )
    with torch.no_grad():
        for name, full, mask in found:
            if name in entries:
                full[mask] = entries[name].to(full)


def _cut_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, full tensor and mask of removed entries of every parameter that is cut, tied ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, DynamicOp):
            continue
        for name, full in _held(module).items():
            cuts = module._dynamic.cuts(module, name)
            if cuts and id(full) not in seen:
                seen.add(id(full))
                lives = torch.ones(full.shape, dtype=torch.bool, device=full.device)
                for dim, kept in cuts:
                    line = torch.zeros(kept.full, dtype=torch.bool, device=full.device)
                    line[kept.on(full.device)] = True
                    lives &= line.view([-1 if d == dim else 1 for d in range(full.dim())])
                yield f"{prefix}.{name}" if prefix else name, full, ~lives


def _held(module: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
