"""How much a metric suffers when one unit alone is pruned: measured, shown, and handed on to an importance."""

from __future__ import annotations

from lightning_prune.sensitivity.measure import sensitivity
from lightning_prune.sensitivity.table import SensitivityRow, SensitivityTable

__all__ = ["SensitivityRow", "SensitivityTable", "sensitivity"]
