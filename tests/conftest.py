"""Every test starts from the same seeds and must leave the process as it found it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

torch.set_num_threads(1)  # outputs are compared bit for bit

# every run draws the same examples, and no busy machine makes one fail
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")

GLOBAL_STATE: dict[str, Callable[[], object]] = {
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "thread count": torch.get_num_threads,
    "attention fast path": torch.backends.mha.get_fastpath_enabled,
    "dispatch modes": lambda: tuple(map(type, _get_current_dispatch_mode_stack())),
    "process group": lambda: torch.distributed.is_available() and torch.distributed.is_initialized(),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-models", action="store_true", help="examine every real model, not a third of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs more GPUs than there are: `gpu` asks for one, `gpu(2)` for two."""
    there = torch.cuda.device_count()
    needed = {item: max((mark.args or (1,))[0] for mark in item.iter_markers("gpu"))
              for item in items if item.get_closest_marker("gpu")}  # fmt: skip
    left_out = [item for item, number in needed.items() if number > there]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_leaked_state() -> Iterator[None]:
    before = {name: read() for name, read in GLOBAL_STATE.items()}
    environment = dict(os.environ)
    yield
    os.environ.clear()  # Lightning's launchers and seed_everything write to it
    os.environ.update(environment)
    leaked = {name: read() for name, read in GLOBAL_STATE.items() if read() != before[name]}
    assert not leaked, f"The test left {leaked}; it started with { ({name: before[name] for name in leaked}) }."
