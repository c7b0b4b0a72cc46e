"""One traced op: its arguments by schema name, the axes of its tensors, and what a rule may do to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_prune.graph.labels import FIXED, Axis, LabelSpace, is_labelled
from lightning_prune.graph.memory import Memory, follow, mark_written, written_dims

__all__ = ["Call", "Rule", "axes_of", "bind_arguments", "copy_unread", "note_read", "set_axes", "tensors_in"]

Rule = Callable[["Call"], None]
_AXES = "_lightning_prune_axes"
_PARAM = "_lightning_prune_param"
_IF_READ = "_lightning_prune_if_read"
_UNKNOWING = "written into a tensor without channels"
_LEAVES = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_signatures: dict[Any, dict[str, Any]] = {}


def axes_of(tensor: Tensor) -> list[Axis]:
    """Return the axes of a traced tensor; a tensor that the trace did not make is `FIXED` throughout."""
    axes = getattr(tensor, _AXES, None)
    if axes is None or len(axes) != tensor.dim():
        return [FIXED] * tensor.dim()
    return list(axes)


def set_axes(tensor: Tensor, axes: Sequence[Axis]) -> None:
    """Attach axes to a traced tensor."""
    assert len(axes) == tensor.dim(), f"{len(axes)} axes for a tensor of {tensor.dim()} axes"
    for size, axis in zip(tensor.shape, axes, strict=True):
        assert not is_labelled(axis) or len(axis) == size, f"{len(axis)} labels for an axis of {size}"
    setattr(tensor, _AXES, list(axes))


def is_weight(tensor: Tensor) -> bool:
    """Return whether the tensor is a parameter or buffer, or made of those alone."""
    return bool(getattr(tensor, _PARAM, False))


def mark_weight(tensor: Tensor) -> None:
    """Note that the tensor is a parameter or buffer, or made of those alone."""
    setattr(tensor, _PARAM, True)


def note_read(tensor: Tensor, space: LabelSpace) -> None:
    """Forbid what the values of a tensor depend on, now that somebody reads them."""
    axis, why = getattr(tensor, _IF_READ, (None, ""))
    space.freeze(axis, why)


def copy_unread(source: Tensor, out: Tensor) -> None:
    """Let a copy depend on what its source depends on."""
    if hasattr(source, _IF_READ):
        setattr(out, _IF_READ, getattr(source, _IF_READ))


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested lists, tuples and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in tree:  # pytree does the same for more kinds of container, at ten times the price
        kind = type(item)
        if kind in _LEAVES:  # nearly all: to ask the classes of tensors and mappings takes longer
            continue
        if kind is FakeTensor or isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, Mapping)):
            found += tensors_in(item)
    return found


def bind_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of an ATen call by its schema name, in schema order, defaults filled in."""
    signature = _signatures.get(func)
    if signature is None:
        arguments = func._schema.arguments
        signature = _signatures[func] = {a.name: a.default_value for a in arguments}  # None where there is none
    return {**signature, **dict(zip(signature, args, strict=False)), **kwargs}


