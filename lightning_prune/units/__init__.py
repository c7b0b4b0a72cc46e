"""Units: channel axes that must keep the same channels, with one mask and one choice for all of them."""

from lightning_prune.units.channel import Channel
from lightning_prune.units.l1 import L1MutableChannelUnit, l1_scores
from lightning_prune.units.unit import CHOICE_MODES, MutableChannelUnit, SequentialMutableChannelUnit

__all__ = [
    "CHOICE_MODES",
    "Channel",
    "L1MutableChannelUnit",
    "MutableChannelUnit",
    "SequentialMutableChannelUnit",
    "l1_scores",
]
