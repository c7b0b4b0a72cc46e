"""Numbers that a model keeps in tensors of no axes: `q / torch.sqrt(torch.tensor(q.size(-1)))`.

What is made of a size is another number in the pruned program. It is followed from op to op, to where it meets a tensor
that is not such a number: there it may only be the scale of an attention (see `scales`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_prune.graph.event import Event

__all__ = ["Numbers", "number_of"]

Pair = tuple[float, float]  # in the pruned program, in the dense one


def number_of(tensor: Tensor) -> float | None:
    """Return the value of a tensor without axes, None where it is not known or the tensor has axes."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    if known is None or known.dim() or known.is_meta or known.is_quantized or known.layout != torch.strided:
        return None
    with _disable_current_modes():
        value = known.item()
    return float(value) if isinstance(value, Real) and not math.isnan(value) else None


class Numbers:
    """Knows which values of a pruned run are other numbers than in the dense run.

    Args:
        followed: Whether numbers may differ; not on real tensors, where any may be an activation.
    """

    def __init__(self, followed: bool) -> None:
        self._followed = followed
        self._differ: dict[Any, Pair] = {}

    def given(self, inputs: Sequence[Any], event: Event) -> dict[int, Pair] | None:
        """Return `position -> the two numbers` of the tensors that an op is given; None where others differ.

        Args:
            inputs: Which values the op is given in the pruned run.
            event: The dense op.
        """
        if inputs == event.inputs and not self._differ:
            return {}
        if len(inputs) != len(event.inputs) or not self._followed:
            return None
        found: dict[int, Pair] = {}
        for k, (now, dense) in enumerate(zip(inputs, event.inputs, strict=True)):
            if now != dense:
                if not (_is_number(now) and _is_number(dense)):
                    return None
                found[k] = now[1], dense[1]
            elif now in self._differ:
                found[k] = self._differ[now]
        return found

    def follow(self, step: int, event: Event, out: Any) -> bool:
        """Note that the result of an op is another number; return whether it is one in both runs."""
        if not event.out_axes:
            return True  # Python's: it is compared where an op is given it
        now = number_of(out) if isinstance(out, Tensor) else None
        if now is None or event.number is None:
            return False
        self._differ[step, 0] = now, event.number
        return True

    def holds(self, value: Any) -> bool:
        """Return whether a value is another number than in the dense run."""
        return value in self._differ


def _is_number(value: Any) -> bool:
    return isinstance(value, tuple) and value[0] == "constant" and isinstance(value[1], float)
