"""Prune with Torch-Pruning as its own examples do, with what they do by name for one model done here for all alike.

Its examples spare the classifier, tell it the heads of attention layers, and put new sizes into the modules afterwards.
Here the layers that make the outputs are always spared, also where its examples forget them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from tests.models import CLASSES

RATIO = 0.5
PROJECTIONS = (
    ("qkv",),
    ("qkv_proj",),
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
HEADS = ("num_heads", "num_attention_heads", "n_heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size")
WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "embed_dim")
DETECTOR_OUTPUTS = ("cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "cls_score")


class Attention(NamedTuple):
    """An attention module: its projections, and the heads of queries and of keys."""

    module: nn.Module
    projections: tuple[nn.Module, ...]
    heads: int
    key_heads: int


def attention_of(model: nn.Module) -> list[Attention]:
    """Return the modules that project to queries, keys and values under one of the usual names."""
    found = []
    for module in model.modules():
        names = next((p for p in PROJECTIONS if all(isinstance(getattr(module, n, None), nn.Linear) for n in p)), None)
        config = getattr(module, "config", None)
        sources = [(module, name) for name in HEADS] + [(config, name) for name in HEADS]
        heads = next((getattr(o, n) for o, n in sources if isinstance(getattr(o, n, None), int)), None)
        if names is not None and heads is not None:
            key_heads = getattr(config, "num_key_value_heads", None) or heads
            found.append(Attention(module, tuple(getattr(module, n) for n in names), heads, key_heads))
    return found


def spared_layers(name: str, model: nn.Module) -> list[nn.Module]:
    """Return the layers that keep their outputs, and the parts that its examples leave out."""
    spared = [
        module
        for path, module in model.named_modules()
        if CLASSES in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
        or path.rpartition(".")[2] in DETECTOR_OUTPUTS
    ]
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        spared.append(model.get_output_embeddings())
    if ":ssd" in name:
        spared.append(model.get_submodule("head"))
    if ":fasterrcnn" in name:
        spared += [model.get_submodule("backbone.fpn"), model.get_submodule("roi_heads")]
    return spared


def arguments_for(name: str, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of the pruner in the examples for the library of a model, without its example input."""
    import torch_pruning  # type: ignore[import-untyped] # carries no annotations

    importance = torch_pruning.importance
    library = name.partition(":")[0]
    arguments: dict[str, Any] = {"pruning_ratio": RATIO, "ignored_layers": spared_layers(name, model)}
    if library == "torchvision":
        encoder = getattr(model, "encoder", None)
        if encoder is not None:
            arguments["round_to"] = encoder.layers[0].num_heads
        return {"importance": importance.MagnitudeImportance(p=1), **arguments}
    heads = {}
    for attention in attention_of(model):
        for number, projection in enumerate(attention.projections):
            heads[projection] = attention.key_heads if number else attention.heads
    arguments["num_heads"] = heads
    if library == "timm":
        return {"importance": importance.GroupMagnitudeImportance(), **arguments}
    arguments["output_transform"] = lambda out: getattr(out, "logits", out[0]).sum()
    arguments |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": RATIO}
    if "lm_head" in dict(model.named_children()):
        arguments["round_to"] = 4
        return {"importance": importance.GroupMagnitudeImportance(p=2, group_reduction="mean"), **arguments}
    return {"importance": importance.MagnitudeImportance(p=2, group_reduction="mean"), **arguments}


def write_sizes_(model: nn.Module, attentions: list[Attention], heads: dict[nn.Module, int]) -> None:
    """Put the new sizes into the modules, as the examples do after the step."""
    for module, projections, *_ in attentions:
        query = projections[0]
        count, width = max(heads[query], 1), query.out_features // (3 if len(projections) == 1 else 1)
        sizes = dict.fromkeys(HEADS, count) | dict.fromkeys(HEAD_WIDTHS, width // count) | dict.fromkeys(WIDTHS, width)
        if len(projections) > 1:
            sizes["num_key_value_groups"] = count // max(heads[projections[1]], 1)
        for attribute, size in sizes.items():
            if isinstance(vars(module).get(attribute), int):
                setattr(module, attribute, size)
    if hasattr(model, "conv_proj"):  # torchvision's vision transformer
        model.hidden_dim = model.conv_proj.out_channels


def halve(name: str, model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> int:
    """Prune half of every group in place and return the number of groups.

    Args:
        name: `library:model`, see `tests/models.py`.
        model: In eval mode.
        args: One positional input, or none.
        kwargs: Keyword inputs, if there is no positional one.
    """
    import torch_pruning

    model.requires_grad_(True)
    arguments, attentions = arguments_for(name, model), attention_of(model)
    kind = torch_pruning.pruner.MagnitudePruner if name.startswith("torchvision") else torch_pruning.pruner.MetaPruner
    pruner = kind(model, args[0] if args else kwargs, global_pruning=False, **arguments)
    groups = 0
    for group in pruner.step(interactive=True):
        group.prune()
        groups += 1
    if not name.startswith("torchvision"):
        write_sizes_(model, attentions, pruner.num_heads)
    elif hasattr(model, "conv_proj"):
        write_sizes_(model, [], {})
    return groups
