"""Name the units of a model by what they are in its architecture.

- `heads`, `head_dim`, `groups`: units of those axes: attention heads, channels of a head, groups of a layer. One that
  both axes of a kernel run through is the residual stream too, and counts as `hidden` as well.
- `hidden`: a channel unit that three or more kernels make, because their results are added: a residual stream. (Two
  make the product of a gate and what it gates.)
- `ffn`: a channel unit that one or two kernels make, where every kernel that makes or reads it is a matrix or a
  convolution of one pixel: the width between two layers that see each position alone.
- `channels`: every other channel unit: what convolutions make and read.

A kernel is a tensor of two or more axes. One that both makes and reads the unit along one axis, such as that of a
depthwise convolution, passes the channels on and does not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from lightning_prune.graph.channel_graph import UnitSpec
from lightning_prune.plan import StructureReport

FAMILIES = ("channels", "ffn", "heads", "head_dim", "groups", "hidden")
_ATTENTION = re.compile(r"(?<!Split)(Attention|Attn)(?!Pool|Conv)")
_LINE = re.compile(r" \(\w+\.py:\d+\)")  # differs between versions of a library
_FEED_FORWARD = re.compile(r"Mlp(?!Classifier)|MLP|FeedForward|FFN")


def families_of(unit: UnitSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the families of a unit: one, or two where heads and residual stream go together.

    Args:
        unit: From the graph of a model.
        tensors: The model's parameters and buffers by name.
    """
    kernels = [p for p in unit.places if tensors[p.tensor].dim() > 1 and not (p.is_output and p.is_input)]
    makers = {p.tensor for p in kernels if p.is_output}
    if unit.axis != "channels":
        both = makers & {p.tensor for p in kernels if not p.is_output}
        return [unit.axis, "hidden"] if both else [unit.axis]
    if len(makers) > 2:
        return ["hidden"]
    pointwise = all(tensors[p.tensor].shape[2:].numel() == 1 for p in kernels)
    return ["ffn" if makers and pointwise else "channels"]


def count_families(units: Iterable[UnitSpec], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return family -> number of units, without those that are not there.

    Args:
        units: From the graph of a model.
        tensors: The model's parameters and buffers by name.
    """
    found = Counter(family for unit in units for family in families_of(unit, tensors))
    return {name: found[name] for name in FAMILIES if found[name]}


def explain_absences(model: nn.Module, found: Iterable[str], report: StructureReport) -> dict[str, list[str]]:
    """Return family -> what the report says about the layers that should have it, for each that is not there.

    Heads and their channels belong to modules called attention, `ffn` to modules called MLP or feed forward, `groups`
    to grouped convolutions, and `hidden` to whatever has one of the first two. An empty list: nothing is said.

    Args:
        model: With its own classes, or dynamic ones.
        found: The families that are there.
        report: Of its structure.
    """
    found = set(found)
    homes: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if _ATTENTION.search(kind):
            for family in ("heads", "head_dim", "hidden"):
                homes[family].append(name)
        if _FEED_FORWARD.search(kind):
            for family in ("ffn", "hidden"):
                homes[family].append(name)
        if 1 < getattr(module, "groups", 1) < getattr(module, "in_channels", 0):
            homes["groups"].append(name)

    def said(names: Sequence[str]) -> list[str]:
        inside = (f for f in report.frozen if any(f[0].startswith(f"{n}.") for n in names))
        return sorted({_LINE.sub("", reason) for *_, reason in inside})

    return {family: said(names) for family, names in homes.items() if names and family not in found}
