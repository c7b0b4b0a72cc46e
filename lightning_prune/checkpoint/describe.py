"""What is in a checkpoint, told without the class of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from lightning_prune.checkpoint.read import Content, File, name_of, read_file
from lightning_prune.errors import CheckpointError

__all__ = ["Description", "describe", "description_of"]

ROWS = 40  # of a table in print; `to_dict` has all


@dataclass(frozen=True)
class TensorLine:
    """One tensor of a file.

    Args:
        dense: Its shape in the dense model.
        kept: Its shape in the small model.
        stored: Its shape in the file: one of both.
        dtype: Such as "float32".
    """

    dense: tuple[int, ...]
    kept: tuple[int, ...]
    stored: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Description:
    """What is in a checkpoint; printing it gives tables.

    Args:
        name: Of the file.
        kind: What wrote it.
        version: Of the structure; None if there is none.
        fingerprint: Digest of the dense architecture.
        tensors: Name -> shapes.
        entries: Numbers in the tensors of the state dict, tied ones once: "dense", "kept" and "stored".
        units: Unit name -> how many channels remain, where a callback wrote it.
        progress: Of the schedule, where a callback wrote it.
        integers: ``module.attribute`` -> dense and kept value.
        hyper_parameters: Name -> value.
        training: Epoch and step of a checkpoint of Lightning.
    """

    name: str
    kind: str
    version: int | None
    fingerprint: str | None
    tensors: dict[str, TensorLine]
    entries: dict[str, int]
    units: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    integers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    training: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; hyperparameters as text where JSON has no such type."""
        tensors = {name: {**vars(line), "is_cut": line.dense != line.kept} for name, line in self.tensors.items()}
        plain = (bool, int, float, str, type(None))
        told = {name: v if isinstance(v, plain) else repr(v) for name, v in self.hyper_parameters.items()}
        return {**vars(self), "tensors": tensors, "hyper_parameters": told}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.kind}" + "".join(f", {name} {value}" for name, value in self.training.items())
        known = f"version {self.version}, fingerprint {self.fingerprint}" if self.version is not None else "none"
        yield f"structure: {known}"
        dense, kept, stored = (self.entries[name] for name in ("dense", "kept", "stored"))
        form = "full-sized, loads small" if stored > kept else "small" if kept < dense else "dense"
        yield f"entries of tensors: {dense:,} -> {kept:,} ({kept / max(dense, 1):.1%}), stored {form}"
        if self.progress:
            yield "schedule: " + ", ".join(f"{name} {value}" for name, value in self.progress.items())
        yield from _rows("hyperparameters", {name: f"{value!r:.80}" for name, value in self.hyper_parameters.items()})
        yield from _rows("channels that remain of units", self.units)
        cut = {n: f"{list(t.dense)} -> {list(t.kept)}" for n, t in self.tensors.items() if t.dense != t.kept}
        yield from _rows(f"tensors that are cut ({len(cut)} of {len(self.tensors)})", cut)
        yield from _rows("integers that follow", {n: f"{full} -> {now}" for n, (full, now) in self.integers.items()})


def describe(path: File) -> Description:
    """Print what is in a checkpoint, and return it; the class of the model is not needed, nothing in it is executed.

    Args:
        path: As of `load_pruned`.

    Returns:
        What was printed, as data.

    Raises:
        CheckpointError: The file cannot be read as plain data, or is damaged.
        OSError: There is no such file.
    """
    found = description_of(path)
    print(found)
    return found


def description_of(path: File) -> Description:
    """Return what `describe` prints."""
    content, name = read_file(path), name_of(path)
    try:
        return _described(content, name)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _described(content: Content, name: str) -> Description:
    structure = content.structure
    known = structure or {"tensors": {}, "integers": {}}
    tensors, entries = {}, dict.fromkeys(("dense", "kept", "stored"), 0)
    counted = set()
    for key, tensor in content.state_dict.items():
        if not isinstance(tensor, Tensor):
            continue
        dense = list(known["tensors"][key]["shape"] if key in known["tensors"] else tensor.shape)
        kept = _shape_kept(dense, known["tensors"].get(key))
        if list(tensor.shape) not in (dense, kept):
            raise CheckpointError(
                f"Got {list(tensor.shape)} for tensor {key!r}; expected {dense}, or pruned {kept}. It is damaged."
            )
        shapes = {"dense": tuple(dense), "kept": tuple(kept), "stored": tuple(tensor.shape)}
        tensors[key] = TensorLine(**shapes, dtype=str(tensor.dtype).removeprefix("torch."))
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else key
        if place not in counted:
            counted.add(place)
            entries = {form: count + prod(shapes[form]) for form, count in entries.items()}
    checkpoint = content.checkpoint
    is_whole = "pytorch-lightning_version" in checkpoint
    return Description(
        name=name,
        kind="a checkpoint of Lightning" if is_whole else "a checkpoint" if "state_dict" in checkpoint else "tensors",
        version=None if structure is None else structure["version"],
        fingerprint=None if structure is None else str(known.get("fingerprint")),
        tensors=tensors,
        entries=entries,
        units=_plain(known.get("units")),
        progress=_plain(known.get("progress")),
        integers={
            f"{module}.{attr}".lstrip("."): (pair["full"], pair["kept"])
            for module, attrs in known["integers"].items()
            for attr, pair in attrs.items()
        },
        hyper_parameters={n: v for n, v in content.hyper_parameters.items() if not n.startswith("_")},
        training={n: v for n in ("epoch", "global_step") if isinstance(v := checkpoint.get(n), int)},
    )


def _shape_kept(dense: list[int], entry: Mapping[str, Any] | None) -> list[int]:
    """Return the shape that a structure leaves; from the number of indices alone, whatever sizes a file claims."""
    kept = {} if entry is None else entry["kept"]
    return [len(kept[str(dim)]) if str(dim) in kept else size for dim, size in enumerate(dense)]


def _plain(value: object) -> dict[str, Any]:
    return {str(name): item for name, item in value.items()} if isinstance(value, Mapping) else {}


def _rows(title: str, rows: Mapping[str, object]) -> Iterator[str]:
    if rows:
        yield f"{title}:"
        width = max(len(name) for name in list(rows)[:ROWS])
        yield from (f"  {name:<{width}}  {value}" for name, value in list(rows.items())[:ROWS])
    if len(rows) > ROWS:
        yield f"  ... and {len(rows) - ROWS} more"
