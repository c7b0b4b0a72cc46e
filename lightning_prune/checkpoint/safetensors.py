"""Checkpoints as ``.safetensors``: tensors, and beside them text; nothing in such a file can be code.

The format has no checksum, so one over all tensors and all text is stored as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import CheckpointError, ConfigError

__all__ = ["SUFFIX", "is_safetensors", "read_safetensors", "write_safetensors"]

SUFFIX = ".safetensors"
ENTRY, DIGEST = "lightning_prune", "lightning_prune_digest"
TENSOR, TUPLE = "__tensor__", "__tuple__"


def is_safetensors(path: Any) -> bool:
    """Whether a path has the suffix of the format."""
    return isinstance(path, str | os.PathLike) and Path(path).suffix == SUFFIX


def write_safetensors(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; tensors that are one in memory are stored once.

    Args:
        content: ``state_dict``, and whatever else is plain data.
        path: Where to.

    Raises:
        ConfigError: The package is missing, or the state dict holds what is no tensor.
    """
    _check_installed()
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in content["state_dict"].items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"Got {type(tensor).__name__} for {name!r} in the state dict; {SUFFIX} holds tensors only. Write .ckpt."
            )
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        if first.setdefault(same, name) == name:
            stored[name] = tensor.detach().cpu().contiguous().clone()
        else:
            shared[name] = first[same]
    metadata = getattr(content["state_dict"], "_metadata", {})
    versions = {name: {"version": entry["version"]} for name, entry in metadata.items() if "version" in entry}
    others = {name: value for name, value in content.items() if name != "state_dict"}
    text = json.dumps(_to_json({"content": others, "shared": shared, "versions": versions}), separators=(",", ":"))
    save_file(stored, path, metadata={"format": "pt", ENTRY: text, DIGEST: _digest(text, stored)})


def read_safetensors(path: str | os.PathLike[str], map_location: Any) -> dict[str, Any]:
    """Return the checkpoint in a file; of a file that other tools wrote the state dict alone.

    Raises:
        CheckpointError: It cannot be read, or does not match its checksum.
        ConfigError: The package is missing.
    """
    _check_installed()
    from safetensors import safe_open

    Path(path).open("rb").close()  # a missing file is Python's own error
    device = map_location if isinstance(map_location, str | torch.device) else "cpu"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        text = metadata.get(ENTRY)
        found = {"content": {}, "shared": {}, "versions": {}} if text is None else _from_json(json.loads(text))
    except Exception as error:  # of the package, of json, or of a tensor that there cannot be
        raise CheckpointError(f"it is truncated or damaged: {error}") from error
    if text is not None and metadata.get(DIGEST) != _digest(text, stored):
        raise CheckpointError("it is damaged: its tensors or its structure do not match their checksum")
    try:
        placed = {name: tensor.to(device) for name, tensor in stored.items()}
        state = type(torch.nn.Module().state_dict())(placed)
        state.update({name: placed[original] for name, original in found["shared"].items()})
        state._metadata = found["versions"]  # type: ignore[attr-defined]  # where torch keeps the versions of modules
        return {"state_dict": state, **found["content"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"it is damaged: {error!r} in what lies beside its tensors") from error


def _check_installed() -> None:
    if find_spec("safetensors") is None:
        raise ConfigError(f"Got a {SUFFIX} file; expected the extra: pip install 'lightning-prune[safetensors]'.")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a text, and of the name, type, shape and bytes of each tensor."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_json(value: Any) -> Any:
    """Return plain data as JSON has it; vectors of whole numbers and tuples stay what they are.

    Raises:
        ConfigError: It is no plain data.
    """
    if isinstance(value, Tensor) and value.dtype == torch.long and value.dim() == 1:
        return {TENSOR: value.tolist()}
    if isinstance(value, tuple):
        return {TUPLE: _all(_to_json, value)}
    if isinstance(value, list):
        return _all(_to_json, value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"Got {value!r} of type {type(value).__name__}, unknown to JSON. Write .ckpt, or leave it out.")


def _from_json(value: Any) -> Any:
    """Return what `_to_json` was given."""
    if isinstance(value, list):
        return _all(_from_json, value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        return torch.tensor(value[TENSOR], dtype=torch.long)
    if value.keys() == {TUPLE}:
        return tuple(_all(_from_json, value[TUPLE]))
    return {key: _from_json(item) for key, item in value.items()}


def _all(convert: Any, values: Iterable[Any]) -> list[Any]:
    return [convert(value) for value in values]
