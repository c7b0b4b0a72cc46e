"""A finding of the certificate: where the pruned program is not the dense one, and which axes are wrong there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_prune.graph.event import Event
from lightning_prune.graph.labels import IntArray

__all__ = ["Met", "Mismatch"]

Met = tuple[int | None, IntArray]  # the size an axis has (None: not known), and the labels it should be as long as


class Mismatch(Exception):  # noqa: N818  # a finding that refinement works with, not an error a user sees
    """The pruned program is not the dense one.

    Args:
        reason: What differs, and where.
        step: How many ops agreed.
        event: The dense op, None where the programs differ in length or the model itself failed.
        axes: The axes whose size is not what it should be.
        is_size: A size may be wrong; else the values that an op is given are.

    Attributes:
        mode: Of which run it is: "eval" or "train".
        modules: The modules whose methods were running, innermost first.
        fatal: The run ended here.
    """

    def __init__(
        self, reason: str, step: int, event: Event | None = None, axes: Sequence[Met] = (), is_size: bool = True
    ) -> None:
        super().__init__(reason)
        self.step = step
        self.event = event
        self.axes = tuple(axes)
        self.mode = "eval"
        self.modules: list[nn.Module] = []
        self.fatal = True
        self.is_size = is_size

    @property
    def op(self) -> str:
        """Name of the dense op, "" where there is none."""
        return self.event.name if self.event else ""
