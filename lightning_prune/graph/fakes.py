"""Fake tensors, made by the thousand: torch's own constructor takes longer than all else that is done about an op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

__all__ = ["FakeMode"]


class FakeMode(FakeTensorMode):
    """The mode that the fake tensors of one model belong to. Tensors of the model itself may be met beside them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._states: dict[torch.device, dict[str, Any]] = {}

    def like(self, other: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a contiguous fake tensor with the dtype and device of another."""
        return self.make(other.dtype, other.device, shape)

    def make(
        self, dtype: torch.dtype, device: torch.device, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """Return a fake tensor, contiguous where no strides are given."""
        with no_dispatch():  # or the modes that are on would see the making of it
            if stride is None:
                meta = torch.empty(shape, dtype=dtype, device="meta")
            else:
                meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            state = self._states.get(device)
            if state is None:
                first = FakeTensor(self, meta, device)
                self._states[device] = dict(first.__dict__)
                return first
            # what the constructor does, less the checks of what the first one has passed
            device = state["_fake_device"]
            fake = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
            torch._C._set_throw_on_mutable_data_ptr(fake)
            fake.__dict__.update(state)
            return fake
