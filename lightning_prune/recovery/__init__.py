"""What helps accuracy come back, one object each; `PruningCallback(recovery=[...])` asks them while it prunes.

Nothing here needs Lightning to be imported: what a run offers comes as a `Run`.
"""

from __future__ import annotations

from lightning_prune.recovery.base import Recovery, Run
from lightning_prune.recovery.distill import Distillation, distillation_loss
from lightning_prune.recovery.guard import Guard
from lightning_prune.recovery.recalibrate import Recalibration, recalibrate_
from lightning_prune.recovery.rewind import Rewind
from lightning_prune.recovery.sparse import BNScaleL1, GroupLasso, GroupNormSparsity, GrowingRegularization

__all__ = [
    "BNScaleL1",
    "Distillation",
    "GroupLasso",
    "GroupNormSparsity",
    "GrowingRegularization",
    "Guard",
    "Recalibration",
    "Recovery",
    "Rewind",
    "Run",
    "distillation_loss",
    "recalibrate_",
]
