"""Run a recipe: `python examples/train.py fit --config examples/cifar10_resnet56.yaml --data.root FOLDER`.

Model, data, optimizer and callbacks are what the configuration says; `--print_config` shows all of it, and every value
can be set on the command line.
"""

from __future__ import annotations

import warnings

from lightning.pytorch.cli import LightningCLI

import lightning_prune  # noqa: F401  # an imported callback can be named without its module


def main() -> None:
    """Hand the arguments to Lightning."""
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
    LightningCLI(seed_everything_default=0, parser_kwargs={"parser_mode": "omegaconf"})


if __name__ == "__main__":
    main()
