"""Accuracy at a cost: networks that were trained once, pruned by this library and by Torch-Pruning to the same MACs.

Usage: `PYTHONPATH=. python benchmarks/quality.py [--seeds 0 1] [--workers 2]`; `--table` only prints the tables.

Both sides start from the same trained network, use the same kind of criterion, and are fine-tuned alike: same epochs,
batches, optimizer. A row is written as soon as it is done; a run that was stopped goes on where it was.
Accuracy does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from benchmarks.common import RESULTS, describe_environment, write_result
from benchmarks.process import FORK
from benchmarks.quality_data import HardDigits, training_batches
from benchmarks.quality_models import MODELS, Classifier
from benchmarks.quality_sides import TOLERANCE, count_macs, prune_ours, prune_theirs
from benchmarks.quality_table import render

SEEDS = (0, 1, 2, 3, 4)
SHARES = (0.5, 0.3, 0.15)
CRITERIA = ("magnitude", "taylor")
SCHEDULES = ("one_shot", "linear", "cubic")
SCHEDULE_SHARE = 0.15
SIDES = ("ours", "theirs")

Key = tuple[Any, ...]
Row = dict[str, Any]


class Training(NamedTuple):
    """How a network is trained, and fine-tuned after pruning.

    Args:
        epochs: Of training, ten batches of 50 images each.
        rate: Peak learning rate.
        tuning_epochs: Of fine-tuning.
        tuning_rate: Its peak learning rate.
        gradual_epochs: Of a fit in which a schedule prunes.
    """

    epochs: int
    rate: float
    tuning_epochs: int = 5
    tuning_rate: float = 0.03
    gradual_epochs: int = 12


TRAINING = {
    "ResNet-20": Training(20, 0.1),
    "MobileNetV2": Training(25, 0.1),
    "DenseNet": Training(15, 0.1),
    "ViT": Training(75, 2e-3, 10, 5e-4, 24),
}


def comparisons(seeds: Iterable[int]) -> list[Key]:
    """Return (kind, seed, model, scope, criterion, share) of every row of the comparison."""
    scopes = {name: ("global", "local") if name == "ResNet-20" else ("global",) for name in MODELS}
    return [
        ("comparison", seed, model, scope, criterion, share)
        for criterion in CRITERIA
        for seed in seeds
        for model in MODELS
        for scope in scopes[model]
        for share in SHARES
    ]


def schedules(seeds: Iterable[int]) -> list[Key]:
    """Return (kind, seed, model, schedule, share) of every row of the schedules."""
    return [
        ("schedule", seed, model, schedule, SCHEDULE_SHARE)
        for seed in seeds
        for model in ("ResNet-20", "MobileNetV2", "ViT")
        for schedule in SCHEDULES
    ]


def fit(net: nn.Module, data: HardDigits, seed: int, epochs: int, rate: float, *callbacks: Callback) -> None:
    """Train a network in place; the same seed draws the same batches."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net, rate).train(), data)  # Lightning trains in the mode that it finds


@torch.inference_mode()
def accuracy(net: nn.Module, data: HardDigits) -> float:
    """Return the percentage of the test images that are named right."""
    net.eval()
    right = [(net(images).argmax(1) == labels).float().mean() for images, labels in data.test]
    return round(100 * float(torch.stack(right).mean()), 3)


@cache
def trained(model: str, seed: int, folder: Path) -> tuple[nn.Module, HardDigits]:
    """Return a trained network and its data; the weights stay in a folder for the other rows."""
    data, path = HardDigits(seed), folder / f"{model}_{seed}.pt"
    torch.manual_seed(seed)
    net = MODELS[model]()
    if not path.exists():
        fit(net, data, seed, TRAINING[model].epochs, TRAINING[model].rate)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(net.state_dict(), part)
        part.rename(path)
    net.load_state_dict(torch.load(path))
    return net, data


@cache
def dense_accuracy(model: str, seed: int, folder: Path) -> float:
    """Return the accuracy of a trained network."""
    return accuracy(*trained(model, seed, folder))


