"""Scores of channels: unit -> float `[C]`, higher = keep. Nothing here knows of budgets or writes a mask."""

from __future__ import annotations

from lightning_prune.importance.aggregate import NORMALIZERS, REDUCTIONS, normalize, reduce_layers
from lightning_prune.importance.layers import weight_spans
from lightning_prune.importance.magnitude import bn_scale, l1, l2, lp, random
from lightning_prune.importance.relative import fpgm, lamp
from lightning_prune.importance.resolve import resolve_importance
from lightning_prune.importance.scorer import IMPORTANCES, Importance, Scorer
from lightning_prune.units import l1_scores

__all__ = [
    "IMPORTANCES",
    "NORMALIZERS",
    "REDUCTIONS",
    "Importance",
    "Scorer",
    "bn_scale",
    "fpgm",
    "l1",
    "l1_scores",
    "l2",
    "lamp",
    "lp",
    "normalize",
    "random",
    "reduce_layers",
    "resolve_importance",
    "weight_spans",
]
