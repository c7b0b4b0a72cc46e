"""Run a recipe: `python examples/train.py fit --config configs/taylor_accumulation.yaml`.

Model, data, optimizer and callbacks are what the configuration says; `--print_config` shows all of it, and every value
can be set on the command line.
"""

from __future__ import annotations

import warnings

from lightning.pytorch.cli import LightningCLI

import lightning_prune  # noqa: F401  # an imported callback can be named without its module


def main() -> LightningCLI:
    """Hand the arguments to Lightning, and return what it made of them."""
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
    return LightningCLI(
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},  # beside the checkpoints of the same run
        parser_kwargs={"parser_mode": "omegaconf"},
    )


if __name__ == "__main__":
    main()
