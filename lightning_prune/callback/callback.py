"""`PruningCallback`: a forwarder. Each hook asks "act now?"; scores, plans, masks and shapes are made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callback import arguments
from lightning_prune.callback.carried import carried_by, go_on_
from lightning_prune.callback.checks import check_alone, check_no_new_parameters, check_optimizers, warn_unmet
from lightning_prune.callback.collect import Collector
from lightning_prune.callback.convert import Conversion
from lightning_prune.callback.example import find_root, nothing_to_prune, raise_with_hint
from lightning_prune.callback.figure import log_figure
from lightning_prune.callback.files import explain_bad_files
from lightning_prune.callback.monitors import hold_until, refresh_summary, reset_monitors_, spare_
from lightning_prune.callback.planner import Planner
from lightning_prune.callback.ranks import agree, check_strategy, from_rank_zero, is_sharding, mean_over_ranks
from lightning_prune.callback.recover import RecoveryCallback
from lightning_prune.callback.reporting import ReportCallback
from lightning_prune.callback.restore import register_hooks
from lightning_prune.callback.resumed import LASTING, plain_arguments, resolved_for
from lightning_prune.callback.shapes import averages_of, forget_compiled, grow_all_, made_for, shrink_all_
from lightning_prune.callback.sharded import check_one_shot
from lightning_prune.callback.state import RunState
from lightning_prune.callback.table import announce, metrics_of, summary_of
from lightning_prune.callback.timed import Timing
from lightning_prune.callback.widths import watch_widths
from lightning_prune.checkpoint import KEY, structure_of
from lightning_prune.importance import Importance, resolve_importance
from lightning_prune.latency import LatencySettings, resolve_latency
from lightning_prune.mutator import ChannelMutator
from lightning_prune.mutator.overrides import parse_overrides
from lightning_prune.ops import dynamic_ops
from lightning_prune.ops.removed import put_back_
from lightning_prune.recovery import Recovery
from lightning_prune.schedule import ResolvedSchedule, Schedule, resolve_schedule
from lightning_prune.targets.steps import SCOPES

__all__ = ["PruningCallback"]


class PruningCallback(Callback):
    """Prune a model while it trains: channels leave the tensors, and what remains goes on learning.

    At every firing of the schedule the channels are scored, a structure that meets the budget of the moment is planned,
    certified by a trace, and set as masks; layers then run on the kept channels only. After the schedule the model
    becomes one of plain, small `torch.nn` layers in place, optimizer state included.

    Args:
        target: What remains. A float: the ratio of channels that every unit keeps. A mapping of costs such as
            ``{"macs": 0.5}`` (also params, channels, flops, memory, latency, latency_ms), or of unit names or globs; or
            the path of a YAML file. In mappings a value up to 1 is a fraction, a greater one absolute; ``"2G"`` too. A
            latency is predicted from a table that is measured when `fit` starts; the last plan is measured, and made
            anew until it meets the target. "auto" goes on to the floors of all units, until a `Guard` in `recovery`
            takes the last firing back.
        importance: How channels are scored. By weights: "magnitude", "l1", "l2", "lp", "bn_scale", "lamp", "fpgm",
            "random". By the training batches before a firing: "taylor", "taylor2", "hessian", "fisher", "activation",
            "wanda", "apoz"; a firing at epoch 0 waits inside it for them. Or a mapping of `Importance`'s arguments and
            the criterion's own, ``{"name": "taylor", "batches": 16}``; a mixture, ``{"name": "mixture", "of": {"l1": 1,
            "taylor": 0.5}}``; what was measured, ``{"name": "sensitivity", "table": path}``; a function ``unit ->
            scores [C]``, or its import path.
        schedule: When and how fast: the name of a curve ("one_shot", "linear", "cubic", "exponential"), a mapping of
            `Schedule`'s arguments, a `Schedule`, or a function progress -> progress.
        scope: How channels compete: "global" (one threshold), "isomorphic" (one inside each kind of unit) or "local"
            (one ratio, ranked inside each unit).
        ignore: Globs over module and parameter names; a matching layer keeps its outputs, its inputs follow.
        divisor: Kept counts are multiples of it, on axes of at least twice as many channels.
        min_ratio: What at least remains of each unit, in [0, 1].
        overrides: What holds for some units instead, by unit name or glob over units and the layers that make them:
            ``{"layer1*": {"min": 0.5, "max": 0.9}, "head*": {"choice": 32}, "stem*": {"ignore": True}}``, also
            "divisor". They go before the target; a ceiling or choice is reached gradually, as the target is. A full
            name goes before a glob, a later glob before an earlier one.
        compact: When the model becomes small plain layers: "end" (after the schedule), "each" (after every firing) or
            "never" (masks stay; `export_pruned` makes a small copy).
        example_input: What the model is traced with: a tensor, a tuple (positional) or a mapping (keywords). None takes
            the module's `example_input_array`, else two items of the training set.
        submodule: Dotted name of the part to prune; everything outside keeps its parameters, and the target is relative
            to the part. `example_input` is then its input.
        mutator: A `ChannelMutator` of your own, instead of `ignore`, `overrides` and `example_input`.
        verbose: Whether rank 0 prints a table of the units at the end, a line at each firing, and bars while it waits.
        reset_monitors: Whether `ModelCheckpoint` and `EarlyStopping` forget their best score when the structure
            changes, so that a bigger model does not win over the pruned one.
        grace_epochs: So many epochs, beginning with that of the last firing, are not counted by `EarlyStopping`.
        regrow: Whether a removed channel may come back at a later firing, when others have become worse. If not,
            channels are scored, and units normalised, over those that remain only.
        per_cost: Rank channels of different units by their score per what one of them costs in the structure of the
            moment: "macs", "params", "memory", "flops", "channels" or "latency". "auto" takes the cost of the target
            for importances with the normalizer "share", and none for others; None never divides.
        latency: How a latency is measured: a mapping of `LatencySettings`' arguments, such as ``{"backend":
            "onnxruntime", "batch_size": 1}``; else torch as it is, on the device and the example input of the model.
        recovery: What helps accuracy come back, such as ``[Recalibration()]``; see `lightning_prune.recovery`.
        report: Whether `fit` leaves `pruning_report.json` and `.html` in the log folder; a text is the metric to show
            first, else it is that of a guard, of `EarlyStopping` or of `ModelCheckpoint`.

    Raises:
        ConfigError: An argument that does not fit, with the nearest that does.

    Example:
        >>> PruningCallback(target={"macs": 0.5}, schedule={"kind": "linear", "end": 8}).schedule.end
        8
    """

    def __init__(
        self,
        target: int | float | dict[str, Any] | str = "auto",
        importance: Importance | str | dict[str, Any] | Callable[..., Any] = "magnitude",
        schedule: Schedule | Callable[[float], float] | str | dict[str, Any] = "cubic",
        scope: Literal["global", "isomorphic", "local"] = "global",
        *,
        ignore: Sequence[str] | str = (),
        divisor: int | float = 8,
        min_ratio: float = 0.1,
        compact: Literal["end", "each", "never"] = "end",
        example_input: Any = None,
        submodule: str | None = None,
        mutator: ChannelMutator | None = None,
        verbose: bool = True,
        reset_monitors: bool = True,
        grace_epochs: int = 0,
        regrow: bool = True,
        per_cost: str | None = arguments.AUTO,
        latency: LatencySettings | dict[str, Any] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        recovery: list[Recovery] | None = None,
        report: bool | str = True,
    ) -> None:
        super().__init__()
        self._recovery = RecoveryCallback(recovery or ())
        self.target = arguments.checked_target(target, self._recovery.recovery)
        self.importance = resolve_importance(importance)
        self.schedule = resolve_schedule(schedule)
        self.scope = arguments.checked_name("scope", scope, SCOPES)
        self.ignore = arguments.checked_globs(ignore)
        self.divisor = arguments.checked_divisor(divisor)
        self.min_ratio = arguments.checked_ratio(min_ratio)
        self.compact = arguments.checked_name("compact", compact, arguments.COMPACT)
        self.example_input = example_input
        self.submodule = submodule
        self.mutator = self._own_mutator = mutator
        self.verbose, self.reset_monitors = verbose, reset_monitors
        self.grace_epochs = arguments.checked_grace(grace_epochs)
        self.regrow = regrow
        self.per_cost = arguments.checked_price(per_cost, self.importance, self.target)
        self._timing = Timing(None if latency is None else resolve_latency(latency), self.target, self.per_cost)
        self.overrides = parse_overrides(overrides)
        arguments.check_own_mutator(
            mutator, ignore=self.ignore or None, overrides=self.overrides or None, example_input=example_input
        )
        shape = (self.target, self.scope, self.divisor, self.min_ratio)
        self._planner = Planner(*shape, regrow, self.per_cost, self._timing)
        self._reporting = ReportCallback(report)
        self._resolved: ResolvedSchedule | None = None
        self._state = RunState()
        self._collector = Collector(self.importance)
        self._root: nn.Module | None = None
        self._conversion = Conversion(verbose)
        self._parameters: frozenset[str] = frozenset()
        self._is_fitting = False
        self._watches: list[RemovableHandle] = []

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Trace, certify and convert: optimizers and wrappers do not exist yet, weights are not loaded yet."""
        had_hooks = register_hooks(pl_module, averages_of(trainer))
        explain_bad_files(trainer)
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            self._recovery.join(trainer, pl_module, self)
            return
        check_alone(trainer, PruningCallback)
        check_strategy(trainer, had_hooks)
        self._resolved = resolved_for(trainer, self.schedule, verbose=self.verbose)
        if is_sharding(trainer):
            check_one_shot(trainer, self._resolved, self.compact, self._collector, self._timing)
        elif is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        self._recovery.join(trainer, pl_module, self)
        self._reporting.join(trainer, self)
        root = find_root(pl_module, self.submodule)
        if self._root is not root:  # else it was fitted before, and goes on
            self._prepare(trainer, pl_module, root)
            self._root = root
        self._watches = watch_widths(pl_module)
        self._collector.reset()
        self._state.count_in(self._resolved.unit, self._now(trainer))
        if is_sharding(trainer) and not self.is_done:
            self._prune(trainer, pl_module, self._now(trainer))
            self._compact_if_done(trainer, pl_module)
        self._parameters = frozenset(name for name, _ in pl_module.named_parameters())

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, root: nn.Module) -> None:
        """Trace and convert the dense model; on failure it is as it was."""
        mutator = self._own_mutator or ChannelMutator(
            ignore=self.ignore, example_input=self.example_input, overrides=self.overrides
        )
        try:
            gone = self._conversion.convert_(trainer, pl_module, root, mutator, self.example_input)
            self._collector.prepare(pl_module, mutator.units)
            self.mutator, self._state = mutator, RunState(gone=gone)
            self._reporting.forget(is_dense=not gone)
            self._timing.forget()
            self._check_reachable()
        except Exception as error:  # raised again
            self._take_back(pl_module)
            raise_with_hint(error, pl_module, mutator.example_input)
            raise

    def _take_back(self, pl_module: LightningModule) -> None:
        """Leave the module as it was before `setup`, if no training came between."""
        if self._conversion.take_back_(pl_module):
            self.mutator, self._root = self._own_mutator, None

    def _check_reachable(self) -> None:
        """Raise now what would else be raised in the middle of training."""
        if not self._active.mutable_units:
            raise nothing_to_prune(self._active)
        if self._timing.is_needed and self._timing.table is None:
            return  # in `on_fit_start`, when the model is on its device and a checkpoint has brought its table
        self._planner.check_reachable(self._active, self._state.gone)

    def _prepare_timing(self, trainer: Trainer) -> None:
        """Measure latencies, once in a run."""
        if self._timing.is_needed and not self.is_done:
            self._timing.prepare(trainer, self._active, self._planner.limits(self._active), verbose=self.verbose)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what `LightningModule.setup` and `configure_optimizers` made: they have run by now."""
        if not is_sharding(trainer):  # a wrapper may have other names
            check_no_new_parameters(pl_module, self._parameters)
        check_optimizers(trainer, self.compact)
        if self._timing.is_needed and dynamic_ops(pl_module):
            self._prepare_timing(trainer)
            self._check_reachable()
        hold_until(trainer, self._schedule, self.grace_epochs)
        self._conversion.settle()

    # During training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the epoch: its checkpoint then pairs the structure with the metric of the same structure."""
        spare_(trainer, self._schedule, self.grace_epochs)
        self._recovery.begin_epoch(trainer, pl_module)
        self._compact_if_done(trainer, pl_module)
        if self._schedule.unit == "epoch":
            self._prune_if_due(trainer, pl_module, batch_idx=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune before the step where the schedule counts steps, or a firing waited: the last gradients are gone."""
        self._prune_if_due(trainer, pl_module, batch_idx)
        if self._collector.can_watch:
            now, ahead = self._now(trainer), self._collector.ahead(trainer, self._schedule.unit, batch_idx)
            self._collector.begin_batch(self.should_prune(now) or self.should_prune(now + ahead))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch before gradients of activations are gone."""
        self._collector.after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Watch when gradients are complete: accumulated, reduced, unscaled, and not yet clipped."""
        self._collector.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching: what follows may be validation."""
        self._collector.end_batch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log at the end: a run that resumes in the middle of an epoch has no start of it."""
        if not trainer.barebones:
            metrics = metrics_of(self._active) | self._timing.metrics()
            pl_module.log_dict(metrics, prog_bar=True, on_epoch=True, batch_size=1, sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become small where no epoch follows the schedule; the last chance before the optimizers go."""
        self._compact_if_done(trainer, pl_module)
        if not self.is_done:
            warn_unmet(self._schedule, self._now(trainer))
        if self.verbose and trainer.is_global_zero:
            Console().print(summary_of(self._active), *self._recovery.reports())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become small where a resumed fit had no epoch left, so that `on_train_end` never came."""
        self._compact_if_done(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching; the hooks of the state dict stay, for `save_checkpoint` after fit."""
        self._stop_watching()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching: `teardown` does not come after an exception. Before training nothing of ours stays."""
        self._stop_watching()
        self._take_back(pl_module)

    def _stop_watching(self) -> None:
        self._collector.stop()
        while self._watches:
            self._watches.pop().remove()

    @property
    def is_done(self) -> bool:
        """Whether the target is met: no firing follows."""
        return self._state.is_done

    def should_prune(self, time: int) -> bool:
        """Return whether a firing is due that has not happened: at its time, or at the first chance after it.

        Args:
            time: Epoch or optimizer step, as the schedule counts, from zero.
        """
        return self._state.is_due(self._schedule, time)

    @property
    def _active(self) -> ChannelMutator:
        assert self.mutator is not None, "setup comes first"
        return self.mutator

    @property
    def _schedule(self) -> ResolvedSchedule:
        assert self._resolved is not None, "setup comes first"
        return self._resolved

    def _now(self, trainer: Trainer) -> int:
        return trainer.current_epoch if self._schedule.unit == "epoch" else trainer.global_step

    def _prune_if_due(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        now = self._now(trainer)
        if self.should_prune(now) and self._recovery.is_ready() and self._collector.is_ready(trainer, batch_idx):
            self._prune(trainer, pl_module, now)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, time: int) -> None:
        """Score, plan, apply."""
        mutator, state = self._active, self._state
        self._recovery.before_firing(trainer, pl_module)
        if not dynamic_ops(pl_module):
            grow_all_(trainer, pl_module, mutator)
        put_back_(mutator.model, state.removed)
        before, progress = mutator.current_plan(), self._schedule.progress(time)
        scores = mean_over_ranks(trainer, self._collector.scores(mutator.units, self.scope, living=not self.regrow))
        self._prepare_timing(trainer)
        plan, outcome = from_rank_zero(
            trainer, lambda: self._planner.plan(mutator, scores, state.gone, progress, is_last=progress >= 1)
        )
        with made_for(pl_module, *self._conversion.home):
            agree(trainer, mutator, plan)
        forget_compiled(pl_module)
        state.fired(self._schedule.unit, time, progress, mutator)
        self._reporting.note(trainer)
        self._timing.note(outcome)
        self._collector.reset()
        if self.reset_monitors and mutator.current_plan() != before:
            reset_monitors_(trainer)
        self._recovery.after_firing(trainer, pl_module)
        if self.compact == "each":
            self._shrink(trainer, pl_module)
        log_figure(trainer, mutator)
        if self.verbose:
            announce(f"{self._schedule.unit} {time}", mutator, outcome)

    def _compact_if_done(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recovery.restore_if_failed(trainer, pl_module):
            self._state.end(self._active)
            self._reporting.note(trainer, why=self._recovery.reports()[0])
            reset_monitors_(trainer)
        if self.compact != "never" and self.is_done and dynamic_ops(pl_module):
            self._shrink(trainer, pl_module)
            self._state.removed = {}

    def _shrink(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shrink_all_(trainer, pl_module)
        if self.is_done:
            refresh_summary(trainer, pl_module)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: progress, kept channels, values of removed entries, and what was seen on the way."""
        return carried_by(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the weights are loaded by now, optimizers do not exist yet."""
        go_on_(self, state_dict)

    def _arguments(self) -> dict[str, Any]:
        others = {"recovery": list(self._recovery.recovery), **{name: getattr(self, name) for name in LASTING}}
        return plain_arguments(self.target, **others)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the structure under a key of its own, for `load_pruned`: it does not read states of callbacks."""
        checkpoint[KEY] = structure_of(pl_module, units=self._state.counts(), progress=self._state.marks())
