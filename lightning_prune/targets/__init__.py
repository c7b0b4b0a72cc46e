"""Scores, costs and a target in; the kept channels of every unit out."""

from __future__ import annotations

from lightning_prune.targets.parse import COST_KEYS, Target, parse_target
from lightning_prune.targets.planning import make_plan, reachable_range
from lightning_prune.targets.steps import SCOPES

__all__ = ["COST_KEYS", "SCOPES", "Target", "make_plan", "parse_target", "reachable_range"]
