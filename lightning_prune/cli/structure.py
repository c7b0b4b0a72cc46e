"""Verbs that find the units of a model, and cut them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_prune.checkpoint import load_pruned, save_pruned
from lightning_prune.cli.answer import Answer, printed
from lightning_prune.cli.models import load_model, make_input
from lightning_prune.cli.watched import prune_watched_
from lightning_prune.errors import ConfigError
from lightning_prune.export import export_pruned
from lightning_prune.importance import resolve_importance
from lightning_prune.importance.scorer import is_priced, window_of
from lightning_prune.mutator import ChannelMutator
from lightning_prune.targets import make_plan

__all__ = ["inspect", "prepared", "prune", "units"]


def prepared(model: nn.Module, input: str | None, ignore: list[str] | None = None) -> ChannelMutator:
    """Return a mutator that has found the units of a model."""
    mutator = ChannelMutator(example_input=make_input(input, model), ignore=ignore or ())
    mutator.prepare_from_supernet(model)
    return mutator


def units(
    model: str,
    arguments: dict[str, Any] | None = None,
    input: str | None = None,
    ignore: list[str] | None = None,
    choices: bool = False,
    output: str | None = None,
) -> Answer:
    """Find the units of a model, and write the structure file that `target:` reads.

    Args:
        model: Import path package.module.Class, or torchvision:name, timm:name, hf:name.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
        ignore: Globs over module names whose outputs stay, such as '[head*]'.
        choices: Write only the choice of each unit, to be edited.
        output: YAML file; without it the YAML is printed.
    """
    mutator = prepared(load_model(model, arguments), input, ignore)
    data = dict(mutator.choice_template) if choices else mutator.config_template(only_mutable_units=True)
    text = OmegaConf.to_yaml(OmegaConf.create(data)).rstrip()
    if output is None:
        return Answer(data, text)
    Path(output).write_text(text + "\n", encoding="utf-8")
    return Answer(
        {"output": output, "units": len(mutator.mutable_units)}, f"{len(mutator.mutable_units)} units: {output}"
    )


def inspect(
    model: str,
    arguments: dict[str, Any] | None = None,
    input: str | None = None,
    ignore: list[str] | None = None,
    divisor: int = 8,
    min_ratio: float = 0.1,
) -> Answer:
    """Tell what of a model can go: units, frozen axes with the reason, costs and what can be reached.

    Args:
        model: Import path package.module.Class, or torchvision:name, timm:name, hf:name.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
        ignore: Globs over module names whose outputs stay, such as '[head*]'.
        divisor: Kept counts are multiples of it, for what can be reached.
        min_ratio: What at least remains of each unit, for what can be reached.
    """
    mutator = prepared(load_model(model, arguments), input, ignore)
    report = mutator.report(divisor, min_ratio)
    return Answer(report.to_dict(), printed(report))


def prune(
    model: str,
    target: float | dict[str, Any] | str,
    output: str,
    arguments: dict[str, Any] | None = None,
    input: str | None = None,
    checkpoint: str | None = None,
    importance: dict[str, Any] | str = "magnitude",
    scope: str = "global",
    ignore: list[str] | None = None,
    divisor: int = 8,
    min_ratio: float = 0.1,
    data: str | None = None,
    data_arguments: dict[str, Any] | None = None,
) -> Answer:
    """Prune a model at once, and save it small.

    Args:
        model: Import path package.module.Class, or torchvision:name, timm:name, hf:name.
        target: What remains: a ratio, costs such as '{macs: 0.5}', choices of units, or a structure file.
        output: File to write, .ckpt or .safetensors.
        arguments: Of the class, such as '{width: 8}'.
        input: Shapes of its input, such as 2x3x224x224 or input_ids=int64:2x16<1000.
        checkpoint: Weights of the model; without it they are as the class makes them.
        importance: How channels are scored: a name, or a mapping such as '{name: lp, p: 3}'.
        scope: How channels compete: global, isomorphic or local.
        ignore: Globs over module names whose outputs stay, such as '[head*]'.
        divisor: Kept counts are multiples of it.
        min_ratio: What at least remains of each unit.
        data: Import path of a LightningDataModule, for an importance that watches training batches. Nothing is trained.
        data_arguments: Of the data module.
    """
    supernet = load_model(model, arguments)
    if checkpoint is not None:
        supernet = load_pruned(checkpoint, supernet).eval()
    options: dict[str, Any] = {"scope": scope, "divisor": divisor, "min_ratio": min_ratio}
    if data is None:
        mutator = prepared(supernet, input, ignore)
        _prune_by_weights_(mutator, target, importance, **options)
    else:
        options.update(importance=importance, ignore=ignore or (), example_input=make_input(input, supernet))
        mutator = prune_watched_(supernet, data, data_arguments, target, **options)
    kept = {unit.name: unit.activated_channels for unit in mutator.units}
    save_pruned(export_pruned(supernet), output, hyper_parameters=arguments or {}, units=kept)
    costs = {key: {"dense": dense, "pruned": now} for key, (now, dense, *_) in mutator.report().costs.items()}
    told = ", ".join(
        f"{key} {c['dense']:,} -> {c['pruned']:,} ({c['pruned'] / c['dense']:.1%})" for key, c in costs.items()
    )
    return Answer({"output": output, "costs": costs, "units": kept}, f"{output}: {told}")


def _prune_by_weights_(
    mutator: ChannelMutator, target: Any, importance: Any, *, scope: str, divisor: int, min_ratio: float
) -> None:
    """Score, plan, apply."""
    scorer = resolve_importance(importance)
    if window_of(scorer):
        raise ConfigError(
            f"Got importance={importance!r}, which has to watch training; expected --data with the import path of a "
            "LightningDataModule, or an importance of weights alone, such as l1."
        )
    limits = mutator.limits(divisor, min_ratio)
    per_cost = "macs" if is_priced(scorer) and scope != "local" else None
    with torch.no_grad():
        scores = scorer.scores(mutator.mutable_units, scope)
    mutator.apply(make_plan(target, scores, limits, mutator.graph.cost, scope=scope, per_cost=per_cost))
