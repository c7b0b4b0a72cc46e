"""Write a pruned model to a file, without a Trainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint.hooks import KEY
from lightning_prune.checkpoint.safetensors import is_safetensors, write_safetensors
from lightning_prune.errors import ConfigError
from lightning_prune.mutator.arguments import check_module
from lightning_prune.ops.structure import structure_of

__all__ = ["save_pruned"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, Tensor)


def save_pruned(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    hyper_parameters: Mapping[str, Any] | None = None,
    units: Mapping[str, float | int] | None = None,
) -> None:
    """Write the weights of a model and its structure; `load_pruned` reads them, and nothing in the file is code.

    A model that is dynamic yet is written with all of its channels, and loads small. The file is put in place when it
    is complete: a run that dies leaves what was there.

    Args:
        model: Small, dynamic or dense.
        path: A name that ends in ``.safetensors`` gives that format; any other is a file of `torch.save`. Its folder is
            made if it is not there.
        hyper_parameters: Arguments that make the dense model from its class. None takes ``model.hparams`` if the model
            has them, as a LightningModule has.
        units: What remains of each unit by name, for `describe`: `ChannelMutator.current_choices`.

    Raises:
        ConfigError: `model` is no module, a hyperparameter is no plain data, the state dict holds what the format
            cannot, or the package safetensors is missing.

    Example:
        >>> import tempfile
        >>> from lightning_prune.checkpoint import load_pruned
        >>> path = Path(tempfile.mkdtemp()) / "model.ckpt"
        >>> save_pruned(nn.Linear(2, 3), path, hyper_parameters={"in_features": 2, "out_features": 3})
        >>> load_pruned(path, nn.Linear)
        Linear(in_features=2, out_features=3, bias=True)
    """
    check_module(model, "to save")
    given = getattr(model, "hparams", None) if hyper_parameters is None else hyper_parameters
    arguments = dict(given) if isinstance(given, Mapping) else {}
    for name, value in arguments.items():
        _check_plain(f"hyper_parameters[{name!r}]", value)
    whole = getattr(model, "_hparams_name", None)  # how Lightning says that they are one object
    named = {"hparams_name": whole} if hyper_parameters is None and isinstance(whole, str) else {}
    content = {
        "state_dict": model.state_dict(),
        KEY: structure_of(model, units),
        "hyper_parameters": arguments,
        **named,
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        if is_safetensors(target):
            write_safetensors(content, written)
        else:
            torch.save(content, written)
        written.replace(target)


def _check_plain(place: str, value: Any) -> None:
    """Raise for what `torch.load(weights_only=True)` would refuse."""
    if type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _check_plain(f"{place}[{index}]", item)
    elif type(value) is dict:
        for key, item in value.items():
            _check_plain(f"{place}[{key!r}]", item)
    elif type(value) not in PLAIN:
        raise ConfigError(
            f"Got {place} of type {type(value).__name__}; expected numbers, strings, lists and dicts, which load "
            "without executing code. Leave it out: save_hyperparameters(ignore=[...]), or give hyper_parameters={...}."
        )
