"""What cannot be pruned, and why: axes that keep positions whatever goes, and factors of axes that do not go alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_prune.graph.channel_graph import FrozenAxis
from lightning_prune.graph.closure import Closure, Strand
from lightning_prune.graph.labels import IntArray, is_labelled
from lightning_prune.graph.trace import DenseTrace

__all__ = ["find_frozen"]

_ONE = "all of its channels are one: none can go alone"
_ROLES = {"heads": "heads", "head_dim": "channels of each head", "groups": "groups"}


def find_frozen(
    trace: DenseTrace, closure: Closure, reasons: Sequence[str], owner: IntArray, parameters: frozenset[str]
) -> tuple[FrozenAxis, ...]:
    """List every axis of a parameter that keeps some positions whatever is pruned, with the main reason.

    An axis of heads, or of groups, whose other factor can be pruned is listed for the factor that cannot.

    Args:
        trace: The dense trace.
        closure: Its classes.
        reasons: Why, by the number that the closure keeps.
        owner: Per class, the number of its unit, -1 for none.
        parameters: Names of the tensors that are parameters.
    """
    factors = _stuck_factors(trace, closure, reasons)
    own = [(name, dim, a) for name, axes in trace.axes.items() if name in parameters for dim, a in enumerate(axes)]
    said: dict[Strand, list[tuple[int, str]]] = {}
    for strand in closure.strands(axis for _, _, axis in own):
        stuck = np.ones(len(strand.classes), np.bool_)
        stuck[strand.positions[owner[strand.living] >= 0]] = False
        told = said[strand] = []
        if stuck.any():
            text = _why(closure, reasons, strand.classes[stuck])
            if not text.startswith("a spatial axis"):  # kernel sizes: nobody expects those to go
                told.append((int(stuck.sum()), text))
        if not stuck.all():
            told += [(len(stuck), text) for text in _said_of(strand.classes, factors)]
    return tuple(
        FrozenAxis(name, dim, size, text)
        for name, dim, axis in own
        if is_labelled(axis)
        for size, text in said[closure.along(axis)]
    )


def _why(closure: Closure, reasons: Sequence[str], classes: IntArray) -> str:
    """Return the most common reason of frozen classes."""
    main = Counter(closure.reason[classes].tolist()).most_common(1)[0][0]
    return reasons[main] if main >= 0 else _ONE


def _stuck_factors(trace: DenseTrace, closure: Closure, reasons: Sequence[str]) -> dict[bytes, list[str]]:
    """Return classes of a grid -> what is to be said of its heads, their channels, or groups that cannot go."""
    found: dict[bytes, dict[str, None]] = {}
    for role, word in _ROLES.items():
        marked = np.zeros(closure.count, np.bool_)
        for labels in trace.space.marks.get(role, ()):
            marked[closure.classes[labels]] = True
        for product in closure.products:
            for axis in product.axes:
                classes = closure.classes[axis]
                alone = closure.frozen[classes].all() or (classes == classes[0]).all()
                if len(axis) > 1 and alone and marked[classes].all():
                    said = f"its {len(axis)} {word}: {_why(closure, reasons, classes)}"
                    found.setdefault(closure.classes[product.flat].tobytes(), {})[said] = None
    return {key: list(said) for key, said in found.items()}


def _said_of(classes: IntArray, factors: dict[bytes, list[str]]) -> Iterator[str]:
    """Yield what is to be said of an axis: it is a grid, or equal parts of it are."""
    if factors:
        width = classes.itemsize
        lengths = sorted({len(key) // width for key in factors})
        parts = (
            classes[start : start + length].tobytes()
            for length in lengths
            if len(classes) % length == 0
            for start in range(0, len(classes), length)
        )
        yield from dict.fromkeys(said for part in parts for said in factors.get(part, ()))
