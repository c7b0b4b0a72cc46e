"""A span of one axis of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.ops import DynamicOp

__all__ = ["Channel"]


@dataclass(eq=False)
class Channel:
    """A span of one axis of one layer, as a member of a unit.

    Args:
        name: Qualified name of the layer.
        module: The layer.
        tensor: Name of the parameter or buffer of the layer that has the axis.
        dim: The axis.
        start: First position of the span, inclusive.
        end: Last position of the span, exclusive.
        is_output_channel: Whether the layer makes the channels (else it reads them).
        index: Int64 `[end - start]`, position -> channel of the unit; None is the identity.
    """

    name: str
    module: nn.Module
    tensor: str
    dim: int
    start: int
    end: int
    is_output_channel: bool
    index: Tensor | None = None

    @property
    def num_channels(self) -> int:
        """Positions in the span."""
        return self.end - self.start

    def full(self) -> Tensor:
        """Return the tensor of the dense size, removed entries included; detached, and not a copy.

        Raises:
            ConfigError: The layer has no such tensor.
        """
        if isinstance(self.module, DynamicOp):
            self.module._dynamic.collect_all()
        for held in (self.module._parameters, self.module._buffers):
            found = held.get(self.tensor)
            if found is not None:
                return found.detach()
        valid = [*self.module._parameters, *self.module._buffers]
        raise ConfigError(f"Got tensor {self.tensor!r} of layer {self.name!r}. {did_you_mean(self.tensor, valid)}")

    def per_channel(self, values: Tensor, num_channels: int) -> Tensor:
        """Sum values of the positions of the span into values of the channels of the unit.

        Args:
            values: `[end - start]`.
            num_channels: C of the unit.

        Returns:
            `[C]`; a channel that no position maps to has 0.
        """
        if self.index is None:
            return values
        return values.new_zeros(num_channels).index_add_(0, self.index.to(values.device), values)

    def to_dict(self) -> dict[str, Any]:
        """Return the span as plain data; `index` only when it is not the identity."""
        plain: dict[str, Any] = {
            "name": self.name,
            "tensor": self.tensor,
            "dim": self.dim,
            "start": self.start,
            "end": self.end,
            "is_output_channel": self.is_output_channel,
        }
        if self.index is not None:
            plain["index"] = self.index.tolist()
        return plain
