from __future__ import annotations

import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.mutables import MutableChannel, MutableChannelContainer
from lightning_prune.ops import convert_


def cut(container: MutableChannelContainer, *bits: int) -> MutableChannel:
    channel = MutableChannel(len(bits))
    container.register_mutable(channel, 0, len(bits))
    channel.current_choice = torch.tensor(bits, dtype=torch.bool)
    return channel


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that is neither 0 nor 1."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return module.double()


class Case(NamedTuple):
    make: object
    shape: tuple[int, ...]
    """Shape of the input, batch first, after the cut."""
    masks: dict[str, tuple[int, ...]]
    integers: dict[str, object]


SCATTERED, PREFIX, MIDDLE = (1, 0, 1, 1, 0, 1), (1, 1, 1, 0, 0, 0), (0, 1, 1, 1, 0, 0)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

CASES: dict[str, Case] = {}
for rank in (1, 2, 3):
    space = (5,) * rank
    for name, cls in (("conv", CONVS[rank]), ("transposed", TRANSPOSED[rank])):
        CASES[f"{name}{rank}d"] = Case(
            lambda cls=cls: cls(6, 4, 3, padding=1),
            (2, 4, *space),
            {"in_channels": SCATTERED, "out_channels": (0, 1, 0, 1)},
            {"in_channels": 4, "out_channels": 2, "groups": 1},
        )
    for name, cls in (("batch norm", BATCH_NORMS[rank]), ("instance norm", INSTANCE_NORMS[rank])):
        CASES[f"{name} {rank}d"] = Case(
            lambda cls=cls: cls(6, affine=True, track_running_stats=True),
            (3, 4, *space),
            {"num_features": SCATTERED},
            {"num_features": 4},
        )
CASES |= {
    "conv, output prefix": Case(
        lambda: nn.Conv2d(3, 6, 3), (2, 3, 5, 5), {"out_channels": PREFIX}, {"in_channels": 3, "out_channels": 3}
    ),
    "conv, input prefix": Case(
        lambda: nn.Conv2d(6, 3, 3, bias=False),
        (2, 3, 5, 5),
        {"in_channels": PREFIX},
        {"in_channels": 3, "out_channels": 3},
    ),
    "conv, input middle": Case(
        lambda: nn.Conv2d(6, 3, 3), (2, 3, 5, 5), {"in_channels": MIDDLE}, {"in_channels": 3, "out_channels": 3}
    ),
    "conv, channels last": Case(
        lambda: nn.Conv2d(6, 6, 3).to(memory_format=torch.channels_last),
        (2, 4, 5, 5),
        {"in_channels": SCATTERED, "out_channels": MIDDLE},
        {"in_channels": 4, "out_channels": 3},
    ),
    "conv, reflect padding": Case(
        lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        (2, 4, 5, 5),
        {"in_channels": SCATTERED},
        {"in_channels": 4, "out_channels": 6},
    ),
    "depthwise": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        (2, 4, 5, 5),
        {"in_channels": SCATTERED, "out_channels": SCATTERED},
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "depthwise, two filters each": Case(
        lambda: nn.Conv2d(3, 6, 3, groups=3),
        (2, 2, 5, 5),
        {"in_channels": (1, 0, 1), "out_channels": (1, 0, 0, 0, 0, 1)},
        {"in_channels": 2, "out_channels": 2, "groups": 2},
    ),
    "grouped, whole groups": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=3),
        (2, 4, 5, 5),
        {"in_channels": (1, 1, 0, 0, 1, 1), "out_channels": (1, 1, 0, 0, 1, 1)},
        {"in_channels": 4, "out_channels": 4, "groups": 2},
    ),
    "grouped, inside the groups": Case(
        lambda: nn.Conv1d(6, 6, 3, groups=2),
        (2, 4, 5),
        {"in_channels": (1, 0, 1, 1, 0, 1), "out_channels": (1, 0, 0, 0, 0, 1)},
        {"in_channels": 4, "out_channels": 2, "groups": 2},
    ),
    "grouped, groups and inside": Case(
        lambda: nn.Conv3d(9, 6, 2, groups=3),
        (2, 4, 3, 3, 3),
        {"in_channels": (1, 0, 1, 0, 0, 0, 1, 0, 1), "out_channels": (0, 1, 0, 0, 1, 0)},
        {"in_channels": 4, "out_channels": 2, "groups": 2},
    ),
    "grouped transposed": Case(
        lambda: nn.ConvTranspose2d(6, 9, 3, groups=3),
        (2, 2, 4, 4),
        {"in_channels": (0, 1, 0, 0, 1, 0), "out_channels": (1, 0, 1, 0, 0, 0, 1, 0, 1)},
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "linear": Case(
        lambda: nn.Linear(6, 4),
        (2, 5, 4),
        {"in_features": SCATTERED, "out_features": (0, 1, 0, 1)},
        {"in_features": 4, "out_features": 2},
    ),
    "linear, both prefixes": Case(
        lambda: nn.Linear(6, 6, bias=False),
        (5, 3),
        {"in_features": PREFIX, "out_features": PREFIX},
        {"in_features": 3, "out_features": 3},
    ),
    "sync batch norm": Case(lambda: nn.SyncBatchNorm(6), (3, 4, 5), {"num_features": SCATTERED}, {"num_features": 4}),
    "batch norm, prefix": Case(lambda: nn.BatchNorm2d(6), (3, 3, 4, 4), {"num_features": PREFIX}, {"num_features": 3}),
    "batch norm, no affine": Case(
        lambda: nn.BatchNorm2d(6, affine=False), (3, 4, 4, 4), {"num_features": SCATTERED}, {"num_features": 4}
    ),
    "batch norm, no statistics": Case(
        lambda: nn.BatchNorm1d(6, track_running_stats=False, momentum=None),
        (3, 4),
        {"num_features": SCATTERED},
        {"num_features": 4},
    ),
    "layer norm": Case(lambda: nn.LayerNorm(6), (2, 3, 4), {"num_features": SCATTERED}, {"normalized_shape": (4,)}),
    "layer norm over two axes": Case(
        lambda: nn.LayerNorm((3, 6)),
        (2, 2, 4),
        {"normalized_shape.0": (1, 0, 1), "normalized_shape.1": SCATTERED},
        {"normalized_shape": (2, 4)},
    ),
    "layer norm without affine": Case(
        lambda: nn.LayerNorm(6, elementwise_affine=False),
        (2, 4),
        {"num_features": SCATTERED},
        {"normalized_shape": (4,)},
    ),
    "RMS norm": Case(lambda: nn.RMSNorm(6), (2, 3, 4), {"num_features": SCATTERED}, {"normalized_shape": (4,)}),
    "group norm, whole groups": Case(
        lambda: nn.GroupNorm(3, 6),
        (2, 4, 5),
        {"num_channels": (1, 1, 0, 0, 1, 1)},
        {"num_channels": 4, "num_groups": 2},
    ),
    "group norm, inside the groups": Case(
        lambda: nn.GroupNorm(2, 6),
        (2, 4, 5),
        {"num_channels": (1, 0, 1, 1, 0, 1)},
        {"num_channels": 4, "num_groups": 2},
    ),
    "PReLU": Case(lambda: nn.PReLU(6), (2, 4, 5), {"num_parameters": SCATTERED}, {"num_parameters": 4}),
}
cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def dense_input(case: Case, module: nn.Module) -> torch.Tensor:
    """Return an input of the dense size: the kept size with the cut axes put back."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        lead = case.shape[: len(case.shape) - len(module.normalized_shape)]
        shape = (*lead, *module.normalized_shape)
    elif isinstance(module, nn.Linear):
        shape = (*case.shape[:-1], module.in_features)
    else:
        size = next(
            getattr(module, name)
            for name in ("in_channels", "num_features", "num_channels", "num_parameters")
            if hasattr(module, name)
        )
        shape = (case.shape[0], size, *case.shape[2:])
    return torch.randn(shape, dtype=torch.float64)


def make_cut(case: Case) -> ops.DynamicOp:
    op = convert_(randomize(case.make()))
    for attr, bits in case.masks.items():
        cut(op.get_mutable_attr(attr), *bits)
    return op


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def cut_batch_norm() -> ops.DynamicOp:
    op = ops.DynamicBatchNorm1d.convert_from(nn.BatchNorm1d(3))
    cut(op.get_mutable_attr("in_channels"), 1, 0, 1)
    return op
