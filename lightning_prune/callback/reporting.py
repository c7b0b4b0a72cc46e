"""`ReportCallback`: Lightning's hooks -> the history of a run, and its report in the log folder."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.callback.planner import FLOOR
from lightning_prune.errors import ConfigError
from lightning_prune.graph import CostModel
from lightning_prune.mutator.describe import describe_structure
from lightning_prune.recovery import Recovery
from lightning_prune.report import History, make_document, write_report
from lightning_prune.targets.parse import LATENCY_KEYS

if TYPE_CHECKING:
    from lightning_prune.callback.callback import PruningCallback

__all__ = ["ReportCallback"]

OWN = "pruning/"  # what the callback logs itself
_LONGEST = 160  # letters of a target in words; the choices of all units are in the JSON


class ReportCallback(Callback):
    """Remembers what happens in a `fit`, and leaves `pruning_report.json` and `pruning_report.html` in the log folder.

    `PruningCallback` puts one beside itself and keeps its history in its own state, so that a resumed run ends with the
    report of an uninterrupted one. The files are written by rank 0 when `fit` ends or an exception ends it.

    Args:
        report: False writes nothing; a text is the metric that is shown first.

    Attributes:
        history: What happened so far.

    Raises:
        ConfigError: `report` is neither.
    """

    def __init__(self, report: bool | str) -> None:
        super().__init__()
        if not isinstance(report, bool | str):
            raise ConfigError(
                f"Got report={report!r} for PruningCallback; expected True, False or the name of a metric."
            )
        self.report = report
        self.history = History()
        self._pruning: PruningCallback | None = None
        self._folder: str | None = None

    # Beside a PruningCallback

    def join(self, trainer: Trainer, pruning: PruningCallback) -> None:
        """Stand behind a PruningCallback in the list of the Trainer, unless there is nothing to write."""
        self._pruning, self._folder = pruning, None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        is_trial = bool(trainer.fast_dev_run) or trainer.barebones  # type: ignore[attr-defined]  # likewise
        is_wanted = bool(self.report) and not is_trial
        if is_wanted and self not in callbacks:
            callbacks.insert(callbacks.index(pruning) + 1, self)

    def forget(self, *, is_dense: bool) -> None:
        """Begin with another model.

        Args:
            is_dense: Whether nothing is removed from it.
        """
        self.history = History(is_whole=is_dense)

    def remembered(self) -> dict[str, Any]:
        """Return the history as plain data; nothing where nothing is written."""
        return self.history.to_dict() if self.report else {}

    def load(self, saved: Mapping[str, Any], *, is_dense: bool) -> None:
        """Go on from a saved history.

        Args:
            saved: What `History.to_dict` gave; empty where nothing had happened, or nobody took note.
            is_dense: Whether nothing had been removed when it was saved.

        Raises:
            CheckpointError: It is damaged.
        """
        self.history = History.from_dict(saved) if saved else History(is_whole=is_dense)

    def note(self, trainer: Trainer, why: str = "") -> None:
        """Take note that the structure has changed.

        Args:
            trainer: Knows the time.
            why: What was restored and why; empty where the schedule fired.
        """
        pruning = self._pruning
        if self.report and pruning is not None:
            kept, now = {unit.name: unit.activated_channels for unit in pruning._active.units}, _now(trainer)
            self.history.note_change(kept, **now, progress=pruning._state.progress, why=why)

    # Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder while all processes are there to agree on it."""
        self._folder = str(trainer.log_dir or trainer.default_root_dir)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of what a validation during `fit` logged."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.history.note_reading(_metrics(trainer), **_now(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the means over an epoch of training."""
        self.history.note_reading(_metrics(trainer), **_now(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report: everything has happened."""
        self._write(trainer, pl_module, "fit ended")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is known, if anything has happened."""
        if self.history.changes or self.history.readings:
            self._write(trainer, pl_module, f"stopped by {type(exception).__name__}")

    def _write(self, trainer: Trainer, pl_module: LightningModule, ended: str) -> None:
        pruning, folder = self._pruning, self._folder
        if pruning is None or folder is None or not trainer.is_global_zero:
            return
        if "://" in folder:
            rank_zero_info(f"No pruning report is written: {folder} is not a folder of this machine.")
            return
        graph, counts = pruning._active.graph, pruning._active.counts()
        structure = describe_structure(graph, pruning._planner.limits(pruning._active), counts).to_dict()
        facts = {
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "ended": ended,
            "versions": _versions(),
            **_facts(pruning, pl_module),
            **{name: structure[name] for name in ("units", "frozen", "notes")},
        }
        kept = dict(zip(graph.cost.names, counts.tolist(), strict=True))
        document = make_document(self.history, graph.cost, kept, facts, self._monitor(trainer, pruning))
        try:
            page = write_report(document, folder)[-1]
        except OSError as error:
            rank_zero_warn(f"Got no pruning report: {error}.")  # the training is worth more
        else:
            if pruning.verbose:
                rank_zero_info(f"Pruning report: {page}")

    def _monitor(self, trainer: Trainer, pruning: PruningCallback) -> str | None:
        """Return the metric that matters most: of `report`, of a guard, or of what else watches one."""
        if isinstance(self.report, str):
            return self.report
        watching: list[Any] = [part for part in pruning._recovery.recovery if hasattr(part, "monitor")]
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        watching += [other for other in others if isinstance(other, EarlyStopping | ModelCheckpoint)]
        names = [str(other.monitor) for other in watching if other.monitor]
        return next((name for name in names if name in self.history.metrics), None)


def _now(trainer: Trainer) -> dict[str, int]:
    return {"epoch": trainer.current_epoch, "step": trainer.global_step}


def _metrics(trainer: Trainer) -> dict[str, float]:
    """Return what the loop that ends has logged; `callback_metrics` would also hold what earlier ones did."""
    found = {} if trainer._results is None else trainer._results.metrics(on_step=False)["callback"]
    single = {name: value for name, value in found.items() if isinstance(value, Tensor) and value.numel() == 1}
    return {name: float(value) for name, value in single.items() if not name.startswith(OWN)}


def _versions() -> dict[str, str]:
    try:
        own = version("lightning-prune")
    except PackageNotFoundError:  # it runs from its source
        own = "unknown"
    return {"lightning_prune": own, "torch": str(torch.__version__), "lightning": str(lightning.__version__)}


def _facts(pruning: PruningCallback, pl_module: LightningModule) -> dict[str, Any]:
    """Return what was asked of a run, as plain data."""
    resolved = pruning._schedule
    arguments = pruning._arguments()
    leaves = tree_leaves(pruning._active.example_input)
    inputs = [f"{'x'.join(map(str, x.shape))} {x.dtype}".replace("torch.", "") for x in leaves if isinstance(x, Tensor)]
    return {
        "model": {"name": type(pl_module).__name__, "submodule": arguments.pop("submodule"), "example_input": inputs},
        "target": _target(pruning, arguments.pop("target")),
        "schedule": {
            "kind": getattr(resolved.curve, "__name__", str(resolved.curve)),
            **{name: getattr(resolved, name) for name in ("unit", "begin", "end", "every", "last")},
            "firings": resolved.num_firings,
        },
        "arguments": {name: value for name, value in arguments.items() if value is not None and name != "recovery"},
        "recovery": [{"name": type(part).__name__, "arguments": _given(part)} for part in pruning._recovery.recovery],
        "remarks": _remarks(pruning),
    }


def _given(part: Recovery) -> dict[str, Any]:
    """Return the arguments that an object was made with: plain ones as they are, of others the kind."""
    given = {name: value for name, value in part.arguments().items() if value is not None}
    return {name: v if isinstance(v, bool | int | float | str) else type(v).__name__ for name, v in given.items()}


def _remarks(pruning: PruningCallback) -> list[str]:
    """Return what a person should know first."""
    remarks = pruning._recovery.reports()
    if not pruning.is_done:
        remarks.append("The last step of the schedule has not happened: the target is not met yet.")
    history = pruning._reporting.history
    if history.changes and history.metrics and not history.of_structure(len(history.changes), history.metrics[0]):
        remarks.append("Nothing was validated after the last step: there are no metrics of what the run ended with.")
    if not history.is_whole:
        remarks.append("The dense model was not seen in this run: there are no metrics of it.")
    elif history.changes and history.metrics and not history.of_structure(0, history.metrics[0]):
        remarks.append(
            "Nothing was validated before the first step of the schedule: there are no metrics of the dense model."
        )
    return remarks


def _target(pruning: PruningCallback, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the target, what was reached of each bound, and whether it is met."""
    graph, counts = pruning._active.graph, pruning._active.counts().tolist()
    is_auto = pruning.target == FLOOR
    history = pruning._reporting.history
    was_restored = bool(history.changes and history.changes[-1].why)
    is_reached = pruning.is_done and (is_auto or not was_restored)
    costs = {} if is_auto else asked["costs"]
    bounds = [_bound(graph.cost, counts, key, wanted, pruning, is_reached) for key, wanted in costs.items()]
    return {
        "text": "auto: as far as a guard lets it" if is_auto else _shortened(str(pruning.target)),
        "costs": costs,
        "choices": asked["choices"],
        "bounds": bounds,
        "is_met": is_reached and all(bound["is_met"] for bound in bounds),
    }


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _bound(
    cost: CostModel, counts: list[int], key: str, wanted: float, pruning: PruningCallback, is_reached: bool
) -> dict[str, Any]:
    """Return what was reached of a bound, in the terms in which it was given."""
    if key in LATENCY_KEYS:  # the last plan was measured until it met them
        measured = pruning._timing.metrics().get("pruning/latency")
        return {"cost": key, "wanted": wanted, "reached": measured if key == "latency" else None, "is_met": is_reached}
    now, dense = cost.measure(key, counts), cost.measure(key, cost.full)
    if isinstance(wanted, float):
        reached: float = now / max(dense, 1)
    else:
        reached = now / cost.batch_size if key in ("macs", "flops", "memory") else now
    return {"cost": key, "wanted": wanted, "reached": reached, "is_met": reached <= wanted + 1e-9}
