"""The mutator: the structure of one model, its units, and one choice for each."""

from __future__ import annotations

from lightning_prune.mutator.mutator import ChannelMutator

__all__ = ["ChannelMutator"]
