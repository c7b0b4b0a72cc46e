"""The exception classes of the library.

A message says what was got, what was expected, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["CheckpointError", "ConfigError", "ExportError", "PlanError", "PruneError", "TraceError", "did_you_mean"]


class PruneError(Exception):
    """Base of every error that lightning_prune raises on purpose."""


class ConfigError(PruneError, ValueError):
    """An argument, a mapping or a YAML file asks for something that does not exist or cannot be."""


class TraceError(PruneError):
    """The model cannot be traced, or a structure does not run the dense program on the kept channels."""


class PlanError(PruneError):
    """No structure satisfies the request, or a plan does not fit the model."""


class CheckpointError(PruneError, RuntimeError):
    """A checkpoint is truncated, of another model, of a newer version, or inconsistent."""


class ExportError(PruneError, RuntimeError):
    """A model cannot be written in a format, or what was written computes something else."""


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """Return a sentence that lists the valid names and suggests the closest one.

    Args:
        name: What the user wrote.
        valid: The names that would have been accepted.

    Returns:
        For example ``"Did you mean 'l1'? Valid: 'l1', 'l2'."``.

    Example:
        >>> did_you_mean("l3", ["l1", "random"])
        "Did you mean 'l1'? Valid: 'l1', 'random'."
    """
    names = list(valid)
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)  # "l3" is half of "l1"
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Valid: {', '.join(map(repr, names))}."
