"""One rule per ATen op: how labels move through it. Each rule claims that the op commutes with selecting indices."""

from __future__ import annotations

from lightning_prune.graph.rules import (
    attention,
    contraction,
    indexing,
    linalg,
    loss,
    movement,
    normalization,
    pointwise,
    pooling,
    recurrent,
    reduction,
    scatter,
    spectral,
    strided,
)
from lightning_prune.graph.rules.table import RULES, RuleEntry, check_rules, rule

__all__ = [
    "RULES",
    "RuleEntry",
    "attention",
    "check_rules",
    "contraction",
    "indexing",
    "linalg",
    "loss",
    "movement",
    "normalization",
    "pointwise",
    "pooling",
    "recurrent",
    "reduction",
    "rule",
    "scatter",
    "spectral",
    "strided",
]
