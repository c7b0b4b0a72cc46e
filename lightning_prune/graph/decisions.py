"""Choices that a model makes by the values of activations: which tokens an expert gets, where a mask holds.

A pruned model has other activations, so that it may choose otherwise, as the dense one does on another input. What is
certified is that it runs the dense program where it chooses alike: on real tensors, it is given the dense choice. But
not where the choice may count channels: then a number that is worked out from it is another one in earnest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_prune.graph.call import tensors_in
from lightning_prune.graph.labels import Axis, is_labelled

if TYPE_CHECKING:
    from lightning_prune.graph.trace import Event

__all__ = ["Decisions", "choice_of", "note_choices"]

_FILLS = ("ones_like", "zeros_like", "full_like", "fill", "fill_", "new_ones", "new_zeros", "new_full")


def choice_of(name: str, args: Mapping[str, Any], out: Any) -> tuple[Tensor, ...]:
    """Return copies of the places that an op found on real tensors; nothing for any other op.

    Args:
        name: Schema name.
        args: Arguments by schema name.
        out: What it returned.
    """
    finds = name == "aten::nonzero" or (name == "aten::where" and "self" not in args)
    return tuple(t.detach().clone() for t in tensors_in(out)) if finds else ()


def note_choices(programs: Iterable[Sequence[Event]]) -> list[str]:
    """Return what a person should know of models that make such choices.

    Args:
        programs: The dense logs.
    """
    chooses = any(event.chosen for events in programs for event in events)
    return ["the model finds places by values: costs are those of what it finds in the example input"] * chooses


class Decisions:
    """Follows one pruned run on real tensors, and hands it the choices of the dense run.

    Args:
        is_cut: Whether an axis of a given length loses channels.
    """

    def __init__(self, is_cut: Callable[[Axis, int], bool]) -> None:
        self._is_cut = is_cut
        self._counts: set[int] = set()  # ops whose results may say how many channels there are
        self._whole: set[int] = set()  # ops whose results are whole numbers, truths or constants, or made of such alone

    def follow(self, event: Event, step: int, out: Any) -> Any:
        """Note what an op depends on; return its result, or the dense choice.

        Args:
            event: The dense op.
            step: Its number.
            out: What the op returned in the pruned run.
        """
        sources = [value[0] for value in event.inputs if isinstance(value, tuple)]  # else a name: data
        made = len(sources) == len(event.inputs) and all(s == "constant" or s in self._whole for s in sources)
        whole = not all(dtype.is_floating_point for dtype, _ in event.out_kinds)
        if self._counts.intersection(sources) or ((made or whole) and self._sums(event)):
            self._counts.add(step)
        if made or whole or event.name.removeprefix("aten::") in _FILLS:
            self._whole.add(step)
        if not event.chosen or step in self._counts:
            return out
        found = [t.clone() for t in event.chosen]
        return found[0] if event.container is None else event.container(found)

    def _sums(self, event: Event) -> bool:
        """Return whether an axis that loses channels does not reach the results."""
        left = {id(axis) for axes in event.out_axes for axis in axes}
        return any(
            is_labelled(axis) and id(axis) not in left and self._is_cut(axis, size)
            for axes, shape in zip(event.in_axes, event.in_shapes, strict=True)
            for axis, size in zip(axes, shape, strict=True)
        )
