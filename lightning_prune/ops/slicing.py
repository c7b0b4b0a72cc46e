"""Take the kept entries out of a tensor, write them back, and shrink a tensor in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.mutables import KeptIndices

__all__ = [
    "Cut",
    "find_places",
    "is_full",
    "is_kept",
    "is_prefix",
    "put_",
    "replace_data_",
    "same_cuts",
    "shrink_",
    "take",
    "take_copy",
]


class Cut(NamedTuple):
    """One axis of a tensor that loses positions.

    Args:
        dim: The axis.
        kept: What remains of it.
    """

    dim: int
    kept: KeptIndices


SMALL = 2**16
"""Up to so many entries the number of calls, not of entries, decides what a cut costs."""


def take(full: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Return the kept entries of `full`; gradients flow back to `full`, zero where it was cut.

    A prefix of the first axis is a view; everything else is a copy in the memory format of `full`, because kernels
    round the same way only on the same layout.

    Args:
        full: Tensor of the dense size, any device.
        cuts: The axes to cut; none returns `full` itself.

    Returns:
        Tensor of the kept size.

    Raises:
        ConfigError: `full` has another size than the cuts were made for.

    Example:
        >>> first_and_last = Cut(1, KeptIndices(torch.tensor([True, False, True])))
        >>> take(torch.tensor([[1, 2, 3], [4, 5, 6]]), [first_and_last])
        tensor([[1, 3],
                [4, 6]])
    """
    part = full
    for dim, kept in cuts:
        if part.shape[dim] != kept.full:
            raise ConfigError(
                f"Got a tensor {list(full.shape)} whose axis {dim} is {part.shape[dim]} long; expected the dense "
                f"{kept.full}. Replace tensors of a dynamic op by tensors of the dense or of the kept size only."
            )
        if kept.start is None:
            part = part.index_select(dim, kept.on(part.device))
        else:
            part = part.narrow(dim, kept.start, kept.count)
            if kept.start or dim:
                part = part.clone(memory_format=torch.contiguous_format)
    if not full.is_contiguous():
        part = part.contiguous(memory_format=_memory_format(full))
    return part


def find_places(full: Tensor, cuts: Sequence[Cut]) -> Tensor | None:
    """Return where the kept entries of a small tensor lie in its flat form, so that one `Tensor.take` gathers them.

    Of a step of a small network, one gather for each axis and, above all, one scatter for each in the backward are a
    noticeable part. A large tensor is quicker by whole rows, and its places would take twice its memory.

    Args:
        full: Contiguous tensor of the dense size.
        cuts: The axes to cut.

    Returns:
        Int64 of the kept size on the CPU; None if `full` has more than `SMALL` entries.

    Raises:
        ConfigError: `full` has another size than the cuts were made for.

    Example:
        >>> first_and_last = KeptIndices(torch.tensor([True, False, True]))
        >>> find_places(torch.zeros(3, 3), [Cut(0, first_and_last), Cut(1, first_and_last)])
        tensor([[0, 2],
                [6, 8]])
    """
    if full.numel() > SMALL:
        return None
    with torch.inference_mode(False):  # as for the kept indices: a backward may need to save them
        return take(torch.arange(full.numel()).view(full.shape), cuts)


def is_prefix(full: Tensor, cuts: Sequence[Cut]) -> bool:
    """Whether `take` returns a view, so that writes to the part reach `full` by themselves."""
    return len(cuts) == 1 and cuts[0].dim == 0 and cuts[0].kept.start == 0 and full.is_contiguous()


def _memory_format(full: Tensor) -> torch.memory_format:
    """Return the channels-last format `full` is laid out in, else the plain one."""
    by_rank = {4: torch.channels_last, 5: torch.channels_last_3d}
    candidate = by_rank.get(full.dim(), torch.contiguous_format)
    return candidate if full.is_contiguous(memory_format=candidate) else torch.contiguous_format


def put_(full: Tensor, part: Tensor, cuts: Sequence[Cut]) -> None:
    """Write `part` into the kept entries of `full`; the removed entries stay as they are.

    Args:
        full: Tensor of the dense size.
        part: Tensor of the kept size, cast to the type and device of `full`.
        cuts: The axes that are cut.
    """
    if part.device != full.device or part.dtype != full.dtype:
        part = part.to(device=full.device, dtype=full.dtype)
    if full.requires_grad:
        with torch.no_grad():
            _put_(full, part, cuts)
    else:
        _put_(full, part, cuts)


def _put_(full: Tensor, part: Tensor, cuts: Sequence[Cut]) -> None:
    if not cuts:
        full.copy_(part)
        return
    (dim, kept), rest = cuts[0], cuts[1:]
    index = kept.on(full.device)
    if rest:
        rows = full.index_select(dim, index)
        _put_(rows, part, rest)
        part = rows
    full.index_copy_(dim, index, part)


def is_full(tensor: Tensor, cuts: Sequence[Cut]) -> bool:
    """Whether `tensor` still has the dense length on every cut axis."""
    return all(tensor.dim() > dim and tensor.shape[dim] == kept.full for dim, kept in cuts)


def is_kept(tensor: Tensor, cuts: Sequence[Cut]) -> bool:
    """Whether `tensor` has the kept length on every cut axis."""
    return all(tensor.dim() > dim and tensor.shape[dim] == kept.count for dim, kept in cuts)


def same_cuts(first: Sequence[Cut], second: Sequence[Cut]) -> bool:
    """Whether two sequences of cuts keep the same entries."""
    return len(first) == len(second) and all(
        a.dim == b.dim and (a.kept is b.kept or torch.equal(a.kept.indices, b.kept.indices))
        for a, b in zip(first, second, strict=True)
    )


def replace_data_(tensor: Tensor, new: Tensor) -> None:
    """Give `tensor` the data, and the shape, of `new`; the object, its hooks and its ties stay.

    The node that accumulates gradients caches a shape, and forgets it only on a change of type or device; so the data
    passes through an empty tensor of another type. The gradient is dropped, because its shape no longer fits.

    Args:
        tensor: A parameter or a buffer.
        new: Its data from now on, of the same type and device.
    """
    tensor.grad = None
    other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
    if tensor.is_floating_point():
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = new


def shrink_(tensor: Tensor, cuts: Sequence[Cut]) -> None:
    """Cut `tensor` in place, its gradient too; a tensor that has the kept size already (a tied one) is left.

    Args:
        tensor: A parameter or a buffer.
        cuts: The axes to cut.

    Raises:
        ConfigError: The tensor has neither the dense nor the kept size.
    """
    if not cuts or (not is_full(tensor, cuts) and is_kept(tensor, cuts)):
        return
    with torch.no_grad():
        grad = None if tensor.grad is None else take_copy(tensor.grad, cuts)
        part = take_copy(tensor.detach(), cuts)
        replace_data_(tensor, part)
        if grad is not None:
            tensor.grad = grad


def take_copy(full: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Return the kept entries in memory of their own: a view would keep, and save, all of `full`."""
    part = take(full, cuts)
    return part.clone() if part is full or is_prefix(full, cuts) else part
