"""From a pruned model to what is deployed: plain small modules, ONNX, an exported program.

small = export_pruned(model)
export_onnx(model, images, "model.onnx")
export_program(model, images, "model.pt2")
"""

from __future__ import annotations

from lightning_prune.export.onnx import export_onnx
from lightning_prune.export.program import export_program
from lightning_prune.export.pruned import export_pruned

__all__ = ["export_onnx", "export_program", "export_pruned"]
