"""Is the pruned network faster, and as fast as one built narrow by hand? Four of torchvision's at half of their MACs.

Usage: `PYTHONPATH=. python benchmarks/latency.py`, or `make bench`; `--table` prints what the file holds.

Random weights, the defaults of the callback: `magnitude`, one global threshold. Each structure is exported, and built
once more by hand: by torch's own constructors in the same sizes, with the same weights. All forms of a network run in
turns in one process, one image at a time; a ratio is the median over the rounds, with its quartiles. The first form
built by hand runs twice: what lies between those two is noise. The file is written after each network, and one that it
holds at this commit is not measured again; `--again` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, describe_environment, earlier_results, write_result
from benchmarks.narrow import build_narrow
from lightning_prune.export import export_pruned
from lightning_prune.importance import Importance
from lightning_prune.latency import Measurement, Quartiles, compare
from lightning_prune.latency.backends import BACKENDS
from lightning_prune.mutator import ChannelMutator
from lightning_prune.targets import make_plan
from tests.torchvision_shim import import_torchvision

SHARE = 0.5
MIN_RATIO = 0.1
DEFAULT = 8  # divisor of the callback
DIVISORS = (DEFAULT, 1, 16, 32)
CLOSE = 1e-5  # of the greatest output: attention written by hand rounds otherwise
Record = dict[str, Any]


class Setting(NamedTuple):
    """One network, the shape of its images, the divisors that are tried, and how often it runs."""

    name: str
    make: Callable[[], nn.Module]
    images: tuple[int, ...]
    divisors: tuple[int, ...]
    rounds: int


class Cut(NamedTuple):
    """A network pruned to `SHARE`, the same one built by hand, and what they cost."""

    pruned: nn.Module
    by_hand: nn.Module
    macs: int
    params: int


def torchvision_model(name: str) -> nn.Module:
    """Return a network of torchvision without trained weights."""
    model: nn.Module = import_torchvision().models.get_model(name, weights=None)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # the classifier of vit_b_16: all outputs would be 0
            nn.init.normal_(parameter, std=0.02)
    return model


def settings() -> tuple[Setting, ...]:
    """Return the networks."""
    rounds = {"resnet50": 40, "mobilenet_v2": 150, "convnext_tiny": 40, "vit_b_16": 20}
    tried = {"resnet50": DIVISORS, "mobilenet_v2": DIVISORS}
    return tuple(
        Setting(name, partial(torchvision_model, name), (1, 3, 224, 224), tried.get(name, (DEFAULT,)), number)
        for name, number in rounds.items()
    )


def cut(setting: Setting, images: Tensor) -> tuple[nn.Module, Record, dict[int, Cut]]:
    """Return the dense network, what it costs, and what each divisor leaves of it.

    Raises:
        ValueError: The network built by hand does not compute what the exported one does.
    """
    torch.manual_seed(0)
    dense = setting.make().eval()
    supernet, mutator = copy.deepcopy(dense), ChannelMutator(example_input=images)
    mutator.prepare_from_supernet(supernet)
    full, cuts = mutator.cost(), {}
    scores = Importance("magnitude").scores(mutator.mutable_units, "global")
    for divisor in setting.divisors:
        limits = mutator.limits(divisor, MIN_RATIO)
        mutator.apply(make_plan({"macs": SHARE}, scores, limits, mutator.graph.cost, per_cost="macs"))
        pruned, cost = export_pruned(supernet).eval(), mutator.cost()
        by_hand = build_narrow(setting.make(), pruned)
        _check_same(by_hand, pruned, images)
        cuts[divisor] = Cut(pruned, by_hand, cost.macs, cost.params)
    return dense, {"macs": full.macs, "params": full.params}, cuts


@torch.no_grad()
def _check_same(by_hand: nn.Module, pruned: nn.Module, images: Tensor) -> None:
    expected = pruned(images)
    difference = float((by_hand(images) - expected).abs().max() / expected.abs().max())
    if not difference <= CLOSE:
        raise ValueError(f"the network built by hand computes something else: {difference:.1e} off")


def measure(setting: Setting, backends: Iterable[str], device: str, rounds: int | None = None) -> Record:
    """Return the times of one network, dense, pruned and built by hand.

    Args:
        setting: The network.
        backends: Of `lightning_prune.latency`.
        device: Where to run.
        rounds: Timed forwards of each; None takes those of the setting.
    """
    images = torch.randn(setting.images, generator=torch.Generator().manual_seed(0))
    dense, cost, cuts = cut(setting, images)
    first = setting.divisors[0]
    models = {"dense": dense}
    for divisor, made in cuts.items():
        models |= {f"pruned {divisor}": made.pruned, f"by hand {divisor}": made.by_hand}
    models["by hand again"] = copy.deepcopy(cuts[first].by_hand)
    record: Record = {"dense": cost, "pruned": {str(d): {"macs": c.macs, "params": c.params} for d, c in cuts.items()}}
    record["times"] = {}
    for backend in backends:
        start = time.perf_counter()
        found = compare(models, images, backend, device=device, rounds=rounds or setting.rounds, threads=1)
        record["times"][backend] = {**_rows(found, setting.divisors), "seconds": round(time.perf_counter() - start)}
        torch._dynamo.reset()
    return record


def _rows(found: Mapping[str, Measurement], divisors: Iterable[int]) -> Record:
    """Return times and their ratios, each as median, first and third quartile."""
    dense, again = found["dense"], found["by hand again"]
    rows: Record = {"dense_ms": rounded(dense.ms)}
    for divisor in divisors:
        pruned, by_hand = found[f"pruned {divisor}"], found[f"by hand {divisor}"]
        rows[str(divisor)] = {
            "ms": rounded(pruned.ms),
            "of dense": rounded(pruned.relative_to(dense)),
            "of by hand": rounded(pruned.relative_to(by_hand)),
        }
    first = next(iter(divisors))
    return {**rows, "by hand again of by hand": rounded(again.relative_to(found[f"by hand {first}"]))}


def rounded(values: Quartiles) -> list[float]:
    """Return median, first and third quartile."""
    return [round(value, 3) for value in values]


def tables(results: Mapping[str, Record]) -> str:
    """Return what the README shows: pruned against dense and by hand, and the divisors."""
    head = "| network | backend | dense ms | pruned ms | of dense | of by hand | by hand, twice |"
    rows = [head, "| --- | --- |" + " ---: |" * 5]
    divisors = ["| network | backend |" + "".join(f" {d} |" for d in sorted(DIVISORS)), "| --- | --- |" + " ---: |" * 4]
    for name, record in results.items():
        for backend, times in record["times"].items():
            first = times[next(iter(record["pruned"]))]
            cells = [times["dense_ms"], first["ms"], first["of dense"], first["of by hand"]]
            shown = [f"{cells[0][0]:.1f}", f"{cells[1][0]:.1f}", *(spread(one) for one in cells[2:])]
            rows.append(f"| {name} | {backend} | {' | '.join(shown)} | {spread(times['by hand again of by hand'])} |")
            if len(record["pruned"]) > 1:
                tried = (times.get(str(d), {}).get("of dense") for d in sorted(DIVISORS))
                shown = [spread(one) if one else "" for one in tried]
                divisors.append(f"| {name} | {backend} | {' | '.join(shown)} |")
    return "\n".join([*rows, "", *divisors])


def spread(values: Iterable[float]) -> str:
    """Return a median with its quartiles, as in `1.00 [0.99, 1.01]`."""
    median, low, high = values
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Measure the networks asked for, write `results/latency.json`, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="names of networks; all by default")
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), help="eager, compile, onnxruntime")
    parser.add_argument("--rounds", type=int, help="timed forwards of each network")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: its file is latency_cuda.json")
    parser.add_argument("--again", action="store_true", help="also what was measured at this commit")
    parser.add_argument("--table", action="store_true", help="print what the file holds, measure nothing")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    file = "latency" if device.type == "cpu" else f"latency_{device.type}"
    if arguments.table:
        print(tables(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["results"]))
        return
    torch.set_num_threads(1)
    environment = describe_environment("torchvision", "onnx", "onnxruntime")
    if device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(device)
    config = {
        "target": {"macs": SHARE},
        "importance": "magnitude, global, random weights",
        "min_ratio": MIN_RATIO,
        "images": "one of 3 x 224 x 224, float32",
        "values": "median, first and third quartile",
        "rounds": {setting.name: arguments.rounds or setting.rounds for setting in settings()},
    }
    results = {} if arguments.again else earlier_results(file, environment["commit"])
    for setting in settings():
        if setting.name not in results and setting.name in (arguments.only or setting.name):
            results[setting.name] = measure(setting, arguments.backends, arguments.device, arguments.rounds)
            write_result(file, config, environment, results)
    print(tables(results))


if __name__ == "__main__":
    main()
