"""The two files of a report, put in place at once: what is in the folder is always whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_prune.report.html import render

__all__ = ["HTML_NAME", "JSON_NAME", "write_report"]

JSON_NAME, HTML_NAME = "pruning_report.json", "pruning_report.html"


def write_report(document: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write a report as JSON and as one page of HTML that needs nothing else.

    Args:
        document: What `make_document` returned. Numbers that are not finite are null in the JSON.
        folder: Made if it is not there; files of an earlier report are replaced.

    Returns:
        The two files.

    Raises:
        OSError: They cannot be written; none is left half written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"
    return [_put(place / JSON_NAME, plain), _put(place / HTML_NAME, render(document))]


def _put(path: Path, text: str) -> Path:
    """Write a file beside its place, then move it there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _finite(value: Any) -> Any:
    """Return plain data with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
