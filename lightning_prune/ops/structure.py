"""The structure of a pruned model as plain data: dense shapes, kept indices, and the integers that follow.

It holds only dicts, lists, numbers, strings and tensors, so `torch.load(weights_only=True)` reads it. A dynamic model
has its structure in its masks; a model that was made small remembers it in one plain attribute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.mutables import KeptIndices, MutableChannel, MutableChannelContainer
from lightning_prune.ops.attention import settle_
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.caches import empty_caches_, lazy_caches, remember_caches_
from lightning_prune.ops.made import make_again_
from lightning_prune.ops.model import dynamic_ops, static_view
from lightning_prune.ops.slicing import Cut, replace_data_, same_cuts, take_copy
from lightning_prune.ops.state import is_holder, read_from, with_elements

__all__ = [
    "VERSION",
    "fingerprint_of",
    "forget_structure_",
    "named_tensors",
    "remember_structure_",
    "remembered_structure",
    "reshape_",
    "set_masks_",
    "structure_of",
    "target_cuts",
]

VERSION = 1
REMEMBERED = "_pruned_structure"

Structure = dict[str, Any]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield ``qualified name, module, name, tensor`` of the dense tensors; shared ones under every name they have."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield _join(prefix, name), module, name, tensor


# From a model to its structure


def structure_of(
    model: nn.Module, units: Mapping[str, float | int] | None = None, progress: Mapping[str, Any] | None = None
) -> Structure:
    """Return the structure of a model: what is cut of the dense one, now or when it was made small.

    Args:
        model: With dynamic ops, or made small by `compact_`, `export_pruned` or `load_pruned`, or dense.
        units: Choice of each unit by name, to be carried along.
        progress: State of a schedule, to be carried along.

    Returns:
        ``version``; ``tensors``: name -> ``shape`` (dense) and ``kept`` (axis as text -> Int64 indices), for every
        tensor of a dynamic op; ``integers``: module -> attribute -> ``full`` and ``kept``, where they differ;
        ``units``; ``progress``; ``caches``: see `ops.caches`; ``fingerprint`` of the dense parameters.
    """
    found = remembered_structure(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicOp):
            _compose_(found, prefix, _structure_of_op(module))
    _share_indices_(found["tensors"])
    return {
        "version": VERSION,
        **found,
        "units": dict(units or {}),
        "progress": None if progress is None else dict(progress),
        "caches": lazy_caches(model),
        "fingerprint": fingerprint_of(model, found["tensors"]),
    }


def _share_indices_(tensors: Mapping[str, Any]) -> None:
    """Make equal indices one tensor, which a file holds once: all members of a unit keep the same."""
    seen: dict[bytes, Tensor] = {}
    for entry in tensors.values():
        for dim, indices in entry["kept"].items():
            entry["kept"][dim] = seen.setdefault(indices.cpu().numpy().tobytes(), indices)


def remembered_structure(model: nn.Module) -> Structure:
    """Return the ``tensors`` and ``integers`` that were cut when the model, or parts of it, were made small."""
    found: Structure = {"tensors": {}, "integers": {}}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if REMEMBERED in module.__dict__:
            _compose_(found, prefix, module.__dict__[REMEMBERED])
    return found


def _structure_of_op(op: DynamicOp) -> Structure:
    tensors = {}
    held = {**op._buffers, **op._parameters}
    for name in op.tensor_axes:
        full = held.get(name)
        if full is not None:
            kept = {str(dim): indices for dim, indices in enumerate(op.kept_indices_of(name)) if indices is not None}
            tensors[name] = {"shape": list(full.shape), "kept": kept}
    integers = {}
    for attr, live in op.integers.items():
        dense = op._dynamic.dense_integer(op, attr)
        pairs = {attr: (dense, live)}
        if is_holder(dense):  # of a config only the numbers
            keys = [str(element) for element in op._dynamic.follows[attr]]
            pairs = {f"{attr}.{key}": (read_from(dense, key), read_from(live, key)) for key in keys}
        for name, (full, kept) in pairs.items():
            if full != kept:
                integers[name] = {"full": _plain(full), "kept": _plain(kept)}
    return {"tensors": tensors, "integers": {"": integers} if integers else {}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _compose_(found: Structure, prefix: str, later: Structure) -> None:
    """Add a structure whose dense model is what `found` leaves; its names are relative to `prefix`."""
    for name, entry in later["tensors"].items():
        mine = found["tensors"].setdefault(_join(prefix, name), {"shape": list(entry["shape"]), "kept": {}})
        for dim, indices in entry["kept"].items():
            mine["kept"][dim] = mine["kept"][dim][indices] if dim in mine["kept"] else indices
    for name, attrs in later["integers"].items():
        held = found["integers"].setdefault(_join(prefix, name) if name else prefix, {})
        for attr, values in attrs.items():
            full = held[attr]["full"] if attr in held else values["full"]
            held[attr] = {"full": full, "kept": values["kept"]}


def fingerprint_of(model: nn.Module, tensors: Mapping[str, Any] | None = None) -> str:
    """Return a digest of the names and dense shapes of all parameters: equal for the same architecture.

    Args:
        model: Any model; dynamic or small ones give the digest of the dense one.
        tensors: The ``tensors`` of its structure, if it is at hand.
    """
    known = structure_of(model)["tensors"] if tensors is None else tensors
    lines = []
    for name, module, own, tensor in named_tensors(model):
        if own in module._parameters:
            shape = known[name]["shape"] if name in known else list(tensor.shape)
            lines.append(f"{name}:{'x'.join(map(str, shape))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def remember_structure_(model: nn.Module, structure: Structure) -> None:
    """Let a small model remember what was cut of it: as one plain attribute of its root."""
    forget_structure_(model)
    if structure["integers"] or any(entry["kept"] for entry in structure["tensors"].values()):
        model.__dict__[REMEMBERED] = {"tensors": structure["tensors"], "integers": structure["integers"]}
    remember_caches_(model, structure.get("caches", {}))


def forget_structure_(model: nn.Module) -> None:
    """Drop what a model and its parts remember."""
    for module in model.modules():
        module.__dict__.pop(REMEMBERED, None)


# From a structure to a model


def target_cuts(structure: Structure, name: str) -> tuple[Cut, ...]:
    """Return the cuts that lead from the dense tensor `name` to the one of the structure."""
    entry = structure["tensors"].get(name)
    if entry is None:
        return ()
    cuts = []
    for dim, indices in sorted(entry["kept"].items(), key=lambda item: int(item[0])):
        mask = torch.zeros(entry["shape"][int(dim)], dtype=torch.bool)
        mask[indices] = True
        cuts.append(Cut(int(dim), KeptIndices(mask)))
    return tuple(cuts)


def set_masks_(model: nn.Module, structure: Structure) -> None:
    """Give the masks of a dynamic model the values that cut it as in a structure.

    A channel lives if a position of it lives on some axis.

    Args:
        model: With dynamic ops.
        structure: Of the same architecture.

    Raises:
        CheckpointError: The masks cannot cut the tensors like that, because the units are others. Nothing has changed.
    """
    ops = {name: op for name, op in model.named_modules(remove_duplicate=False) if isinstance(op, DynamicOp)}
    base = remembered_structure(model)
    wanted: dict[MutableChannel, Tensor] = {}
    for prefix, op in ops.items():
        for name, axes in op.tensor_axes.items():
            cuts = dict(_relative_cuts(base, structure, _join(prefix, name)))
            for dim, attr in enumerate(axes):
                container = op.mutable_attrs.get(attr or "")
                if container is not None:
                    _add_living(wanted, container, cuts.get(dim))
    before = {mutable: mutable.current_mask for mutable in wanted}
    try:
        _choose(wanted)
        for prefix, op in ops.items():
            for name in op.tensor_axes:
                expected = _relative_cuts(base, structure, _join(prefix, name))
                if not same_cuts(expected, op._dynamic.cuts(op, name)):
                    raise ConfigError(f"{_join(prefix, name)!r} would keep other channels")
    except ConfigError as error:
        _choose(before)
        raise CheckpointError(
            f"Got a structure that the units of this model cannot take: {error}. Were they found with another "
            "`ignore`, or is the file of another model?"
        ) from error
    empty_caches_(model, structure.get("caches", {}))


def _choose(masks: Mapping[MutableChannel, Tensor]) -> None:
    for mutable, mask in masks.items():
        mutable.current_choice = mask


def _relative_cuts(base: Structure, structure: Structure, name: str) -> tuple[Cut, ...]:
    """Return the cuts of a structure as seen from a model that was cut as `base` already."""
    done, cuts = dict(target_cuts(base, name)), []
    for dim, kept in target_cuts(structure, name):
        mask = torch.zeros(kept.full, dtype=torch.bool)
        mask[kept.indices] = True
        mask = mask[done[dim].indices] if dim in done else mask
        if not bool(mask.all()):
            cuts.append(Cut(dim, KeptIndices(mask)))
    return tuple(cuts)


def _add_living(
    wanted: dict[MutableChannel, Tensor], container: MutableChannelContainer, kept: KeptIndices | None
) -> None:
    """Mark the channels that have a living position on this axis."""
    alive = torch.ones(container.num_channels, dtype=torch.bool)
    if kept is not None:
        alive.zero_()[kept.indices] = True
    for span in container.spans:
        channels = torch.arange(span.mutable.num_channels) if span.index is None else span.index
        mask = wanted.setdefault(span.mutable, torch.zeros(span.mutable.num_channels, dtype=torch.bool))
        mask[channels[alive[span.start : span.end]]] = True


def reshape_(model: nn.Module, structure: Structure, loaded: Collection[str] = ()) -> None:
    """Make a model plain, with the tensors and integers of a structure: small, or dense again.

    Entries that remain keep their values. Entries that come back are 0 until they are loaded. Masks of dynamic ops play
    no part.

    Args:
        model: Dense, small and remembering its structure, or dynamic.
        structure: What it shall be; one without kept indices makes it dense.
        loaded: Tensors whose values come from elsewhere anyway.

    Raises:
        CheckpointError: A tensor that is not loaded would have to get entries back; or an integer is not the dense one
            of the structure. Nothing has changed then.
    """
    now = remembered_structure(model)
    resized: dict[int, tuple[Tensor, Tensor]] = {}
    with static_view(model):
        for name, _, _, tensor in named_tensors(model):
            old, new = target_cuts(now, name), target_cuts(structure, name)
            if not same_cuts(old, new):
                resized[id(tensor)] = (tensor, _resized(name, tensor, old, new, name in loaded))
        integers = _integers_for(model, now["integers"], structure["integers"])
    for op in dynamic_ops(model).values():
        op.__class__ = op.__dict__.pop("_dynamic").static
    for tensor, data in resized.values():
        replace_data_(tensor, data)
    for module, attr, value in integers:
        _write(module, attr, value)
    for name, attrs in (*now["integers"].items(), *structure["integers"].items()):
        if attrs.keys() & {"embed_dim", "head_dim", "num_heads"}:
            attention = model.get_submodule(name)
            dense = (attrs.get(a, {}).get("full", attention.__dict__.get(a)) for a in ("num_heads", "head_dim"))
            settle_(attention, *dense)
    for module in model.modules():
        make_again_(module)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants its weights side by side
    remember_structure_(model, structure)
    empty_caches_(model, structure.get("caches", {}))


def _resized(name: str, tensor: Tensor, old: tuple[Cut, ...], new: tuple[Cut, ...], is_loaded: bool) -> Tensor:
    """Return the data of a tensor cut as `old`, cut as `new` instead."""
    data = tensor.detach()
    if not old:
        return take_copy(data, new)
    before, after = dict(old), dict(new)
    for dim in sorted({*before, *after}):
        size = before[dim].full if dim in before else after[dim].full
        kept = before[dim].indices if dim in before else torch.arange(size)
        wanted = after[dim].indices if dim in after else torch.arange(size)
        found = torch.isin(wanted, kept)
        if not bool(found.all()) and not is_loaded:
            raise CheckpointError(
                f"Got a structure in which {name!r} has entries that were removed, and no values for them; expected "
                "its values in the file too. Build the model anew and load into that."
            )
        data_new = data.new_zeros([*data.shape[:dim], len(wanted), *data.shape[dim + 1 :]])
        source = torch.searchsorted(kept, wanted[found]).to(data.device)
        target = found.nonzero().flatten().to(data.device)
        data = data_new.index_copy_(dim, target, data.index_select(dim, source))
    return data


def _read(module: nn.Module | None, attr: str) -> Any:
    """Return an attribute, or with a dotted name what a config in it holds."""
    name, _, key = attr.partition(".")
    held = getattr(module, name, None)
    return read_from(held, key) if key else held


def _write(module: nn.Module, attr: str, value: Any) -> None:
    name, _, key = attr.partition(".")
    module.__dict__[name] = with_elements(module.__dict__[name], {key: value}) if key else value


def _integers_for(
    model: nn.Module, now: Mapping[str, Any], then: Mapping[str, Any]
) -> list[tuple[nn.Module, str, Any]]:
    """Return the integer attributes to set, on the way from one structure to another."""
    modules = dict(model.named_modules(remove_duplicate=False))
    values: dict[tuple[str, str], Any] = {}
    for name, attrs in now.items():
        values.update({(name, attr): pair["full"] for attr, pair in attrs.items()})
    for name, attrs in then.items():
        for attr, pair in attrs.items():
            dense = values.get((name, attr), _plain(_read(modules.get(name), attr)))
            if type(dense) is not type(pair["full"]) or dense != pair["full"]:
                raise CheckpointError(
                    f"Got a structure with {_join(name, attr)} = {pair['full']!r} in the dense model; here it is "
                    f"{dense!r}. The file is of another model."
                )
            values[name, attr] = pair["kept"]
    settings = []
    for (name, attr), value in values.items():
        held = _read(modules[name], attr)
        settings.append((modules[name], attr, type(held)(value) if isinstance(held, list | tuple) else value))
    return settings
