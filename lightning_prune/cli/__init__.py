"""The command `lightning-prune`: one verb a call, each with ``--help`` and ``--json``.

Exit codes: 0, done; 1, it cannot be done, with the reason on stderr; 2, the call is wrong.
"""

from __future__ import annotations

from lightning_prune.cli.main import main

__all__ = ["main"]
