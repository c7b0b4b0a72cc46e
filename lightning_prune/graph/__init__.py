"""The channel graph: one trace gives units, costs and the proof. Knows nothing of scores, ratios or Lightning."""

from __future__ import annotations

from lightning_prune.graph.analyze import analyze, certify_kept
from lightning_prune.graph.attributes import register_attributes
from lightning_prune.graph.channel_graph import ChannelGraph, Follower, FrozenAxis, Place, UnitSpec
from lightning_prune.graph.cost import Cost, CostModel

__all__ = [
    "ChannelGraph",
    "Cost",
    "CostModel",
    "Follower",
    "FrozenAxis",
    "Place",
    "UnitSpec",
    "analyze",
    "certify_kept",
    "register_attributes",
]
