"""What each of the two libraries makes of one model: how long it takes, and whether the result is right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import torch_pruning_settings
from tests.compare import calibrate_, macs_of, outputs, zeroed_outputs
from tests.examine import as_double, measured, ties_of
from tests.models import build

Record = dict[str, Any]


def time_lightning_prune(name: str) -> Record:
    """Return seconds and memory of the analysis and of halving every unit, certified and in place."""
    from lightning_prune.compact import compact_
    from lightning_prune.mutator import ChannelMutator

    model, args, kwargs = build(name, full=True)
    mutator = ChannelMutator(example_input=args or kwargs)
    model.eval()

    def halve() -> None:
        if mutator.units:
            mutator.set_choices({"*": 0.5})
            compact_(model)

    analysis = measured(lambda: mutator.prepare_from_supernet(model))
    halving = measured(halve)
    return {
        "cpu_s": analysis["cpu_s"] + halving["cpu_s"],
        "wall_s": analysis["wall_s"] + halving["wall_s"],
        "peak_mib": max(analysis["peak_mib"], halving["peak_mib"]),
        "analysis_s": analysis["cpu_s"],
    }


def time_torch_pruning(name: str) -> Record:
    """Return seconds and memory of making the pruner and of one step to half of the channels."""
    model, args, kwargs = build(name, full=True)
    model.eval()
    return measured(lambda: torch_pruning_settings.halve(name, model, args, kwargs))


def check_lightning_prune(name: str, full: bool) -> Record:
    """Return how far the exported model is from the dynamic one, and from the dense one with removed channels at 0.

    Args:
        name: `library:model`.
        full: On an image of full size.
    """
    from lightning_prune.export import export_pruned
    from lightning_prune.mutator import ChannelMutator

    model, args, kwargs = _double(*build(name, full))
    before, ties, dense, scales = _size(model), ties_of(model), *_results(model, args, kwargs)
    mutator = ChannelMutator(example_input=args or kwargs)
    mutator.prepare_from_supernet(model)
    report = mutator.report()
    macs = report.costs["macs"]
    remarks = {remark for row in report.units for remark in row.remarks}
    special = {row.name for row in report.units if row.remarks}
    found: Record = {"units": len(mutator.units), "prunable_macs": round(1 - macs[2] / macs[1], 4)}
    found |= {"renormalizing": bool(special), "rescaling": "rescaling" in remarks}
    if not mutator.units:
        return {**found, "no_op": True}
    mutator.set_choices({unit.name: 0.5 for unit in mutator.units if unit.name not in special})
    zeroed = zeroed_outputs(model, args, **kwargs)
    found["zeroed_error"] = _distance(outputs(model, args, **kwargs), zeroed)
    mutator.set_choices({"*": 0.5})
    dynamic = outputs(model, args, **kwargs)
    small = export_pruned(model)
    after, scales_after = _results(small, args, kwargs)
    found["exported_error"] = _distance(after, dynamic)
    return found | _compare(small, (args, kwargs), before, ties, (dense, scales), (after, scales_after), macs[1])


def check_torch_pruning(name: str, full: bool) -> Record:
    """Return whether the pruned model runs, and how far it is from the dense one with removed channels at 0.

    Args:
        name: `library:model`.
        full: On an image of full size.
    """
    model, args, kwargs = _double(*build(name, full))
    before, ties, dense, scales = _size(model), ties_of(model), *_results(model, args, kwargs)
    twin = copy.deepcopy(model)
    macs = _macs(twin, args, kwargs)
    found: Record = {"units": torch_pruning_settings.halve(name, model, args, kwargs)}
    try:
        after, scales_after = _results(model.eval(), args, kwargs)
    except Exception as error:
        return {**found, "forward_error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    found |= _compare(model, (args, kwargs), before, ties, (dense, scales), (after, scales_after), macs)
    if found["shapes_kept"]:
        zero_removed_(twin, model)
        found["zeroed_error"] = _distance(after, outputs(twin, args, **kwargs))
    return found


def zero_removed_(dense: nn.Module, small: nn.Module) -> None:
    """Set to 0 every entry of a parameter of `dense` that `small` has not; its entries are found by their values."""
    smaller = dict(small.named_parameters(remove_duplicate=False))
    removed = []
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        kept = smaller[name].detach()
        for dim, size in enumerate(kept.shape):
            if size != parameter.shape[dim]:
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[kept_along(parameter.detach(), kept, dim)] = False
                removed.append((parameter, dim, gone.nonzero().flatten()))
    with torch.no_grad():
        for parameter, dim, indices in removed:
            parameter.index_fill_(dim, indices, 0.0)


def kept_along(full: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Return the positions along one axis that are left of a tensor without equal entries.

    Args:
        full: `[n_0, n_1, ...]`; entries that are 0 already are looked at as they are.
        kept: `[m_0, m_1, ...]`, what is left.
        dim: The axis.

    Returns:
        Int64 `[m_dim]`.
    """
    corner = (full == kept.flatten()[-1]).nonzero()
    if not len(corner):
        raise ValueError("the pruned tensor is no part of the dense one")
    line = full[tuple(slice(None) if d == dim else int(c) for d, c in enumerate(corner[0]))]
    wanted = kept.movedim(dim, 0).reshape(kept.shape[dim], -1)[:, -1].contiguous()
    values, order = line.sort()
    found = order[torch.searchsorted(values, wanted).clamp_max(len(values) - 1)]
    if not torch.equal(line[found], wanted):
        raise ValueError("the pruned tensor is no part of the dense one")
    return found


def _compare(
    model: nn.Module,
    inputs: tuple[Any, Any],
    before: int,
    ties: list[list[str]],
    dense: tuple[list[Tensor], list[float]],
    after: tuple[list[Tensor], list[float]],
    macs: int,
) -> Record:
    return {
        "shapes_kept": [t.shape for t in after[0]] == [t.shape for t in dense[0]],
        "no_op": _size(model) == before,
        "params_left": round(_size(model) / before, 4),
        "macs_left": round(_macs(model, *inputs) / max(macs, 1), 4),
        "ties_kept": ties_of(model) == ties if ties else None,
        "scale_kept": after[1] == dense[1] if dense[1] else None,
    }


def _results(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[float]]:
    """Return the outputs of one forward, and the scale of each fused attention in it."""
    with recorded_scales() as scales:
        return outputs(model, args, **kwargs), scales


@contextmanager
def recorded_scales() -> Iterator[list[float]]:
    """Collect the scale of every call of `scaled_dot_product_attention`."""
    scales: list[float] = []
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, scale: float | None = None, **kwargs: Any) -> Tensor:
        scales.append(round(query.shape[-1] ** -0.5 if scale is None else scale, 9))
        return original(query, *args, scale=scale, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield scales
    finally:
        F.scaled_dot_product_attention = original


def _double(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any]:
    """Return model, in eval mode, and inputs in float64, where no two entries of a parameter are equal."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 1e-3 * torch.rand_like(parameter)
    args, kwargs = tree_map(as_double, (args, kwargs))
    calibrate_(model.eval(), args, **kwargs)
    return model, args, kwargs


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, args: Any, kwargs: Any) -> int:
    return macs_of(model, args, **kwargs)


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of its tensor; infinite where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.numel() and a.is_floating_point()]
    errors = [float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in pairs]
    return max(errors, default=0.0)
