"""Sparse training: penalties that make channels small before they are removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import ConfigError
from lightning_prune.recovery.base import Recovery, Run
from lightning_prune.recovery.penalty import Group, add_, at, checked_strength, groups_of, scale_of

__all__ = ["BNScaleL1", "GroupLasso", "GroupNormSparsity", "GrowingRegularization"]

Strength = Callable[[float], float] | str  # the path of a function in YAML is a name too
"""Share of the way to the last firing, in [0, 1] -> factor of the strength; or "constant", or "linear" from 0 to 1."""


class BNScaleL1(Recovery):
    """Add ``strength * sum |gamma|`` over the scales of all batch norms to the loss, until the last firing.

    Its subgradient, ``strength * sign(gamma)``, is added when gradients are accumulated, reduced and unscaled, and
    before they are clipped: as if the penalty stood in the loss. Use it with ``importance="bn_scale"``.

    Args:
        strength: Of the penalty, at least 0; the paper takes 1e-4 to 1e-5.
        schedule: "constant", "linear" (from 0 up), or a function from the share of the way to the last firing, in
            [0, 1], to a factor. Without pruning it is the share of the fit.

    Raises:
        ConfigError: A strength below 0.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, arXiv:1708.06519.
    """

    def __init__(self, strength: float = 1e-4, schedule: Strength = "constant") -> None:
        self.strength, self.schedule = checked_strength("BNScaleL1", strength), schedule
        at(schedule, 0.0)

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Add the subgradient."""
        if run.is_done:
            return
        stepped = _stepped(optimizer)
        factor = self.strength * at(self.schedule, run.share) * scale_of(run, optimizer)
        for module in run.module.modules():
            scale = module._parameters.get("weight") if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
            if scale is not None and id(scale) in stepped:
                gradient = scale.detach().sign() * factor
                if module.weight.shape != scale.shape:  # removed entries have gradient 0
                    gradient = gradient * _living(module)
                add_(scale, gradient)


def _living(norm: Any) -> Tensor:
    """Return which entries of the scale of a masked norm remain."""
    mask: Tensor = norm.get_mutable_attr("num_features").current_mask
    return mask.to(norm._parameters["weight"].device)


def _stepped(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}


