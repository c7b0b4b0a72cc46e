"""Memory read in steps: windows over some axes of a tensor leave its other axes as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import FIXED, Axis, is_labelled
from lightning_prune.graph.rules.table import rule

Steps = list[list[int]]  # for each axis of the result, how far it goes along each axis of the tensor


def _is_identity(args: Mapping[str, Any]) -> bool:
    x, offset = args["self"], args["storage_offset"]
    return bool(
        tuple(args["size"]) == x.shape and tuple(args["stride"]) == x.stride() and offset in (None, x.storage_offset())
    )


def _find_steps(args: Mapping[str, Any]) -> Steps | None:
    """Return the strides in steps along the axes of a tensor; None where these do not say what is read."""
    x, size, stride = args["self"], args["size"], args["stride"]
    # a fake tensor that was moved counts as contiguous, whatever the real one is
    if isinstance(x, FakeTensor) or args["storage_offset"] not in (None, x.storage_offset()) or 0 in size:
        return None
    last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    return [_along(s, x) for s in stride] if _is_dense(x) and last < x.numel() else None


def _outer_first(x: Tensor) -> list[int]:
    """Return the axes of more than one entry in the order in which they lie in memory."""
    return sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=x.stride, reverse=True)


def _is_dense(x: Tensor) -> bool:
    """Return whether a tensor fills its memory, in whatever order of its axes."""
    blocks = [1]
    for d in reversed(_outer_first(x)):
        if x.stride(d) != blocks[-1]:
            return False
        blocks.append(blocks[-1] * x.shape[d])
    return True


def _along(stride: int, x: Tensor) -> list[int]:
    steps = [0] * x.dim()
    for d in _outer_first(x):
        steps[d], stride = divmod(stride, x.stride(d))
    return steps


def _carriers(args: Mapping[str, Any], steps: Steps) -> dict[int, int]:
    """Return `axis of the tensor -> axis of the result` of those that are left as they are."""
    x: Tensor = args["self"]
    order, sizes = _outer_first(x), list(zip(args["size"], steps, strict=True))
    found = {}
    for place, d in enumerate(order):
        along = [k for k, step in enumerate(steps) if step[d]]
        alone = len(along) == 1 and steps[along[0]] == [int(j == d) for j in range(x.dim())]
        # the axes inside it may not reach over into its next entry
        inside = sum((n - 1) * step[j] * x.stride(j) for n, step in sizes for j in order[place + 1 :])
        if alone and args["size"][along[0]] == x.shape[d] and inside < x.stride(d):
            found[d] = along[0]
    return found


def _taken(args: Mapping[str, Any], axes: Sequence[Axis]) -> Any:
    """Return what is read, with names for the sizes of axes that are left as they are."""
    steps = _find_steps(args)
    if steps is None:
        return _is_identity(args)
    left = {k: d for d, k in _carriers(args, steps).items() if is_labelled(axes[d]) or axes[d] != FIXED}
    return steps, [("axis", left[k]) if k in left else size for k, size in enumerate(args["size"])]


@rule("as_strided", sizes=("size", "stride", "storage_offset"), stays=_taken)
def restride(call: Call) -> None:
    """Windows over axes that may not change; the others stay, if every step goes along one of them, or past them."""
    x = call["self"]
    axes = call.axes(x)
    steps = _find_steps(call.args)
    if steps is None and _is_identity(call.args):
        call.put(call.out, axes)
        return
    left = {} if steps is None else _carriers(call.args, steps)
    for d in set(range(x.dim())) - left.keys():
        call.hold(x, d, "read in steps of memory")
    found = {k: axes[d] for d, k in left.items()}
    call.put(call.out, [found.get(k, FIXED) for k in range(call.out.dim())])
