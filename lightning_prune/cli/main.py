"""Read the command line, run a verb, print its answer."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_prune.cli.answer import Answer
from lightning_prune.cli.files import compare, describe, export
from lightning_prune.cli.measured import bench, plot
from lightning_prune.cli.structure import inspect as inspect_model
from lightning_prune.cli.structure import prune, units
from lightning_prune.errors import PruneError

__all__ = ["main"]

VERBS: dict[str, Callable[..., Answer]] = {
    "units": units,
    "inspect": inspect_model,
    "prune": prune,
    "describe": describe,
    "export": export,
    "bench": bench,
    "compare": compare,
    "plot": plot,
}


BY_HAND: set[str | int] = {"output", "choices"}  # a short form, and a flag without a value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Of the command line; None takes those of the process.

    Returns:
        The exit code: 0 or 1. A wrong call, and ``--help``, raise SystemExit as argparse does.
    """
    verb, options = _read(arguments)
    as_json = options.pop("json")
    if "" not in sys.path:
        sys.path.insert(0, "")  # models of the folder where the command is called
    try:
        answer = VERBS[verb](**options)
    except (PruneError, OSError, ImportError) as error:
        print(f"lightning-prune {verb}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer.data, indent=2) if as_json else answer.text)
    return 0


def _read(arguments: Sequence[str] | None) -> tuple[str, dict[str, Any]]:
    """Return the verb and its options."""
    parser = ArgumentParser(prog="lightning-prune", description="Look at, prune, export and measure models.")
    subcommands = parser.add_subcommands(dest="verb")
    for name, function in VERBS.items():
        summary = (function.__doc__ or "").split("\n", 1)[0]
        own = ArgumentParser(description=summary)
        own.add_function_arguments(function, as_positional=True, skip=BY_HAND)
        parameters = inspect.signature(function).parameters
        if "output" in parameters:
            required = parameters["output"].default is inspect.Parameter.empty
            own.add_argument("-o", "--output", required=required, help=_help(function, "output"))
        if "choices" in parameters:
            own.add_argument("--choices", action="store_true", help=_help(function, "choices"))
        own.add_argument("--json", action="store_true", help="Print JSON instead of text.")
        subcommands.add_subcommand(name, own, help=summary)
    found = parser.parse_args(arguments)
    options = found[found.verb]
    return found.verb, {name: _plain(value) for name, value in vars(options).items()}


def _help(function: Callable[..., Answer], name: str) -> str:
    """Return what a docstring says of an argument."""
    return (function.__doc__ or "").split(f" {name}: ", 1)[1].split("\n", 1)[0]


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value
