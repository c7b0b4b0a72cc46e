"""What is known of a model of the zoo, and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

IMAGE, LARGER_IMAGE = ((3, 8, 8),), ((3, 12, 10),)
TOKENS, MORE_TOKENS = ((9, 7),), ((11, 7),)  # tokens, features


@dataclass(frozen=True)
class Case:
    """A model of the zoo and what is known of it.

    Args:
        build: Makes the module; `make` seeds it.
        units: Name -> channels of every unit that can lose channels.
        shapes: Shape of each input without its batch.
        larger: The same for a second input size.
        vocabulary: Inputs are token indices below it.
        renormalizing: A unit takes part in a mean or variance over its own channels, so zeroing is not removing.
        pickles: Torch pickles the model; it refuses parametrised ones.
        counted: Torch counts its products; an einsum over axes of one entry is no product to it.
        slim: It exports a layer of ours, that can have fewer heads than `nn.MultiheadAttention`.
    """

    build: Callable[[], nn.Module]
    units: Mapping[str, int]
    shapes: tuple[tuple[int, ...], ...] = field(default=IMAGE)
    larger: tuple[tuple[int, ...], ...] = field(default=LARGER_IMAGE)
    vocabulary: int | None = None
    renormalizing: bool = False
    pickles: bool = True
    counted: bool = True
    slim: bool = False

    def make(self) -> nn.Module:
        """Return a new module; every call gives the same weights, whatever the global seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.build()
        return randomize_norms_(module)

    def inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2."""
        return self._inputs(2, self.shapes)

    def larger_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 3 with more pixels or tokens, where the model allows it."""
        return self._inputs(3, self.larger)

    def _inputs(self, batch: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        if self.vocabulary is not None:
            return tuple(torch.randint(self.vocabulary, (batch, *shape), generator=generator) for shape in shapes)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def randomize_norms_(module: nn.Module) -> nn.Module:
    """Give every norm a bias and statistics that are not 0 and 1: a zeroed channel must not pass for a removed one."""
    generator = torch.Generator().manual_seed(2)
    for layer in module.modules():
        if "Norm" not in type(layer).__name__:
            continue
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                low, high = (-1.0, 1.0) if name in ("bias", "running_mean") else (0.5, 1.5)
                with torch.no_grad():
                    tensor.uniform_(low, high, generator=generator)
    return module