def compare(seed: int, model: str, scope: str, criterion: str, share: float, folder: Path) -> Row:
    """Prune with both libraries; accuracies are in percent, of the pruned network and once it is fine-tuned."""
    dense, data = trained(model, seed, folder)
    batches = training_batches(data, seed)
    ours = prune_ours(dense, share, criterion, scope, batches)
    theirs = prune_theirs(dense, count_macs(ours), criterion, scope, batches)
    if abs(theirs.macs / count_macs(ours) - 1) > TOLERANCE:  # one local ratio has few different costs: ours follows
        ours = prune_ours(dense, theirs.macs / count_macs(dense), criterion, scope, batches)
    row: Row = {"dense": dense_accuracy(model, seed, folder), "ratio": theirs.ratio}
    settings = TRAINING[model]
    for side, net in zip(SIDES, (ours, theirs.net), strict=True):
        macs = count_macs(net) / count_macs(dense)
        found = {"macs": round(macs, 4), "pruned": accuracy(net, data)}
        fit(net, data, 100 + seed, settings.tuning_epochs, settings.tuning_rate)
        row[side] = {**found, "tuned": accuracy(net, data)}
    return row


def follow(seed: int, model: str, schedule: str, share: float, folder: Path) -> Row:
    """Prune while the network trains on, with the callback's defaults, the divisor apart."""
    from lightning_prune import PruningCallback

    dense, data = trained(model, seed, folder)
    net, settings = copy.deepcopy(dense), TRAINING[model]
    callback = PruningCallback({"macs": share}, schedule=schedule, divisor=1, verbose=False, report=False)
    fit(net, data, 200 + seed, settings.gradual_epochs, settings.tuning_rate, callback)
    macs = round(count_macs(net) / count_macs(dense), 4)
    return {"dense": dense_accuracy(model, seed, folder), "macs": macs, "tuned": accuracy(net, data)}


def train(job: tuple[int, str, Path]) -> None:
    """Train one network on one thread, for the rows that follow."""
    seed, model, folder = job
    be_quiet()
    trained(model, seed, folder)


def be_quiet() -> None:
    """Use one thread, and say nothing of how Lightning trains."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def run(job: tuple[Key, Path]) -> Row:
    """Compute one row on one thread."""
    (kind, *rest), folder = job
    be_quiet()
    began = time.process_time()
    row = compare(*rest, folder) if kind == "comparison" else follow(*rest, folder)
    return {"key": [kind, *rest], **row, "cpu_s": round(time.process_time() - began, 1)}


def results_of(keys: Sequence[Key], folder: Path, workers: int) -> Iterator[Row]:
    """Compute rows one after another, or side by side; then the networks are trained first."""
    if workers == 1:
        yield from (run((key, folder)) for key in keys)
        return
    with ProcessPoolExecutor(workers, mp_context=FORK) as pool:
        networks = dict.fromkeys((seed, model) for _, seed, model, *_ in keys)
        list(pool.map(train, [(*network, folder) for network in networks]))
        futures = [pool.submit(run, (key, folder)) for key in keys]
        yield from (future.result() for future in as_completed(futures))


def read_rows() -> list[Row]:
    """Return the rows that are done."""
    path = RESULTS / "quality.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def main() -> None:
    """Compute what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--folder", type=Path, default=None, help="where trained networks are kept; default: nowhere")
    parser.add_argument("--table", action="store_true", help="only print the tables of the rows that are done")
    arguments = parser.parse_args()
    rows = read_rows()
    if not arguments.table:
        environment = describe_environment("lightning", "torch-pruning", "scikit-learn")
        done = {tuple(row["key"]) for row in rows}
        # magnitude first, then the schedules; of Taylor the deepest cuts first
        wanted = sorted(comparisons(SEEDS) + schedules(SEEDS), key=lambda key: key[-1] if "taylor" in key else 0)
        order = {key: place for place, key in enumerate(wanted)}
        keys = [key for key in wanted if key[1] in arguments.seeds and key not in done]
        with tempfile.TemporaryDirectory() as temporary:
            for row in results_of(keys, arguments.folder or Path(temporary), arguments.workers):
                rows = sorted([*rows, row], key=lambda done: order.get(tuple(done["key"]), -1))
                print(row, flush=True)
                write_result("quality", config(), environment, rows)
    print(render(rows))


def config() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "data": "scikit-learn digits at 16 x 16, 500 training images, shifts up to 3 pixels, Gaussian noise 0.6",
        "training": {model: training._asdict() for model, training in TRAINING.items()},
        "shares of MACs": SHARES,
        "tolerance of MACs": TOLERANCE,
        "ours": "defaults of PruningCallback for the criterion, divisor 1",
        "theirs": "GroupMagnitudeImportance(p=2), GroupTaylorImportance(); global_pruning or local, no rounding",
    }


if __name__ == "__main__":
    main()
