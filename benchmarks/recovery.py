"""What recovery is worth: accuracy at a cost with and without it, at equal epochs, seeds and batches.

Usage: `PYTHONPATH=. python benchmarks/recovery.py [--sweep] [--folder nets]`; `--table` only prints the table.

Every row prunes a trained network with `PruningCallback(recovery=[...])` while it trains on; the rows of a seed see the
same batches, so that differences to the plain row are paired. A row is written as soon as it is done; a run that was
stopped goes on where it was. `--sweep` first tries arguments, on seeds that the table does not have.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from benchmarks.common import RESULTS, describe_environment, write_result
from benchmarks.quality import SEEDS, SHARES, TRAINING, accuracy, be_quiet, dense_accuracy, fit, trained
from benchmarks.quality_sides import count_macs
from benchmarks.recovery_table import render
from lightning_prune import PruningCallback, export_pruned
from lightning_prune.recovery import (
    BNScaleL1,
    Distillation,
    GroupLasso,
    GroupNormSparsity,
    GrowingRegularization,
    Recalibration,
    Recovery,
)

MODELS = ("ResNet-20", "MobileNetV2")
SWEEP_SEEDS = (5, 6, 7)
SWEEP_SHARE = 0.15
LATER = 0.25

Key = tuple[str, int, float, str]  # (model, seed, share of MACs, setting)
Row = dict[str, Any]


class Setting(NamedTuple):
    """A way to recover, and when it prunes.

    Args:
        recovery: Makes the objects.
        begin: First firing, as a share of the epochs; the schedule ends at half of them. Sparse training comes before.
        importance: Of channels.
    """

    recovery: Callable[[], list[Recovery]]
    begin: float = 0.0
    importance: str = "magnitude"


SETTINGS = {
    "plain": Setting(list),
    "recalibration": Setting(lambda: [Recalibration()]),
    "distillation": Setting(lambda: [Distillation()]),
    "sparse training": Setting(lambda: [GroupNormSparsity()], LATER),
    "all": Setting(lambda: [Recalibration(), Distillation(), GroupNormSparsity()], LATER),
}


def only(kind: Callable[..., Recovery], *arguments: float, **more: float) -> Callable[[], list[Recovery]]:
    """Return what makes a list of one object."""
    return lambda: [kind(*arguments, **more)]


SWEPT = {
    "plain": Setting(list),
    "plain, later": Setting(list, LATER),
    **{
        f"Distillation(temperature={t:g}, alpha={a:g})": Setting(only(Distillation, t, a))
        for t, a in ((1.0, 0.5), (2.0, 0.5), (4.0, 0.5), (8.0, 0.5), (4.0, 0.3), (4.0, 0.7), (4.0, 0.9))
    },
    **{
        f"{kind.__name__}({strength:g}), later": Setting(only(kind, strength), LATER)
        for kind in (GroupLasso, GroupNormSparsity)
        for strength in (1e-4, 1e-3)
    },
    "BNScaleL1(0.001), later": Setting(only(BNScaleL1, 1e-3), LATER, "bn_scale"),
    "GrowingRegularization(0.01, every=1), later": Setting(only(GrowingRegularization, 1e-2, every=1), LATER),
}
"""The settings whose arguments are tried."""


class AfterLastFiring(Callback):
    """Takes a copy of the network when the target has just been met, before it learns any more."""

    def __init__(self, pruning: PruningCallback) -> None:
        super().__init__()
        self.pruning = pruning
        self.net: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look once."""
        if self.net is None and self.pruning.is_done:
            net = pl_module.net
            assert isinstance(net, nn.Module), "a Classifier has one"
            self.net = export_pruned(net)


def recover(model: str, seed: int, share: float, setting: Setting, folder: Path) -> Row:
    """Prune and train on; accuracies in percent, just after the last firing ("pruned") and at the end ("tuned")."""
    dense, data = trained(model, seed, folder)
    net, training = copy.deepcopy(dense), TRAINING[model]
    schedule = {"kind": "cubic", "begin": setting.begin, "end": 0.5}
    pruning = PruningCallback(
        {"macs": share},
        setting.importance,
        schedule,
        divisor=1,
        verbose=False,
        report=False,
        recovery=setting.recovery(),
    )
    last = AfterLastFiring(pruning)
    fit(net, data, 200 + seed, training.gradual_epochs, training.tuning_rate, pruning, last)
    macs = round(count_macs(net) / count_macs(dense), 4)
    dense_found = dense_accuracy(model, seed, folder)
    return {"dense": dense_found, "macs": macs, "pruned": accuracy(last.net, data), "tuned": accuracy(net, data)}


def keys_of(*, sweep: bool) -> list[Key]:
    """Return the rows of the table, or those of the sweep."""
    if sweep:
        return [("ResNet-20", seed, SWEEP_SHARE, name) for seed in SWEEP_SEEDS for name in SWEPT]
    blocks = [(model, share) for share in (0.15, 0.5, 0.3) for model in MODELS]  # whole ones, should it be stopped
    return [(model, seed, share, name) for model, share in blocks for seed in SEEDS for name in SETTINGS]


def results_of(keys: Sequence[Key], settings: dict[str, Setting], folder: Path) -> Iterator[Row]:
    """Compute rows one after another, on one thread."""
    be_quiet()
    for model, seed, share, name in keys:
        began = time.process_time()
        row = recover(model, seed, share, settings[name], folder)
        yield {"key": [model, seed, share, name], **row, "cpu_s": round(time.process_time() - began, 1)}


def read_rows(name: str) -> list[Row]:
    """Return the rows that are done."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def main() -> None:
    """Compute what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=None, help="where trained networks are kept; default: nowhere")
    parser.add_argument("--sweep", action="store_true", help="try arguments, on seeds of their own")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that are done")
    arguments = parser.parse_args()
    name = "recovery_sweep" if arguments.sweep else "recovery"
    rows = read_rows(name)
    if not arguments.table:
        settings = SWEPT if arguments.sweep else SETTINGS
        environment = describe_environment("lightning", "scikit-learn")
        done = {tuple(row["key"]) for row in rows}
        keys = [key for key in keys_of(sweep=arguments.sweep) if key not in done]
        with tempfile.TemporaryDirectory() as temporary:
            for row in results_of(keys, settings, arguments.folder or Path(temporary)):
                rows.append(row)
                print(row, flush=True)
                write_result(name, config(), environment, rows)
    print(render(rows))


def config() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "data": "scikit-learn digits at 16 x 16, 500 training images, shifts up to 3 pixels, Gaussian noise 0.6",
        "training": {model: TRAINING[model]._asdict() for model in MODELS},
        "shares of MACs": SHARES,
        "schedule": "cubic, from the first epoch (or a quarter of them) up to half of them, divisor 1",
    }


if __name__ == "__main__":
    main()
