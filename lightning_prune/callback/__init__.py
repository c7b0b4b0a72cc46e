"""`PruningCallback`: prunes a model while Lightning's Trainer fits it."""

from __future__ import annotations

from lightning_prune.callback.callback import PruningCallback
from lightning_prune.callback.recover import RecoveryCallback

__all__ = ["PruningCallback", "RecoveryCallback"]
