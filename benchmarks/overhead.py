"""What `PruningCallback` costs in epochs in which it does not prune: before its schedule, as masks, and after it.

Usage: `PYTHONPATH=. python benchmarks/overhead.py`, or `make bench`.

Several Trainers fit the same network to the same batches, each in a thread of its own, but strictly in turns of a few
batches, so that whatever slows the machine down slows all of them. Two of them have a plain network and no callback:
what one takes relative to the other is the noise. Another one has the callback, and one its dynamic layers without it,
which tells the two costs apart. An epoch counts with all that Lightning does around it, in time of the processor, from
which other work on the machine takes less away than from the clock. A ratio is taken inside each turn, to the mean of
the two plain ones; its medians over the epochs, one for each turn of an epoch (the first one has what is done once),
are added up by the share that the turn has of the epoch, so that what disturbs single turns does not spoil an epoch.
The 95 % interval is that of epochs drawn anew. The time inside the callback's own hooks stands beside it, as a share of
the epoch. An epoch of 16 tiny batches, as in the demo, shows the fixed costs; one of 8 batches of images as large as
CIFAR's is still a short one.

Such ratios are no better than the machine is quiet. What a callback does in these epochs does not depend on how large
the batches are, so it is also told in milliseconds, from epochs of as many batches of two small images: there the same
few milliseconds are not lost in the noise of the rest. Beside the time of the real epoch they give the share of the
aim.

Three moments: before the schedule all layers are dynamic and keep all their channels; "masked" is how a network is that
was cut while its schedule goes on, or for good with `compact="never"`, compared with the small one; compacted, the
network is small and plain, and the callback is still there. What masks cost by themselves is asked by `step.py`.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import describe_environment, summarize, write_result
from examples.digits import DigitsResNet
from lightning_prune import ChannelMutator, PruningCallback, export_pruned

AIM = 1  # percent of an epoch
WIDTH = 16
WARM_UP = 3
LIGHT_ROUNDS = 120
DRAWS = 2000  # of the epochs, for an interval
PLAIN, AGAIN, LAYERS, CALLBACK = "plain", "plain again", "dynamic layers alone", "with the callback"
MOMENTS = BEFORE, MASKED, AFTER = "before the schedule", "masked", "after compaction"

Times = np.ndarray[Any, np.dtype[np.float64]]


class Epoch(NamedTuple):
    """How long an epoch is, how many batches of it are one turn, and how many such epochs are compared."""

    side: int
    batches: int
    batch: int
    turn: int
    rounds: int


EPOCHS = {"images of 32 x 32": Epoch(32, 8, 32, 1, 16), "images of 8 x 8": Epoch(8, 16, 64, 4, 32)}
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Of glibc: else each thread has memory of its own, and the same network is up to 5 % slower in one than in another."""


class Turns:
    """Lets one thread at a time go on; another one begins each round, so that none always follows the same one."""

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
        number, turn = divmod(self.done, self.number)
        return (turn + number) % self.number


class HookClock:
    """Adds up the time inside the hooks that a callback overrides."""

    def __init__(self, callback: Callback) -> None:
        self.seconds = 0.0
        for name in dir(Callback):
            if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name):
                setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = hook(*args, **kwargs)
            self.seconds += time.thread_time() - start
            return result

        return timed

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


class EpochClock(Callback):
    """First of the callbacks: waits for the turns, and adds up the time of each epoch, all hooks included."""

    def __init__(self, turns: Turns, place: int, length: int, hooks: HookClock | None) -> None:
        self.turns, self.place, self.length, self.hooks = turns, place, length, hooks
        self.start: float | None = None
        self.turn: list[float] = []
        self.seconds: list[list[float]] = []  # of each epoch those of its turns
        self.shares: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.length:
            return
        self._stop()
        if batch_idx == 0 and self.turn:
            self._end_epoch()
        self.turns.wait(self.place)
        self.start = time.thread_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.start is not None:
            self.turn.append(time.thread_time() - self.start)
            self.turns.end()

    def _end_epoch(self) -> None:
        self.seconds.append(self.turn)
        if self.hooks is not None:
            self.shares.append(self.hooks.take() / sum(self.turn))
        self.turn = []


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
    count = epoch.batches * epoch.batch
    images, labels = torch.randn(count, 1, epoch.side, epoch.side), torch.randint(10, (count,))
    return DataLoader(TensorDataset(images, labels), epoch.batch)


def take_times(
    models: Mapping[str, LightningModule], callback: PruningCallback, epoch: Epoch
) -> tuple[dict[str, Times], list[float]]:
    """Return the seconds `[epochs, turns]` of each side, and the share of each epoch that is inside the hooks."""
    turns, clocks, threads, failed, rounds = Turns(len(models)), {}, [], [], epoch.rounds
    batches = make_batches(epoch)
    for place, (name, model) in enumerate(models.items()):
        ours = [callback] if name == CALLBACK else []
        clocks[name] = EpochClock(turns, place, epoch.turn, HookClock(callback) if ours else None)
        trainer = make_trainer([clocks[name], *ours], WARM_UP + rounds + 1)

        def fit(trainer: Trainer = trainer, model: LightningModule = model) -> None:
            try:
                trainer.fit(model, batches)
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
    times = {name: np.array(clock.seconds[WARM_UP : WARM_UP + rounds]) for name, clock in clocks.items()}
    return times, clocks[CALLBACK].shares[WARM_UP : WARM_UP + rounds]


