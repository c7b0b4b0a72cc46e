"""Read what is in a file, as plain data, and distrust it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from lightning_prune.checkpoint.archive import check_archive, is_archive, objects_in
from lightning_prune.checkpoint.check import Structure, check_structure
from lightning_prune.checkpoint.hooks import KEY
from lightning_prune.checkpoint.safetensors import is_safetensors, read_safetensors
from lightning_prune.errors import CheckpointError

__all__ = ["Content", "File", "folder_words", "name_of", "read_file"]

File = str | os.PathLike[str] | IO[bytes]


@dataclass(frozen=True)
class Content:
    """What is in a file.

    Args:
        checkpoint: All of it; a bare state dict is its own.
    """

    checkpoint: dict[str, Any]

    @property
    def state_dict(self) -> dict[str, Any]:
        """Name -> tensor.

        Raises:
            CheckpointError: It is none.
        """
        state: Any = self.checkpoint.get("state_dict", self.checkpoint)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise CheckpointError("its state_dict is no mapping of names; it is damaged")
        return state

    @property
    def metadata(self) -> dict[str, dict[str, Any]]:
        """What torch keeps beside a state dict: module -> its version, and ours."""
        metadata = getattr(self.state_dict, "_metadata", {})
        entries = metadata.items() if isinstance(metadata, Mapping) else ()
        return {name: dict(entry) for name, entry in entries if isinstance(name, str) and isinstance(entry, Mapping)}

    @property
    def structure(self) -> Structure | None:
        """The structure, checked and on the CPU; None if the file has none.

        Raises:
            CheckpointError: It is damaged, or newer than this library.
        """
        found = self.checkpoint.get(KEY, self.metadata.get("", {}).get(KEY))
        return None if found is None else on_cpu(check_structure(found))

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Arguments that the model was made with, as far as they were saved."""
        saved = self.checkpoint.get("hyper_parameters")
        return {str(name): value for name, value in saved.items()} if isinstance(saved, Mapping) else {}


def name_of(path: File) -> str:
    """Return how to call a file in a message."""
    return os.fspath(path) if isinstance(path, str | os.PathLike) else str(getattr(path, "name", "the given file"))


def folder_words(path: Any) -> str:
    """Return why a path that is a folder cannot be read, and how it can; empty for anything else."""
    if not isinstance(path, str | os.PathLike) or not Path(path).is_dir():
        return ""
    if not (Path(path) / ".metadata").is_file():
        return "it is a folder; expected a file"
    return (
        "it is a folder, the distributed checkpoint of a strategy that shards, whose index is a pickle that could run "
        "anything. If you trust whoever wrote it, make one file of it: `python -m "
        f"lightning.fabric.utilities.consolidate_checkpoint {os.fspath(path)}` (of FSDPStrategy: "
        "lightning.pytorch.utilities.consolidate_checkpoint); or save with save_distributed_checkpoint=False"
    )


def read_file(path: File, map_location: Any = "cpu", *, weights_only: bool = True) -> Content:
    """Return the content of a file; nothing in it is executed unless the caller trusts it.

    Args:
        path: Of a checkpoint of Lightning, a dict with ``state_dict``, a saved state dict, or ``.safetensors``; or a
            binary file that is open.
        map_location: As in `torch.load`.
        weights_only: False lets `torch.load` build any Python object of a file that you trust.

    Raises:
        CheckpointError: It cannot be read as plain data, does not match its checksums, is no dict, or a folder.
        OSError: There is no such file, or it may not be read.
    """
    try:
        if words := folder_words(path):
            raise CheckpointError(words)
        if is_safetensors(path):
            checkpoint: Any = read_safetensors(path, map_location)  # type: ignore[arg-type]  # a path, then
        elif isinstance(path, str | os.PathLike):
            with Path(path).open("rb") as file:
                checkpoint = _read(file, map_location, weights_only)
        else:
            checkpoint = _read(path, map_location, weights_only)
        if not isinstance(checkpoint, dict):
            raise CheckpointError(f"it holds {type(checkpoint).__name__}; expected a checkpoint or a state dict")
    except CheckpointError as error:
        raise CheckpointError(f"Got {name_of(path)}, which cannot be read: {error}.") from error
    return Content(checkpoint)


def _read(file: IO[bytes], map_location: Any, weights_only: bool) -> Any:
    if is_archive(file):
        check_archive(file)
    try:
        return torch.load(file, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        objects = objects_in(file)
        raise CheckpointError(
            f"it holds Python objects: {objects}; expected only tensors and plain data. Save hyperparameters as "
            "numbers, strings, lists and dicts, or leave them out: save_hyperparameters(ignore=[...]). If you trust "
            "whoever wrote the file, load_pruned(..., weights_only=False) builds them"
            if objects
            else "it is damaged or no file of torch.save"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"it is truncated or damaged: {str(error) or type(error).__name__}") from error


def on_cpu(structure: Structure) -> Structure:
    """Return a structure whose indices are on the CPU, wherever the weights went."""
    tensors = {
        name: {**entry, "kept": {dim: kept.cpu() for dim, kept in entry["kept"].items()}}
        for name, entry in structure["tensors"].items()
    }
    return {**structure, "tensors": tensors}
