"""What `Distillation` takes: the time of a training step and the memory, beside a run without it.

Usage: `PYTHONPATH=. python benchmarks/distillation.py`, or `make bench`.

ResNet-20 is pruned in one shot to half of its MACs and trained on; with `Distillation` the dense network of the start
teaches, which is one more forward without gradients. Each run is a process of its own, the two kinds take turns; steps
are those after the first few. Memory is what the process takes above what it held before `fit`, at its peak.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import describe_environment, summarize, write_result
from benchmarks.process import run_apart
from benchmarks.quality_models import MODELS, Classifier
from lightning_prune import PruningCallback
from lightning_prune.recovery import Distillation
from tests.examine import measured

BATCH, STEPS, WARM_UP, ROUNDS = 64, 10, 3, 5
SIDES = ("plain", "distillation")


class StepClock(Callback):
    """Takes the processor time of every step."""

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, list[float]()

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def fit(side: str) -> dict[str, float]:
    """Return the median seconds of a step, and the MiB at the peak of a fit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = torch.randn(STEPS * BATCH, 1, 32, 32), torch.randint(10, (STEPS * BATCH,))
    clock, recovery = StepClock(), [Distillation()] if side == "distillation" else []
    once = {"kind": "one_shot", "begin": 0}
    pruning = PruningCallback({"macs": 0.5}, schedule=once, recovery=recovery, verbose=False, report=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,  # the network is small from the second one on
        callbacks=[clock, pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(MODELS["ResNet-20"](), 0.1)
    memory = measured(lambda: trainer.fit(model, DataLoader(TensorDataset(images, labels), BATCH)))["peak_mib"]
    return {"step_s": statistics.median(clock.seconds[STEPS + WARM_UP :]), "mib": memory}


def main() -> None:
    """Measure both sides in turns and write `results/distillation.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    environment = {**describe_environment("lightning"), "threads": 1}
    found = {side: list[dict[str, float]]() for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(run_apart(fit, side, limit_s=600))
    pairs = list(zip(*(found[side] for side in SIDES), strict=True))
    results = {
        "step": summarize([with_it["step_s"] / plain["step_s"] for plain, with_it in pairs]),
        "memory": summarize([with_it["mib"] / plain["mib"] for plain, with_it in pairs]),
        **{side: {key: summarize([one[key] for one in found[side]]) for key in ("step_s", "mib")} for side in SIDES},
    }
    config = {"network": "ResNet-20, half of its MACs", "batch": f"{BATCH} images of 32 x 32 pixels", "rounds": rounds}
    print(results)
    print(write_result("distillation", config, environment, results))


if __name__ == "__main__":
    main()
