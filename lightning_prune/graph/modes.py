"""Who asks for the mode of a model: where only layers of torch do that run the same program in both, one trace does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from lightning_prune.graph.event import Event
from lightning_prune.graph.labels import is_labelled

__all__ = ["Readers", "same_program", "watched_mode"]

Readers = Mapping[tuple[int, str], nn.Module]

# in train mode they work out other values, of the same shapes, from the same axes
_SAME_PROGRAM = frozenset(
    {
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    }
)


@contextmanager
def watched_mode(model: nn.Module) -> Iterator[Readers | None]:
    """Collect the modules whose `training` somebody reads, by id and by the name of the Python module that reads it.

    Args:
        model: Whose modules are asked.

    Yields:
        The modules; None where they cannot be watched: another thread does, or a class has a flag of its own.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    if any("training" in vars(cls) for cls in classes):
        yield None
        return
    readers: dict[tuple[int, str], nn.Module] = {}

    def read(module: nn.Module) -> Any:
        readers[id(module), sys._getframe(1).f_globals.get("__name__", "")] = module
        if "training" not in module.__dict__:  # as a compiled one
            raise AttributeError("training")
        return module.__dict__["training"]

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value

    # a property of the class goes before what is in a module's own dict
    nn.Module.training = property(read, write)  # type: ignore[assignment]  # declared as a plain flag
    try:
        yield readers
    finally:
        del nn.Module.training


def same_program(readers: Readers, events: Iterable[Event]) -> bool:
    """Return whether modules that asked for their mode do to every channel in both what they do in one.

    Args:
        readers: All whose mode was asked for; another's code, as that of a parent, may do anything with the answer.
        events: The log of eval mode.
    """
    if _has_any_global_hook() or not all(_is_known(m, asked_by) for (_, asked_by), m in readers.items()):
        return False
    norms = (e.in_axes[0] for e in events if e.name == "aten::batch_norm")
    # statistics of the batch are over all axes but one
    return not any(is_labelled(axis) for axes in norms for axis in (axes[0], *axes[2:]))


def _is_known(module: nn.Module, asked_by: str) -> bool:
    is_changed = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    return type(module) in _SAME_PROGRAM and asked_by == type(module).__module__ and not is_changed