class Call:
    """One ATen call as a rule sees it.

    Args:
        name: Schema name without overload, for example ``"aten::conv2d"``.
        args: Arguments by schema name, defaults filled in.
        out: What the op returned.
        space: Where labels are bound and frozen.
        module_names: `id(module) -> qualified name`, to say where something arose.
        memory: Which tensors share memory.
    """

    def __init__(
        self,
        name: str,
        args: Mapping[str, Any],
        out: Any,
        space: LabelSpace,
        module_names: Mapping[int, str],
        memory: Memory | None = None,
    ) -> None:
        self.name = name
        self.args = args
        self.out = out
        self.space = space
        self.module_names = module_names
        self.costs: list[tuple[tuple[int, Axis], ...]] = []
        self.pins: list[tuple[Tensor, int]] = []
        self.before: tuple[tuple[int, ...], list[Axis]] | None = None
        self.memory = memory or Memory()
        self.inputs = tensors_in(args)  # in schema order
        for tensor in self.inputs:
            note_read(tensor, space)
        if self.memory.differs:
            self.pins += [(t, d) for t in self.inputs for d in written_dims(t) if d < t.dim()]

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.args

    @property
    def outputs(self) -> list[Tensor]:
        """Every tensor the op returned."""
        return tensors_in(self.out)

    def axes(self, tensor: Tensor) -> list[Axis]:
        """Return a copy of the tensor's axes."""
        return axes_of(tensor)

    def shape_before(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of `self` before an in-place op changed it."""
        return self.before[0] if self.before else tuple(tensor.shape)

    def axes_before(self, tensor: Tensor) -> list[Axis]:
        """Return the axes of `self` before an in-place op changed its shape."""
        return list(self.before[1]) if self.before else self.axes(tensor)

    def put(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Set the axes of an output; one that is an argument too was written to, and keeps what else is known of it."""
        if self.before is None and any(tensor is t for t in self.inputs):
            axes = self._written(tensor, axes)
        set_axes(tensor, axes)
        self.memory.watch(tensor, axes)

    def _written(self, tensor: Tensor, axes: Sequence[Axis]) -> list[Axis]:
        """Return the axes of a tensor that was written to, and tell those that share its memory."""
        result = [
            self._overwritten(old, new, size)
            for old, new, size in zip(self.axes(tensor), axes, tensor.shape, strict=True)
        ]
        for other in self.memory.others(tensor):
            known, differs = follow(other, axes_of(other), tensor, result, lambda a: self.freeze(a, _UNKNOWING))
            set_axes(other, known)
            mark_written(other, written_dims(other) | differs)
            self.memory.differs |= bool(differs)
        return result

    def _overwritten(self, old: Axis, new: Axis, size: int) -> Axis:
        if is_labelled(old):
            return self.bind(old, new)
        if old == FIXED or size == 1:
            self.freeze(new, _UNKNOWING)
        return FIXED if old == FIXED else new

    def bind(self, a: Axis, b: Axis) -> Axis:
        """Make two axes of equal length one (see `LabelSpace.bind`)."""
        return self.space.bind(a, b, lambda: f"meets a fixed size in {self.where()}")

    def freeze(self, axis: Axis, why: str = "") -> None:
        """Forbid removal along the axis; the report says `why`, in words, and where."""
        if is_labelled(axis):
            self.space.freeze(axis, f"{why} in {self.where()}" if why else self.where())

    def count(self, *sizes: tuple[int, Axis]) -> None:
        """Add the product of the axis sizes to the multiply-adds of this op."""
        self.costs.append(sizes)

    def pin(self, tensor: Tensor, dim: int) -> None:
        """Demand that an axis keeps its size, since the value depends on its length."""
        self.pins.append((tensor, dim))

    def pin_unlabelled(self, tensor: Tensor, dim: int) -> None:
        """Demand that an axis keeps its size unless its labels say how long it is."""
        if not is_labelled(self.axes(tensor)[dim]):
            self.pin(tensor, dim)

    def hold(self, tensor: Tensor, dim: int, why: str) -> None:
        """Demand that an axis keeps its size, labelled or not: forbid removal, or pin what may follow others."""
        self.freeze(self.axes(tensor)[dim], why)
        self.pin_unlabelled(tensor, dim)

    def hold_if_read(self, out: Tensor, tensor: Tensor, dim: int, why: str) -> None:
        """Demand that an axis keeps its size as soon as an op reads a result, or the model returns it."""
        self.pin_unlabelled(tensor, dim)
        self.freeze_if_read(out, self.axes(tensor)[dim], why)

    def freeze_if_read(self, out: Tensor, axis: Axis, why: str) -> None:
        """Forbid removal along an axis as soon as an op reads a result, or the model returns it.

        Real values may be read without an op: on real tensors it is forbidden at once.
        """
        if isinstance(out, FakeTensor):
            setattr(out, _IF_READ, (axis, f"{why} in {self.where()}"))
        else:
            self.freeze(axis, why)

    def sized(self, tensor: Tensor, *dims: int) -> list[tuple[int, Axis]]:
        """Return `(size, axis)` of the given axes of a tensor, all of them when none is given."""
        axes = self.axes(tensor)
        return [(tensor.shape[d], axes[d]) for d in (dims or range(tensor.dim()))]

    def where(self) -> str:
        """Say which op of which module in which line of which file this is."""
        op = f"`{self.name.removeprefix('aten::')}`"
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            inside_torch = str(frame.f_globals.get("__name__", "")).startswith(("torch.", "lightning_prune.graph"))
            if isinstance(owner, nn.Module) and not inside_torch:
                name = self.module_names.get(id(owner), "") or type(owner).__name__
                return f"{op} of {name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
            frame = frame.f_back  # type: ignore[assignment]
        return op


def normalize_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Return non-negative dims; `None` and `[]` mean all of them."""
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(rank))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [d % max(rank, 1) for d in listed]


def is_floating(tensor: Tensor) -> bool:
    """Return whether the tensor holds real or complex floating numbers."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex
