"""Rewinding: after channels are removed, train on as from an earlier time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.recovery.base import Recovery, Run

__all__ = ["Rewind"]

KINDS = ("lr", "weights")


class Rewind(Recovery):
    """After each firing, set learning rates, or weights, back to what they were at the start of epoch `epoch`.

    "lr" is a warm restart: every LR scheduler of the Trainer gets the state that it had, and every parameter group its
    learning rate; weights go on. Once `StochasticWeightAveraging` has put a scheduler of its own in place, rates are
    its own too, and stay. "weights" is for research on lottery tickets: parameters and buffers of what remains
    get their earlier values, and the state of the optimizers is emptied. The earlier values are kept in the memory of
    the host, and in checkpoints.

    Args:
        kind: "lr" or "weights".
        epoch: Whose start is rewound to; a firing before it changes nothing.

    Raises:
        ConfigError: An unknown kind, or an epoch below 0.

    Source: Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020, arXiv:2003.02389 (both
        kinds, "lr" as good as "weights" or better); restarts: Loshchilov and Hutter, "SGDR", 2017, arXiv:1608.03983.
    """

    def __init__(self, kind: str = "lr", epoch: int = 0) -> None:
        if kind not in KINDS:
            raise ConfigError(f"Got kind={kind!r} for Rewind; expected 'lr' or 'weights'.")
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ConfigError(f"Got epoch={epoch!r} for Rewind; expected a whole number of at least 0.")
        self.kind, self.epoch = kind, epoch
        self._kept: dict[str, Any] | None = None

    def forget(self) -> None:
        """Begin with another model."""
        self._kept = None

    def begin_epoch(self, run: Run) -> None:
        """Keep what is rewound to, before anything fires in the epoch."""
        if self._kept is None and run.trainer.current_epoch == self.epoch:
            self._kept = _rates(run) if self.kind == "lr" else _weights(run)

    def after_firing(self, run: Run) -> None:
        """Rewind."""
        if self._kept is None:
            return
        if self.kind == "lr":
            _set_rates_(run, self._kept)
        else:
            _set_weights_(run, self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Return what is rewound to."""
        return {} if self._kept is None else self._kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what the saved run rewinds to."""
        self._kept = state


def _rates(run: Run) -> dict[str, Any]:
    """Return the state of all schedulers, and the learning rates of all groups."""
    kinds = [type(config.scheduler).__name__ for config in run.trainer.lr_scheduler_configs]
    schedulers = [copy.deepcopy(config.scheduler.state_dict()) for config in run.trainer.lr_scheduler_configs]
    rates = [[_plain(group["lr"]) for group in optimizer.param_groups] for optimizer in run.trainer.optimizers]
    return {"kinds": kinds, "schedulers": schedulers, "rates": rates}


def _plain(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set_rates_(run: Run, kept: dict[str, Any]) -> None:
    if [type(config.scheduler).__name__ for config in run.trainer.lr_scheduler_configs] != kept["kinds"]:
        return  # averaging of weights has begun, with a scheduler of its own
    for config, state in zip(run.trainer.lr_scheduler_configs, kept["schedulers"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
    for optimizer, rates in zip(run.trainer.optimizers, kept["rates"], strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(rate))
            else:
                group["lr"] = rate


def _held(run: Run) -> dict[str, Tensor]:
    """Return parameters and buffers of their full size by name, also where a layer presents a part of them."""
    found = {}
    for prefix, module in run.module.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def _weights(run: Run) -> dict[str, Any]:
    return {"weights": {name: tensor.detach().to("cpu", copy=True) for name, tensor in _held(run).items()}}


@torch.no_grad()
def _set_weights_(run: Run, kept: dict[str, Any]) -> None:
    for name, tensor in _held(run).items():
        tensor.copy_(kept["weights"][name])
    for optimizer in run.trainer.optimizers:
        optimizer.state.clear()
