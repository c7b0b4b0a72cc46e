"""Random generators: every run of a model draws the same numbers, and leaves the generators where they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

__all__ = ["Generator", "drawing_alike", "global_generators", "own_generators"]


@dataclass(frozen=True)
class Generator:
    """A random generator: how to seed it, and how to put it back to where it was."""

    seed: Callable[[int], Any]
    restore: Callable[[], Any]


def global_generators() -> Iterator[Generator]:
    """Yield the generators of Python, NumPy and torch."""
    yield Generator(random.seed, partial(random.setstate, random.getstate()))
    yield Generator(np.random.seed, partial(np.random.set_state, np.random.get_state()))
    yield Generator(torch.default_generator.manual_seed, partial(torch.set_rng_state, torch.get_rng_state()))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        yield Generator(torch.cuda.manual_seed_all, partial(torch.cuda.set_rng_state_all, states))


def own_generators(objects: Iterable[Any]) -> Iterator[Generator]:
    """Yield the generators among objects that modules keep for themselves."""
    for value in objects:
        if isinstance(value, random.Random):
            yield Generator(value.seed, partial(value.setstate, value.getstate()))
        elif isinstance(value, torch.Generator):
            yield Generator(value.manual_seed, partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.RandomState):
            yield Generator(value.seed, partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            yield Generator(partial(_seed_bits, bits), partial(setattr, bits, "state", bits.state))


def _seed_bits(bits: Any, seed: int) -> None:
    bits.state = type(bits)(seed).state


@contextmanager
def drawing_alike(func: Any, kwargs: Mapping[str, Any], seed: int) -> Iterator[None]:
    """Let an op draw the same random numbers in every run, however many those before it drew.

    A model that skips a block at random (`torch.rand(1) < p`) then skips the same ones when it is pruned.

    Args:
        func: The ATen overload.
        kwargs: Its keyword arguments.
        seed: Of what it draws.
    """
    generator = kwargs.get("generator")
    if torch.Tag.nondeterministic_seeded not in func.tags:
        yield
    elif generator is None:
        torch.default_generator.manual_seed(seed)  # the run restores it
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        yield
    else:
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(state)
