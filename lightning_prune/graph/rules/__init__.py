"""One rule per ATen op: how labels move through it. Each rule claims that the op commutes with selecting indices."""

from __future__ import annotations

from lightning_prune.graph.rules import contraction, indexing, movement, normalization, pointwise, recurrent, reduction
from lightning_prune.graph.rules.table import RULES, RuleEntry, rule

__all__ = [
    "RULES",
    "RuleEntry",
    "contraction",
    "indexing",
    "movement",
    "normalization",
    "pointwise",
    "recurrent",
    "reduction",
    "rule",
]
