"""Prune a model by a structure file: units -> YAML -> edit -> `target=` file -> small model.

    python examples/config_pruning.py torchvision:resnet18 --structure units.yaml            # writes the file; edit it
    python examples/config_pruning.py torchvision:resnet18 --structure units.yaml --output small.ckpt

The second call prunes as the file says. `--set "layer1*=0.5"` edits it on the way: what remains of each unit of that
name or glob, a share up to 1 or a number of channels. In a training, `PruningCallback(target="units.yaml")` reads the
same file.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_prune import ChannelMutator, export_pruned, load_pruned, save_pruned
from lightning_prune.cli.models import load_model, make_input
from lightning_prune.importance import resolve_importance
from lightning_prune.targets import make_plan


def main() -> None:
    """Read the command line, and do what it asks for."""
    arguments = read_arguments()
    sys.path.insert(0, "")  # models of the folder where this is called
    model = load_model(arguments.model)
    if arguments.checkpoint:
        model = load_pruned(arguments.checkpoint, model).eval()
    mutator = ChannelMutator(example_input=make_input(arguments.input, model))
    mutator.prepare_from_supernet(model)
    if not arguments.structure.exists():
        OmegaConf.save(OmegaConf.create(dict(mutator.choice_template)), arguments.structure)
        print(f"{arguments.structure}: {len(mutator.mutable_units)} units")
    edit(arguments.structure, arguments.set)
    if arguments.output:
        save_pruned(prune(mutator, arguments.structure, arguments.importance), arguments.output)
        for unit in mutator.units:
            print(f"{unit.name}: {unit.activated_channels} of {unit.num_channels}")
        for key, (now, dense, *_) in mutator.report().costs.items():
            print(f"{key}: {now:,} of {dense:,}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="package.module.Class, or torchvision:name, timm:name, hf:name")
    parser.add_argument("--input", help="shapes of its input, such as 2x3x224x224; images of that size by default")
    parser.add_argument("--structure", type=Path, default=Path("units.yaml"), help="read, or written where it is not")
    parser.add_argument("--set", action="append", default=[], metavar="UNIT=CHOICE", help="edit the file; repeatable")
    parser.add_argument("--checkpoint", help="weights of the model; without it they are as its class makes them")
    parser.add_argument("--importance", default="l1", help="which channels go first, by weights alone")
    parser.add_argument("--output", help="the small model: .ckpt or .safetensors; without it nothing is pruned")
    return parser.parse_args()


def edit(structure: Path, edits: list[str]) -> None:
    """Change choices in the file."""
    choices = OmegaConf.load(structure)
    for name, _, choice in (one.rpartition("=") for one in edits):
        units = [unit for unit in choices if fnmatchcase(str(unit), name)]
        if not units:
            raise SystemExit(f"Got --set {name}={choice}, which matches no unit of {structure}: {', '.join(choices)}")
        for unit in units:
            choices[unit] = float(choice)
    OmegaConf.save(choices, structure)


def prune(mutator: ChannelMutator, structure: Path, importance: str) -> nn.Module:
    """Keep of each unit what the file says, the channels with the best scores, and return the small model."""
    with torch.no_grad():
        scores = resolve_importance(importance).scores(mutator.mutable_units, "local")
    mutator.apply(make_plan(str(structure), scores, mutator.limits(), mutator.graph.cost, scope="local"))
    return export_pruned(mutator.model)


if __name__ == "__main__":
    main()
