"""Leave a model as it was: modes, buffers, attributes and random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.generators import global_generators, own_generators

__all__ = ["untouched"]

_CONTAINERS = (dict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, bit for bit, what running a model changes; parameters are not copied, running must not change them.

    Args:
        model: Its modules keep their modes, attributes, buffers and other tensors that they hold, and its device. The
            random generators go back to where they are, too.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [dict(module.__dict__) for module in modules]
    values = [value for held in attributes for value in held.values()]
    containers = [(value, value.copy()) for value in values if type(value) in _CONTAINERS]
    scripted = [(module, module.training) for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    tensors = [(t, t.detach().clone()) for t in {id(t): t for t in [*_tensors(values), *model.buffers()]}.values()]
    generators = [*global_generators(), *own_generators(attributes)]
    device = next((parameter.device for parameter in model.parameters()), None)

    try:
        yield
    finally:
        if device is not None and next(model.parameters()).device != device:
            model.to(device)
        for module, held in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(held)
        for container, contents in containers:
            _refill(container, contents)
        for module, training in scripted:
            module.training = training
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.data.copy_(before)
        for generator in generators:
            generator.restore()


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    """Yield the tensors among attributes, and those of lists and dicts, but no parameters."""
    for value in values:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
        yield from (one for one in inner if isinstance(one, Tensor) and not isinstance(one, nn.Parameter))


def _refill(container: Any, contents: Any) -> None:
    """Give a container its contents back, in their order."""
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)