def measure(dense: LightningModule, when: str, epoch: Epoch) -> dict[str, Any]:
    """Return what the epochs of each side take at one moment, and what is added to them."""
    times, shares = take_times(*sides(dense, when, epoch), epoch)
    light = epoch._replace(side=8, batch=2, turn=epoch.batches, rounds=LIGHT_ROUNDS)
    few, _ = take_times(*sides(dense, when, light), light)
    medians = {name: round(1e3 * float(np.median(t.sum(1))), 2) for name, t in times.items()}
    base = few[LAYERS] if when == MASKED else plain_of(few)
    added = drawn_anew(1e3 * (few[CALLBACK] - base), lambda values: np.median(values, 1).sum(1))
    whole = medians[LAYERS if when == MASKED else PLAIN]
    percent = {name: round(100 * value / whole, 3) for name, value in added.items()}
    return {
        "median ms of an epoch": medians,
        **ratios(times),
        "percent of the epoch inside hooks": summarize([round(100 * share, 3) for share in shares]),
        "ms that the callback adds": added,
        "percent of the epoch": percent,
        "is under the aim": percent["high"] < AIM,
    }


def ratios(times: Mapping[str, Times]) -> dict[str, Any]:
    """Return what the callback and the dynamic layers cost, and what the same costs without either.

    Args:
        times: Side -> seconds `[epochs, turns]`; the dynamic layers alone may be missing.
    """
    plain = plain_of(times)
    found = {"with the callback / plain": epoch_ratio(times[CALLBACK], plain)}
    if LAYERS in times:
        found["dynamic layers alone / plain"] = epoch_ratio(times[LAYERS], plain)
        found["with the callback / dynamic layers alone"] = epoch_ratio(times[CALLBACK], times[LAYERS])
    return {**found, "plain again / plain": epoch_ratio(times[AGAIN], times[PLAIN])}


def epoch_ratio(ours: Times, base: Times) -> dict[str, float]:
    """Return how long an epoch takes relative to another one, with a 95 % interval.

    Args:
        ours: Seconds `[epochs, turns]`.
        base: The same of the other side, measured beside them.
    """
    shares = np.median(base, 0) / np.median(base, 0).sum()
    return drawn_anew(ours / base, lambda values: np.median(values, 1) @ shares)


def drawn_anew(values: Times, estimate: Callable[[Times], Times]) -> dict[str, float]:
    """Return an estimate with its 95 % interval.

    Args:
        values: `[epochs, turns]`.
        estimate: `[draws, epochs, turns]` -> `[draws]`.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979, doi:10.1214/aos/1176344552; percentiles.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(estimate(values[drawn]), (0.025, 0.975))
    found = {"median": estimate(values[None])[0], "low": low, "high": high}
    return {name: round(float(value), 4) for name, value in found.items()}


def plain_of(times: Mapping[str, Times]) -> Times:
    """Return the mean of the two plain sides."""
    found: Times = (times[PLAIN] + times[AGAIN]) / 2
    return found


def converted(model: LightningModule, epoch: Epoch) -> LightningModule:
    """Return a copy with dynamic layers that keep everything."""
    twin = copy.deepcopy(model)
    ChannelMutator(example_input=torch.randn(2, 1, epoch.side, epoch.side)).prepare_from_supernet(twin)
    return twin


def sides(dense: LightningModule, when: str, epoch: Epoch) -> tuple[dict[str, LightningModule], PruningCallback]:
    """Return the networks that are compared at one moment, and the callback of one of them."""
    quiet = {"verbose": False, "report": False}
    if when == BEFORE:
        last = WARM_UP + epoch.rounds  # its epoch is not counted
        late = PruningCallback({"macs": 0.5}, schedule={"kind": "one_shot", "begin": last, "end": last + 1}, **quiet)
        plain = {PLAIN: copy.deepcopy(dense), AGAIN: copy.deepcopy(dense)}
        return {**plain, LAYERS: converted(dense, epoch), CALLBACK: copy.deepcopy(dense)}, late
    early = PruningCallback({"macs": 0.5}, schedule="one_shot", compact="never" if when == MASKED else "end", **quiet)
    pruned = copy.deepcopy(dense)
    make_trainer([early], 2).fit(pruned, make_batches(epoch))
    models = {PLAIN: export_pruned(pruned), AGAIN: export_pruned(pruned)}
    if when == MASKED:
        models[LAYERS] = copy.deepcopy(pruned)
    return {**models, CALLBACK: pruned}, early


def main() -> None:
    """Measure epochs of both lengths and write `results/overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    if not os.environ.keys() >= ALLOCATOR.keys():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ALLOCATOR})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    environment = describe_environment("lightning")
    dense, results = DigitsResNet(WIDTH), {}
    for name, epoch in EPOCHS.items():
        results[name] = {}
        for when in MOMENTS:
            rows = results[name][when] = measure(dense, when, epoch)
            print(f"{name}, {when}")
            for row, values in rows.items():
                print(f"  {row:44}{values}", flush=True)
    config = {
        "network": f"ResNet-20, width {WIDTH}",
        "allocator": ALLOCATOR,
        "epochs": {name: epoch._asdict() for name, epoch in EPOCHS.items()},
        "aim": f"less than {AIM} % of a plain epoch added by the callback; masked, of one of the same masks without it",
        "added": f"from {LIGHT_ROUNDS} epochs of as many batches of two images of 8 x 8",
    }
    write_result("overhead", config, environment, results)


if __name__ == "__main__":
    main()
