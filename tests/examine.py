"""Examine a real model: analyze it, cut it at random, and say everything that does not hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.graph.contents import named_tensors
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops, to_static_
from tests.compare import full, outputs, scattered, statistics, zeroed_outputs
from tests.families import count_families, explain_absences
from tests.models import build

TOLERANCE = 1e-9  # of the largest value of a tensor, in float64
UNCOUNTED = ("mv", "bilinear", "lstm", "gru", "rnn")  # what torch's counter leaves out: parts of the names of ops
Record = dict[str, Any]


def examine(name: str) -> Record:
    """Return what was found on one model, as plain data; `failures` says what does not hold.

    Args:
        name: `library:model`, see `tests/models.py`.
    """
    model, args, kwargs = build(name)
    model.double()
    args, kwargs = tree_map(as_double, (args, kwargs))
    record: Record = {"name": name, "parameters": sum(p.numel() for p in model.parameters()), "failures": []}
    dense, ties = outputs(model, args, **kwargs), ties_of(model)
    mutator = ChannelMutator(example_input=args or kwargs)
    record.update(measured(lambda: mutator.prepare_from_supernet(model)))
    record.update(describe(mutator))
    failures = record["failures"]
    same(failures, "conversion", outputs(model, args, **kwargs), dense)
    if mutator.units:
        _check_zeroing(failures, mutator, args, kwargs)
        _check_export(failures, mutator, args, kwargs, [t.shape for t in dense])
    if ties_of(model) != ties:
        failures.append(f"tied parameters: {ties_of(model)} instead of {ties}")
    return record


def unexpected(record: Record, expected: Mapping[str, Any]) -> list[str]:
    """Return what does not hold on a model, and how its units differ from `tests/expected_units.json`.

    Args:
        record: From `examine`.
        expected: The contents of the file.
    """
    wrong = list(record["failures"])
    if "families" not in record:
        return wrong
    wrong += [f"no {family}, and no reason in the report" for family, said in record["absent"].items() if not said]
    found = summarize_units(record)
    known = expected.get(record["name"], {"units": {}, "absent": {}, "prunable_macs": 0.0})
    for key in ("units", "prunable_macs"):
        if found[key] != known[key]:
            wrong.append(f"{key}: {found[key]} instead of {known[key]}")
    if found["absent"].keys() != known["absent"].keys():  # the words of the reasons may change
        wrong.append(f"absent: {found['absent']} instead of {known['absent']}")
    return wrong


def summarize_units(record: Record) -> Record:
    """Return what `tests/expected_units.json` says of a model.

    These are its units by family, the families that are absent with what the report says of that, and the share of the
    MACs that goes when every unit keeps one channel.
    """
    return {"units": record["families"], "absent": record["absent"], "prunable_macs": record["prunable_macs"]}


def as_double(value: Any) -> Any:
    """Return a tensor of floats in float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def describe(mutator: ChannelMutator) -> Record:
    """Return units by family, what is frozen and why, and what of the cost can go."""
    graph, report = mutator.graph, mutator.report()
    macs, params = report.costs["macs"], report.costs["params"]
    reasons: dict[str, list[str]] = {}
    for tensor, dim, size, reason in report.frozen:
        reasons.setdefault(reason, []).append(f"{tensor}[{dim}] {size}")
    families = count_families(graph.units, named_tensors(mutator.model))
    return {
        "families": families,
        "absent": explain_absences(mutator.model, families, report),
        "remarks": dict(Counter(remark for row in report.units for remark in row.remarks)),
        "prunable_macs": round(1 - macs[2] / max(macs[1], 1), 4),
        "prunable_params": round(1 - params[2] / max(params[1], 1), 4),
        "frozen": {r: {"axes": len(where), "first": where[0]} for r, where in reasons.items()},
        "notes": list(report.notes),
        "unknown": dict(graph.unknown),
    }


def ties_of(model: nn.Module) -> list[list[str]]:
    """Return the names of parameters that are one object."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def same(failures: list[str], what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Add a failure unless the tensors agree within `TOLERANCE` of their largest value."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        failures.append(f"{what}: shapes {shapes[0]} instead of {shapes[1]}")
        return
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not a.numel() or not a.is_floating_point():
            wrong = 0.0 if torch.equal(a, b) else 1.0
        else:
            finite = b.isfinite()
            wrong = float((a - b)[finite].abs().max() / b[finite].abs().max().clamp_min(1.0)) if finite.any() else 1.0
            wrong = wrong if torch.equal(a.isfinite(), finite) else 1.0
        if not wrong <= TOLERANCE:
            failures.append(f"{what}: output {number} is {wrong:.1e} off")
            return


def _check_zeroing(failures: list[str], mutator: ChannelMutator, args: Any, kwargs: Any) -> None:
    """Removing channels is setting them to zero, where the report says nothing else."""
    special = {unit.name for unit in mutator.graph.units if unit.renormalizing or unit.rescaling}
    mutator.apply(scattered([unit for unit in mutator.units if unit.name not in special]))
    expected = zeroed_outputs(mutator.model, args, **kwargs)
    same(failures, "zero-masked", outputs(mutator.model, args, **kwargs), expected)
    mutator.apply(full(mutator.units))


def _check_export(
    failures: list[str], mutator: ChannelMutator, args: Any, kwargs: Any, shapes: list[torch.Size]
) -> None:
    """Dynamic is exported in both modes, statistics included; outputs keep their shapes; the price is exact."""
    model = mutator.model
    mutator.apply(scattered(mutator.units, seed=1))
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    dynamic = [outputs(model, args, **kwargs), outputs(model, args, train=True, **kwargs), statistics(model)]
    for buffer, value in saved:
        buffer.copy_(value)
    cost = mutator.cost()
    small = to_static_(model)
    if dynamic_ops(small):
        failures.append("export: dynamic ops are left")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found = outputs(small, args, **kwargs)
    same(failures, "exported, eval", found, dynamic[0])
    same(failures, "exported, train", outputs(small, args, train=True, **kwargs), dynamic[1])
    after = statistics(small)
    if after.keys() != dynamic[2].keys():
        failures.append("exported, statistics: other buffers")
    same(failures, "exported, statistics", list(after.values()), list(dynamic[2].values()))
    if [t.shape for t in found] != shapes:
        failures.append(f"export: output shapes {[tuple(t.shape) for t in found]}")
    macs = sum(n for op, n in cost.by_op.items() if not any(part in op for part in UNCOUNTED))
    if macs != counter.get_total_flops() // 2:
        failures.append(f"cost: {macs} MACs, torch counts {counter.get_total_flops() // 2}")
    params = sum(p.numel() for p in small.parameters())
    if params != cost.params:
        failures.append(f"cost: {cost.params} parameters, there are {params}")


def measured(run: Callable[[], object]) -> Record:
    """Run and return seconds of this process, seconds by the clock, and MiB at the peak above what was there."""
    before = _reset_peak()
    start, clock = time.process_time(), time.perf_counter()
    run()
    seconds = {"cpu_s": round(time.process_time() - start, 3), "wall_s": round(time.perf_counter() - clock, 3)}
    return {**seconds, "peak_mib": round(_memory("VmHWM") - before)}


def _reset_peak() -> float:
    """Start a new peak and return the memory in use, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory("VmRSS")


def _memory(key: str) -> float:
    """Return a line of this process's status, in MiB; Linux only."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{key}:")[1].split()[0]) / 1024
