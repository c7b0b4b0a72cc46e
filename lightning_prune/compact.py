"""Make a model small in place while it trains: dynamic ops become plain layers, optimizer state shrinks with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.errors import ConfigError
from lightning_prune.ops import tensor_cuts, to_static_
from lightning_prune.ops.slicing import Cut, take_copy
from lightning_prune.ops.structure import (
    named_tensors,
    remember_structure_,
    remembered_structure,
    reshape_,
    structure_of,
    target_cuts,
)

__all__ = ["compact_", "grow_"]


def compact_(model: nn.Module, optimizers: Iterable[Optimizer] | Optimizer = ()) -> None:
    """Turn every dynamic op into a plain smaller layer, and slice the optimizer state of what shrinks.

    Parameters stay the same objects, so optimizers, hooks and ties go on working. A state tensor is sliced on each axis
    that has the length of the parameter's; axes of length 1 (factored moments) and scalars stay. Training continues bit
    for bit as that of a small model with the same weights and state.

    Args:
        model: Any model; without dynamic ops nothing happens.
        optimizers: Those that train it.

    Raises:
        ConfigError: An optimizer is LBFGS, whose history mixes all parameters in one vector; or the masks describe no
            plain layer. Nothing has changed then.

    Warns:
        UserWarning: State that has another layout was reset; the optimizer builds it anew.

    Example:
        >>> from lightning_prune.mutables import MutableChannel
        >>> from lightning_prune.ops import convert_
        >>> layer, unit = convert_(nn.Linear(4, 2)), MutableChannel(4)
        >>> layer.get_mutable_attr("in_channels").register_mutable(unit, 0, 4)
        >>> unit.current_choice = torch.tensor([True, False, False, True])
        >>> compact_(layer)
        >>> layer
        Linear(in_features=2, out_features=2, bias=True)
    """
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    cuts = tensor_cuts(model)
    for optimizer in given:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if isinstance(optimizer, LBFGS) and any(id(parameter) in cuts for parameter in parameters):
            raise ConfigError(
                "Got LBFGS while parameters shrink; its history is one vector over all parameters, which cannot be "
                "sliced. Use another optimizer, or export_pruned after training."
            )
    structure = structure_of(model)
    shapes = {key: tensor.shape for key, (tensor, _) in cuts.items()}
    to_static_(model)
    remember_structure_(model, structure)
    reset = [
        f"{type(optimizer).__name__}.{name}"
        for optimizer in given
        for name in _slice_state_(optimizer, {key: (shapes[key], axes) for key, (_, axes) in cuts.items()})
    ]
    if reset:
        warnings.warn(
            f"Optimizer state that cannot be sliced was reset: {', '.join(sorted(set(reset)))} "
            f"({len(reset)} entries). It is built anew at the next step.",
            stacklevel=2,
        )


def _slice_state_(optimizer: Optimizer, cuts: dict[int, tuple[torch.Size, tuple[Cut, ...]]]) -> list[str]:
    """Slice the state of one optimizer in place.

    Args:
        optimizer: Its `state` dict is changed, never replaced: wrappers hold on to it.
        cuts: Id of a parameter -> its dense shape and its cuts.

    Returns:
        The names of the entries for whose sake the state of a parameter was reset.
    """
    reset = []
    for parameter, state in optimizer.state.items():
        if id(parameter) not in cuts or not isinstance(state, dict):
            continue
        shape, axes = cuts[id(parameter)]
        sliced = {}
        for name, value in state.items():
            try:
                sliced[name] = _sliced(value, shape, axes)
            except ValueError:
                reset.append(str(name))
        if len(sliced) == len(state):
            state.update(sliced)
        else:
            state.clear()
    return reset


def _sliced(value: Any, shape: torch.Size, cuts: tuple[Cut, ...]) -> Any:
    """Return one entry of the state of a parameter, cut like the parameter.

    Raises:
        ValueError: Its layout is unknown.
    """
    if isinstance(value, list | tuple):
        return type(value)([_sliced(item, shape, cuts) for item in value])
    if isinstance(value, dict):
        return {name: _sliced(item, shape, cuts) for name, item in value.items()}
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    if value.dim() != len(shape):
        raise ValueError("another number of axes than the parameter")
    own = [cut for cut in cuts if value.shape[cut.dim] != 1]
    if any(value.shape[cut.dim] != cut.kept.full for cut in own):
        raise ValueError("another size than the parameter")
    return take_copy(value.detach(), own) if own else value


def grow_(model: nn.Module, optimizers: Iterable[Optimizer] | Optimizer = ()) -> None:
    """Make a small model dense again in place; what comes back is 0, in the state of the optimizers too.

    The way back of `compact_`, for a model that goes on being pruned: with the same masks it computes the same.

    Args:
        model: Plain; it remembers its structure. A model that remembers none is left alone.
        optimizers: Those that train it.
    """
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    structure = remembered_structure(model)
    if not structure["tensors"]:
        return
    tensors = [(name, tensor) for name, _, _, tensor in named_tensors(model)]
    cuts = {id(tensor): target_cuts(structure, name) for name, tensor in tensors}
    reshape_(model, {"tensors": {}, "integers": {}}, loaded=[name for name, _ in tensors])
    for optimizer in given:
        for parameter, state in optimizer.state.items():
            if cuts.get(id(parameter)) and isinstance(state, dict):
                state.update({name: _grown(value, cuts[id(parameter)]) for name, value in state.items()})


def _grown(value: Any, cuts: tuple[Cut, ...]) -> Any:
    """Return one entry of the state of a parameter, with zeros where the parameter has got entries back."""
    if isinstance(value, list | tuple):
        return type(value)([_grown(item, cuts) for item in value])
    if isinstance(value, dict):
        return {name: _grown(item, cuts) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    for dim, kept in cuts:
        if dim < value.dim() and value.shape[dim] == kept.count:
            size = [kept.full if d == dim else n for d, n in enumerate(value.shape)]
            value = value.new_zeros(size).index_copy_(dim, kept.on(value.device), value)
    return value
