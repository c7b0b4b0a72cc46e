"""Where a run stops x how it is optimized x its precision x how many processes: it trains, resumes and exports."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import export_pruned, load_pruned
from lightning_prune.ops import dynamic_ops
from tests.kills import forked, wait_for
from tests.lit import LitNet, loader, pruning, trainer
from tests.resumable import differences, outcome

EPOCHS = 5  # fires at 1 and 2, small from 3 on; one is left after the last stop
STOPS = {"conversion only": 0, "mid-schedule": 1, "compacted": 3}
OPTIMIZERS = ("sgd", "adamw", "two optimizers", "manual")
PRECISIONS = ("32-true", "bf16-mixed")
PROCESSES = (1, 2)


class Case(NamedTuple):
    stop: str
    optimizer: str
    precision: str
    processes: int

    def __str__(self) -> str:
        return ", ".join(map(str, self[:3])) + (", ddp" if self.processes > 1 else "")


CASES = [Case(*values) for values in itertools.product(STOPS, OPTIMIZERS, PRECISIONS, PROCESSES)]
QUICK = [  # every pair of values of two columns is in one of them
    Case(stop, optimizer, PRECISIONS[(k + m) % 2], PROCESSES[(k + m // 2) % 2])
    for (k, stop), (m, optimizer) in itertools.product(enumerate(STOPS), enumerate(OPTIMIZERS))
]


class ManualNet(LitNet):
    """Steps by hand, with one optimizer or with one for the head and one for the rest."""

    def __init__(self, optimizer: str = "manual") -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizers = self.optimizers()
        several = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in several:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in several:
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "manual":
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        body = [p for name, p in self.named_parameters() if not name.startswith("head")]
        return torch.optim.Adam(body, 1e-2), torch.optim.SGD(self.head.parameters(), 0.1, momentum=0.9)


def class_of(case: Case) -> type[LitNet]:
    return LitNet if case.optimizer in ("sgd", "adamw") else ManualNet


def fit(case: Case, path: Path, ckpt: Path | None = None) -> Trainer:
    torch.manual_seed(0)
    files = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    strategy = {"strategy": "ddp", "devices": 2} if case.processes > 1 else {}
    callback = pruning(importance={"name": "taylor", "batches": 1})
    run = trainer(callback, files, max_epochs=EPOCHS, path=path, precision=case.precision, **strategy)
    run.fit(class_of(case)(case.optimizer), loader(), ckpt_path=ckpt)
    return run


def _comparable(run: Trainer) -> dict[str, Any]:
    """Return the outcome; without the statistics of ranks above 0: manual steps do not share them, no file has them."""
    found = outcome(run)
    if run.global_rank > 0:
        found["weights"] = {name: found["weights"][name] for name, _ in run.lightning_module.named_parameters()}
    return found


def examine(case: Case, path: Path) -> None:
    """Train, resume, compare, export.

    Raises:
        AssertionError: Something is not as it has to be.
    """
    whole = fit(case, path / "whole")
    file = path / "whole" / f"epoch={STOPS[case.stop]}.ckpt"
    is_small = torch.load(file, weights_only=True)["state_dict"]["conv1.weight"].shape[0] < 16
    assert is_small is (case.stop == "compacted"), "the file is not of the place that the case names"
    resumed = fit(case, path / "resumed", file)
    wrong = differences(_comparable(whole), _comparable(resumed))
    assert not wrong, f"not as the run that nobody stopped: {wrong[:4]}"
    model = resumed.lightning_module
    assert not dynamic_ops(model), "not compacted"
    assert whole.callback_metrics["pruning/macs"] <= 0.5, "the target is not met"
    images = loader().dataset[:4][0]
    exported = export_pruned(model).eval()
    assert torch.equal(exported(images), model.eval()(images)), "the export computes something else"
    loaded = load_pruned(file, class_of(case)(case.optimizer)).eval()
    assert (loaded.conv1.out_channels < 16) is (case.stop != "conversion only"), "the file has another structure"
    loaded(images)


def try_all(cases: Sequence[Case], path: Path) -> None:
    """Examine cases; one line per case in a file of this rank: nothing after the name, or what failed."""
    rank = os.environ.get("LOCAL_RANK", "0")
    with (path / f"rank{rank}.txt").open("w", encoding="utf-8") as file:
        for case in cases:
            try:
                examine(case, path / str(case).replace(", ", "-").replace(" ", "_"))
                said = ""
            except Exception as error:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
            file.write(f"{case}\t{said}\n")
            file.flush()
            if said and case.processes > 1:
                break  # the other process waits, or will


def examine_all(cases: Sequence[Case], path: Path) -> dict[str, str]:
    """Return what failed, by case; an empty text where nothing did. Two processes share one group for all cases."""
    found = {str(case): "was not reached" for case in cases}
    for processes in PROCESSES:
        chosen, folder = [case for case in cases if case.processes == processes], path / f"processes{processes}"
        folder.mkdir()
        port = _free_port()
        started = [forked(partial(_as_rank, rank, port, chosen, folder)) for rank in range(processes)]
        for process in started:
            wait_for(process)
        lines = [(folder / f"rank{rank}.txt").read_text(encoding="utf-8").splitlines() for rank in range(processes)]
        for name, said in (line.split("\t") for own in reversed(lines) for line in own):
            found[name] = said or ("" if found[name] in ("", "was not reached") else found[name])
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _as_rank(rank: int, port: int, cases: Sequence[Case], path: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try_all(cases, path)
