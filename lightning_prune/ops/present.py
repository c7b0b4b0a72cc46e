"""Descriptors through which a dynamic op shows its kept slice and its live integers, and takes values back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import ConfigError
from lightning_prune.ops.slicing import is_full, is_kept, is_prefix, put_
from lightning_prune.ops.state import DynamicState, read_from

__all__ = ["Presented", "holding_buffers", "on_full", "presented_integer", "presented_tensor"]


class Presented(property):
    """Marks an attribute of a dynamic class that is computed from the masks.

    Args:
        fget: Reads the attribute from the module.
        is_tensor: Whether it is a tensor; else an integer or a sequence of them.
    """

    def __init__(self, fget: Callable[[Any], Any], is_tensor: bool) -> None:
        super().__init__(fget)
        self.is_tensor = is_tensor


def presented_tensor(name: str) -> Any:
    """Return a descriptor that shows the kept slice of the parameter or buffer `name`."""

    def read(module: Any) -> Any:
        fields = module.__dict__
        full = fields["_parameters"].get(name)
        is_buffer = full is None and name in fields["_buffers"]
        if full is None:
            if not is_buffer and name not in fields["_parameters"] and name not in fields:
                raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
            full = fields["_buffers"][name] if is_buffer else fields.get(name)
            if not isinstance(full, Tensor):
                return full
        state: DynamicState = fields["_dynamic"]
        try:
            cuts = state.cuts(module, name)
            if not cuts or (full.shape[cuts[0].dim] != cuts[0].kept.full and is_kept(full, cuts)):
                return full  # a kept part stands in for the dense tensor for a while: torch.func.functional_call
            # Sliced anew at each read, without gradients too: `param.data.copy_()`, as weight averaging swaps weights
            # before a validation, leaves no sign by which a kept slice could be known to be stale.
            return state.lend(name, full, cuts) if is_buffer else state.part(name, full, cuts)
        except AttributeError as error:  # nn.Module would answer it with the dense tensor
            raise RuntimeError(f"Reading {name!r} of {type(module).__name__} failed: {error}") from error

    return Presented(read, is_tensor=True)


def presented_integer(name: str) -> Any:
    """Return a descriptor that shows the live value of the integer attribute `name`."""

    def read(module: Any) -> Any:
        try:
            return module.__dict__["_dynamic"].integer(module, name)
        except AttributeError as error:
            raise RuntimeError(f"Reading {name!r} of {type(module).__name__} failed: {error}") from error

    return Presented(read, is_tensor=False)


def write_tensor(module: Any, name: str, value: Any) -> bool:
    """Take over an assignment to a presented tensor if it has the kept size.

    Args:
        module: A dynamic op.
        name: Name of the tensor.
        value: What is assigned.

    Returns:
        True when the kept entries of the dense tensor were written; False when torch shall do the assignment.

    Raises:
        ConfigError: `value` has neither the dense nor the kept size.
    """
    state: DynamicState = module.__dict__["_dynamic"]
    full = module._parameters.get(name)
    full = module._buffers.get(name) if full is None else full
    if not isinstance(value, Tensor) or not isinstance(full, Tensor) or value is full:
        return False
    if name in module._parameters and not isinstance(value, nn.Parameter):
        return False  # torch raises its own TypeError
    state.collect_all()
    cuts = state.cuts(module, name)
    axes = state.axes.get(name, ())
    named = [dim for dim, attr in enumerate(axes) if attr is not None]
    if value.dim() == len(axes) and all(value.shape[dim] == full.shape[dim] for dim in named):
        return False
    if not cuts or value.dim() != len(axes) or not is_kept(value, cuts):
        expected = f"{list(full.shape)}"
        if cuts:
            kept = dict(cuts)
            expected += f" or {[kept[d].count if d in kept else size for d, size in enumerate(full.shape)]}"
        raise ConfigError(
            f"Got a tensor {list(value.shape)} for {name!r} of {type(module).__name__}; expected the dense or the kept"
            f" size: {expected}."
        )
    assert is_full(full, cuts), "a dynamic op holds tensors of the dense size"
    value = value.detach()
    put_(full, value.clone() if is_prefix(full, cuts) else value, cuts)  # the kept part may be a view of the whole
    return True


def write_integer(module: Any, name: str, value: Any) -> None:
    """Accept an assignment to a followed integer only if it changes nothing.

    Another config may take the place of one if its sizes are the dense ones.

    Raises:
        ConfigError: `value` is neither the live nor the dense value.
    """
    state: DynamicState = module.__dict__["_dynamic"]
    live, dense = getattr(module, name), state.dense_integer(module, name)
    keys = [element for element in state.follows.get(name, ()) if isinstance(element, str)]
    if keys and value is not live and all(read_from(value, key) == read_from(dense, key) for key in keys):
        module.__dict__[name] = value
    elif value not in (live, dense):
        raise ConfigError(
            f"Got {name} = {value!r} for {type(module).__name__}; it follows the kept channels (now {live!r} of "
            f"{dense!r}). Change the choice of the unit, or call to_static() first."
        )


def on_full(method: str) -> Callable[..., Any]:
    """Return a method that runs `method` of the static class on the dense tensors and integers."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: DynamicState = self._dynamic
        state.collect_all()
        dynamic, self.__class__ = type(self), state.static
        try:
            return getattr(self, method)(*args, **kwargs)
        finally:
            self.__class__ = dynamic

    call.__name__ = method
    call.__doc__ = f"Run `{method}` of the static class on the dense tensors."
    return call


def holding_buffers(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` with the buffers it changes in place written back when it ends.

    Args:
        forward: The forward of a dynamic class.
    """

    @functools.wraps(forward)  # keeps the signature, which callers inspect
    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: DynamicState = self._dynamic
        state.enter_forward()
        try:
            return forward(self, *args, **kwargs)
        finally:
            state.leave_forward()

    return held


def is_left_alone(module: nn.Module) -> bool:
    """Whether the tensors of `module` are out of reach: scripted, or not there yet."""
    return isinstance(module, torch.jit.ScriptModule) or any(
        p is not None and is_lazy(p) for p in module._parameters.values()
    )