class _OfGroups(Recovery):
    """What penalties on the channels of units share."""

    def __init__(self) -> None:
        self._groups: list[Group] = []

    def begin(self, run: Run) -> None:
        """Find the parameters of each unit.

        Raises:
            ConfigError: Nothing is pruned, so that there are no units.
        """
        if run.mutator is None:
            raise ConfigError(f"Got {type(self).__name__} without pruning; give it to PruningCallback(recovery=[...]).")
        trainable = {id(p) for p in run.module.parameters() if p.requires_grad}
        self._groups = groups_of(run.mutator.mutable_units, trainable=trainable)

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty; a small model, between firings or after the last one, has none."""
        if run.is_done or not all(group.is_whole for group in self._groups):
            return
        stepped, scale = _stepped(optimizer), scale_of(run, optimizer)
        coefficients = [self._coefficients(group, run) * scale for group in self._groups]
        for group, row in zip(self._groups, coefficients, strict=True):
            group.add_(row, stepped)

    def _coefficients(self, group: Group, run: Run) -> Tensor:
        """Return what multiplies the weights of each channel in the gradient, `[C]`."""
        raise NotImplementedError


class GroupLasso(_OfGroups):
    """Add ``strength * sum_c sqrt(n_c) * ||w_c||`` to the loss, until the last firing.

    w_c are all n_c entries that go with channel c of a unit: the weights that make it, its norms, and the weights that
    read it. The gradient is ``strength * sqrt(n_c) * w / ||w_c||``, and 0 for a channel of zeros; it is added when
    gradients are accumulated, reduced and unscaled, and before they are clipped: as if the penalty stood in the loss.

    Args:
        strength: Of the penalty, at least 0.
        schedule: As for `BNScaleL1`.

    Raises:
        ConfigError: A strength below 0. In `fit`: nothing is pruned.

    Source: Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016, arXiv:1608.03665, eq. 4, with the
        weight sqrt(n_c) of Yuan and Lin, 2006. We differ: a group is what a unit removes together, over layers.
    """

    def __init__(self, strength: float = 1e-4, schedule: Strength = "constant") -> None:
        super().__init__()
        self.strength, self.schedule = checked_strength("GroupLasso", strength), schedule
        at(schedule, 0.0)

    def _coefficients(self, group: Group, run: Run) -> Tensor:
        norms = group.norms()
        inverse = torch.where(norms > 0, 1.0 / norms, torch.zeros_like(norms))
        return self.strength * at(self.schedule, run.share) * group.sizes().sqrt() * inverse


class GroupNormSparsity(_OfGroups):
    """Add ``strength * sum_c g_c * ||w_c|| ** 2`` to the loss, until the last firing: weak channels shrink faster.

    ``g_c = 2 ** (alpha * (max - ||w_c||) / (max - min))`` over the channels of a unit, a constant in the gradient
    ``2 * strength * g_c * w``. When it is added, and w_c, are those of `GroupLasso`.

    Args:
        strength: Of the penalty, at least 0.
        alpha: How much faster the weakest channel shrinks: 2 ** alpha times.
        schedule: As for `BNScaleL1`.

    Raises:
        ConfigError: A strength below 0. In `fit`: nothing is pruned.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900, eq. 4; its alpha is 4.
    """

    def __init__(self, strength: float = 1e-4, alpha: float = 4.0, schedule: Strength = "constant") -> None:
        super().__init__()
        self.strength, self.schedule, self.alpha = checked_strength("GroupNormSparsity", strength), schedule, alpha
        at(schedule, 0.0)

    def _coefficients(self, group: Group, run: Run) -> Tensor:
        norms = group.norms()
        mask = group.unit.mutable.current_mask.to(norms.device)
        most, least = norms[mask].max(), norms[mask].min()
        weaker = most - norms.clamp_min(
            least
        )  # of what is removed the power could be infinite, and no mask undoes that
        faster = 2.0 ** (self.alpha * weaker / (most - least).clamp_min(1e-12))
        return 2.0 * self.strength * at(self.schedule, run.share) * faster * mask


class GrowingRegularization(_OfGroups):
    """Add ``lambda / 2 * ||w_c|| ** 2`` for the channels that will go; lambda grows by `step` every `every` steps.

    The channels are chosen once, when the first step comes: of each unit the share `share` with the smallest norms. The
    gradient is ``lambda * w``, up to ``lambda = ceiling``; w_c and when it is added are those of `GroupLasso`. Let the
    schedule begin when lambda has grown.

    Args:
        step: What lambda grows by, at least 0.
        every: So many optimizer steps, at least 1.
        ceiling: Greatest lambda.
        share: Of the channels of each unit that are to go, in (0, 1).

    Raises:
        ConfigError: An argument outside its range. In `fit`: nothing is pruned.

    Source: Wang et al., "Neural Pruning via Growing Regularization", 2021, arXiv:2012.09243, GReg-1: step 1e-4 every 5
        to 10 steps, ceiling 1. We differ: channels of units instead of filters of layers, by L2 norms of groups.
    """

    def __init__(self, step: float = 1e-4, every: int = 10, ceiling: float = 1.0, share: float = 0.5) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"Got every={every!r} for GrowingRegularization; expected a whole number of at least 1.")
        if isinstance(share, bool) or not 0 < share < 1:
            raise ConfigError(f"Got share={share!r} for GrowingRegularization; expected a share in (0, 1).")
        self.step = checked_strength("GrowingRegularization", step)
        self.every, self.ceiling, self.share = every, ceiling, share
        self.forget()

    def forget(self) -> None:
        """Begin with another model."""
        self._chosen: dict[str, Tensor] = {}
        self._steps = 0
        self._counted = -1

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Count the steps of all optimizers together, and add the gradient."""
        if run.trainer.global_step != self._counted:
            self._counted, self._steps = run.trainer.global_step, self._steps + 1
        super().before_step(run, optimizer)

    @property
    def strength(self) -> float:
        """Lambda of the moment."""
        return min(self.step * (self._steps // self.every), self.ceiling)

    def _coefficients(self, group: Group, run: Run) -> Tensor:
        norms, name = group.norms(), group.unit.name
        if name not in self._chosen:
            chosen = torch.zeros(len(norms), dtype=torch.bool)
            chosen[norms.argsort(stable=True)[: int(self.share * len(norms))].cpu()] = True
            self._chosen[name] = chosen
        return self._chosen[name].to(norms) * self.strength

    def state_dict(self) -> dict[str, Any]:
        """Return the channels that are to go, and the steps so far."""
        return {"chosen": dict(self._chosen), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on growing."""
        self._chosen, self._steps = dict(state["chosen"]), state["steps"]
