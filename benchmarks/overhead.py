"""What `PruningCallback` costs in epochs in which it does not prune, before its schedule and after it.

Usage: `PYTHONPATH=. python benchmarks/overhead.py`, or `make bench`.

Several Trainers fit the same network to the same batches, each in a thread of its own, but strictly in turns: one epoch
each. Before the schedule all layers are dynamic and keep all their channels; after it the network is small and plain,
and the callback is still there. Its epoch is compared with the mean of two epochs without it in the same round, one of
each Trainer that has none; the median over the rounds comes with a 95 % interval, and that of the two without it shows
the noise. It is the time of the processor, from which other work on the machine takes less away than from the clock;
that inside the callback's own hooks stands beside it, as a share of the epoch. An epoch of 16 tiny batches, as in the
demo, shows the fixed costs; one of 8 batches of images as large as CIFAR's is still a short one.
"""

from __future__ import annotations

import argparse
import copy
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import compare_times, describe_environment, median_interval, summarize, write_result
from examples.digits import DigitsResNet
from lightning_prune import PruningCallback, export_pruned

AIM = 1.01
WIDTH, BATCH = 16, 64
WARM_UP = 3


class Epoch(NamedTuple):
    """How long an epoch is: pixels on a side of the images, batches, and how many such epochs are compared."""

    side: int
    batches: int
    rounds: int


EPOCHS = {"images of 32 x 32": Epoch(32, 8, 16), "images of 8 x 8": Epoch(8, 16, 80)}
SIDES = ("without", "with the callback", "without again")


class Turns:
    """Lets one thread at a time go on, for one epoch; another one begins each round."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.done = 0
        self.condition = threading.Condition()

    def wait(self, place: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self._next() == place)

    def end(self) -> None:
        with self.condition:
            self.done += 1
            self.condition.notify_all()

    def _next(self) -> int:
        epoch, turn = divmod(self.done, self.number)
        return (turn + epoch) % self.number


class HookClock:
    """Adds up the time inside the hooks that a callback overrides."""

    def __init__(self, callback: Callback) -> None:
        self.seconds = 0.0
        for name in dir(Callback):
            if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name):
                setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = hook(*args, **kwargs)
            self.seconds += time.process_time() - start
            return result

        return timed

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


class Begin(Callback):
    """First of the callbacks: waits for the turn, then starts the clock."""

    def __init__(self, turns: Turns, place: int) -> None:
        self.turns, self.place, self.start = turns, place, 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.turns.wait(self.place)
        self.start = time.process_time()


class End(Callback):
    """Last of the callbacks: stops the clock, and lets the next one begin."""

    def __init__(self, begin: Begin, clock: HookClock | None) -> None:
        self.begin, self.clock = begin, clock
        self.seconds: list[float] = []
        self.shares: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.process_time() - self.begin.start)
        if self.clock is not None:
            self.shares.append(self.clock.take() / self.seconds[-1])
        self.begin.turns.end()


def make_trainer(callbacks: Sequence[Callback], epochs: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def make_batches(epoch: Epoch) -> DataLoader[Any]:
    count = epoch.batches * BATCH
    images, labels = torch.randn(count, 1, epoch.side, epoch.side), torch.randint(10, (count,))
    return DataLoader(TensorDataset(images, labels), BATCH)


def measure(models: Mapping[str, LightningModule], callback: PruningCallback, epoch: Epoch) -> dict[str, Any]:
    """Return the epoch times of each side, relative to the one without the callback."""
    turns, ends, threads, failed, rounds = Turns(len(models)), {}, [], [], epoch.rounds
    for place, (name, model) in enumerate(models.items()):
        begin = Begin(turns, place)
        ours = [callback] if name == SIDES[1] else []
        ends[name] = End(begin, HookClock(callback) if ours else None)
        trainer = make_trainer([begin, *ours, ends[name]], WARM_UP + rounds + 1)

        def fit(trainer: Trainer = trainer, model: LightningModule = model) -> None:
            try:
                trainer.fit(model, make_batches(epoch))
            except BaseException as error:
                failed.append(error)

        threads.append(threading.Thread(target=fit, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not failed:
            thread.join(0.5)
    if failed:
        raise failed[0]
    times = {name: tuple(end.seconds[WARM_UP : WARM_UP + rounds]) for name, end in ends.items()}
    shares = [round(100 * share, 3) for share in ends[SIDES[1]].shares[WARM_UP : WARM_UP + rounds]]
    return {**compare_times(times, SIDES[0]), **ratios(times), "percent of the epoch inside hooks": summarize(shares)}


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return what the callback costs, whether that is under the aim, and what the same costs without it."""
    rounds = list(zip(*(times[name] for name in SIDES), strict=True))
    cost = median_interval([2 * ours / (one + other) for one, ours, other in rounds])
    noise = median_interval([other / one for one, _, other in rounds])
    return {"ratio": cost, "ratio of the two without": noise, "is under the aim": cost["high"] < AIM}


def compare(dense: LightningModule, epoch: Epoch) -> dict[str, Any]:
    """Return what epochs of one length take before the schedule and after it."""
    last = WARM_UP + epoch.rounds  # its epoch is not counted
    quiet = {"verbose": False, "report": False}
    late = PruningCallback({"macs": 0.5}, schedule={"kind": "one_shot", "begin": last, "end": last + 1}, **quiet)
    results = {"before the schedule": measure({name: copy.deepcopy(dense) for name in SIDES}, late, epoch)}
    early = PruningCallback({"macs": 0.5}, schedule="one_shot", **quiet)
    pruned = copy.deepcopy(dense)
    make_trainer([early], 2).fit(pruned, make_batches(epoch))
    small = {name: pruned if name == SIDES[1] else export_pruned(pruned) for name in SIDES}
    return {**results, "after the schedule": measure(small, early, epoch)}


def main() -> None:
    """Measure epochs of both lengths and write `results/overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    environment = describe_environment("lightning")
    dense, results = DigitsResNet(WIDTH), {}
    for name, epoch in EPOCHS.items():
        results[name] = compare(dense, epoch)
        for when, rows in results[name].items():
            print(f"{name}, {when}")
            for side, row in rows.items():
                print(f"  {side:36}{row}", flush=True)
    config = {
        "network": f"ResNet-20, width {WIDTH}",
        "batch": BATCH,
        "epochs": {name: epoch._asdict() for name, epoch in EPOCHS.items()},
        "aim": f"an epoch with the callback at most {AIM} of one without",
    }
    write_result("overhead", config, environment, results)


if __name__ == "__main__":
    main()
