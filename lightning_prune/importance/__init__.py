"""Scores of channels: unit -> float `[C]`, higher = keep. Nothing here knows of budgets or writes a mask."""

from __future__ import annotations

from lightning_prune.importance.activation import activation, apoz, wanda
from lightning_prune.importance.aggregate import NORMALIZERS, REDUCTIONS, normalize, reduce_layers
from lightning_prune.importance.energy import magnitude
from lightning_prune.importance.fisher import fisher
from lightning_prune.importance.gradient import hessian, taylor, taylor2
from lightning_prune.importance.layers import weight_spans
from lightning_prune.importance.magnitude import bn_scale, l1, l2, lp, random
from lightning_prune.importance.measured import SensitivityScores
from lightning_prune.importance.mixture import Mixture
from lightning_prune.importance.relative import fpgm, lamp
from lightning_prune.importance.resolve import resolve_importance
from lightning_prune.importance.scorer import IMPORTANCES, Importance, Scorer
from lightning_prune.units import l1_scores

__all__ = [
    "IMPORTANCES",
    "NORMALIZERS",
    "REDUCTIONS",
    "Importance",
    "Mixture",
    "Scorer",
    "SensitivityScores",
    "activation",
    "apoz",
    "bn_scale",
    "fisher",
    "fpgm",
    "hessian",
    "l1",
    "l1_scores",
    "l2",
    "lamp",
    "lp",
    "magnitude",
    "normalize",
    "random",
    "reduce_layers",
    "resolve_importance",
    "taylor",
    "taylor2",
    "wanda",
    "weight_spans",
]
