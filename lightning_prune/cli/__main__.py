"""`python -m lightning_prune.cli`."""

from __future__ import annotations

import sys

from lightning_prune.cli.main import main

sys.exit(main())
