"""The report of a run: what happened, as plain data, and the two files that tell it."""

from __future__ import annotations

from lightning_prune.report.document import make_document
from lightning_prune.report.history import History
from lightning_prune.report.write import HTML_NAME, JSON_NAME, write_report

__all__ = ["HTML_NAME", "JSON_NAME", "History", "make_document", "write_report"]
