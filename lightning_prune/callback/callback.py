"""`PruningCallback`: a forwarder. Each hook asks "act now?"; scores, plans, masks and shapes are made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor
from torch.optim import LBFGS

from lightning_prune.callback import arguments
from lightning_prune.callback.example import find_example, find_root
from lightning_prune.callback.monitors import hold_until, refresh_summary, reset_monitors_
from lightning_prune.callback.ranks import agree, check_strategy, mean_over_ranks, plan_of_rank_zero, rewrap_
from lightning_prune.callback.table import remaining, summary_of
from lightning_prune.checkpoint import KEY, register_structure_hooks, structure_of
from lightning_prune.compact import compact_
from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.importance import Importance, resolve_importance
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops, to_static_
from lightning_prune.ops.removed import put_back_, removed_entries
from lightning_prune.plan import KeepPlan
from lightning_prune.schedule import ResolvedSchedule, Schedule, resolve_schedule
from lightning_prune.targets import make_plan, parse_target
from lightning_prune.targets.steps import SCOPES

__all__ = ["PruningCallback"]

COMPACT = ("end", "each", "never")


class PruningCallback(Callback):
    """Prune a model while it trains: channels leave the tensors, and what remains goes on learning.

    At every firing of the schedule the channels are scored, a structure that meets the budget of the moment is planned,
    certified by a trace, and set as masks; layers then run on the kept channels only. After the schedule the model
    becomes one of plain, small `torch.nn` layers in place, optimizer state included.

    Args:
        target: What remains. A float: the ratio of channels that every unit keeps. A mapping of costs such as
            ``{"macs": 0.5}`` (also params, channels, flops, memory), or of unit names or globs; or the path of a YAML
            file. In mappings a value up to 1 is a fraction, a greater one absolute; ``"2G"`` too.
        importance: How channels are scored: "l1", "l2", "bn_scale", "random", a mapping of `Importance`'s arguments, a
            function ``unit -> scores [C]``, or its import path.
        schedule: When and how fast: the name of a curve ("one_shot", "linear", "cubic", "exponential"), a mapping of
            `Schedule`'s arguments, a `Schedule`, or a function progress -> progress.
        scope: How channels compete: "global" (one threshold), "isomorphic" (one inside each kind of unit) or "local"
            (one ratio, ranked inside each unit).
        ignore: Globs over module and parameter names; a matching layer keeps its outputs, its inputs follow.
        divisor: Kept counts are multiples of it, on axes of at least twice as many channels.
        min_ratio: What at least remains of each unit, in [0, 1].
        compact: When the model becomes small plain layers: "end" (after the schedule), "each" (after every firing) or
            "never" (masks stay; `export_pruned` makes a small copy).
        example_input: What the model is traced with: a tensor, a tuple (positional) or a mapping (keywords). None takes
            the module's `example_input_array`, else two items of the training set.
        submodule: Dotted name of the part to prune; everything outside keeps its parameters, and the target is relative
            to the part. `example_input` is then its input.
        mutator: A `ChannelMutator` of your own, instead of `ignore` and `example_input`.
        verbose: Whether rank 0 prints a table of the units at the end, and a line at each firing.
        reset_monitors: Whether `ModelCheckpoint` and `EarlyStopping` forget their best score when the structure
            changes, so that a bigger model does not win over the pruned one.

    Raises:
        ConfigError: An argument that does not fit, with the nearest that does.

    Example:
        >>> PruningCallback(target={"macs": 0.5}, schedule={"kind": "linear", "end": 8}).schedule.end
        8
    """

    def __init__(
        self,
        target: float | dict[str, Any] | str,
        importance: Importance | str | dict[str, Any] | Callable[..., Any] = "l1",
        schedule: Schedule | str | dict[str, Any] | Callable[[float], float] = "cubic",
        scope: Literal["global", "isomorphic", "local"] = "global",
        *,
        ignore: Sequence[str] | str = (),
        divisor: int = 8,
        min_ratio: float = 0.1,
        compact: Literal["end", "each", "never"] = "end",
        example_input: Any = None,
        submodule: str | None = None,
        mutator: ChannelMutator | None = None,
        verbose: bool = True,
        reset_monitors: bool = True,
    ) -> None:
        super().__init__()
        self.target = parse_target(target)
        self.importance = resolve_importance(importance)
        self.schedule = resolve_schedule(schedule)
        self.scope = arguments.checked_name("scope", scope, SCOPES)
        self.ignore = arguments.checked_globs(ignore)
        self.divisor = arguments.checked_divisor(divisor)
        self.min_ratio = arguments.checked_ratio(min_ratio)
        self.compact = arguments.checked_name("compact", compact, COMPACT)
        self.example_input = example_input
        self.submodule = submodule
        self.mutator = mutator
        self.verbose = verbose
        self.reset_monitors = reset_monitors
        if mutator is not None and (self.ignore or example_input is not None):
            given = "ignore" if self.ignore else "example_input"
            raise ConfigError(f"Got mutator= together with {given}=; give {given} to the ChannelMutator instead.")
        self._resolved: ResolvedSchedule | None = None
        self._parameters: frozenset[str] = frozenset()
        self._progress, self._last, self._unit = 0.0, -1, "epoch"
        self._kept: dict[str, Tensor] = {}
        self._removed: dict[str, Tensor] = {}

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Trace, certify and convert: optimizers and wrappers do not exist yet, weights are not loaded yet."""
        has_hooks = bool(pl_module._load_state_dict_pre_hooks)
        register_structure_hooks(pl_module)
        if stage != "fit":
            return
        others = [c for c in trainer.callbacks if isinstance(c, PruningCallback) and c is not self]  # type: ignore[attr-defined]  # set by a connector
        if others:
            raise ConfigError("Got two PruningCallbacks; one holds the structure of the model. Merge their targets.")
        check_strategy(trainer, has_hooks)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        self._resolved = self.schedule.resolve(trainer.max_epochs, trainer.max_steps)
        self._prepare(trainer, pl_module)
        if self._last >= self._now(trainer):
            self._last = -1  # a new run counts from zero; one that resumes loads its state after this
        self._parameters = frozenset(name for name, _ in pl_module.named_parameters())

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert the model; on failure it is as it was."""
        root = find_root(pl_module, self.submodule)
        if self.mutator is not None and self.mutator._model is root and self._kept:
            return  # fitted before: goes on where it stopped
        if self.mutator is None or (self._kept and self.mutator._model is not root):
            self.mutator = ChannelMutator(ignore=self.ignore, example_input=self.example_input)
            self._progress, self._last, self._kept, self._removed = 0.0, -1, {}, {}
        if self.mutator.example_input is None:
            self.mutator.example_input = find_example(trainer, pl_module, root, self.example_input)
        if self.mutator._model is not root:
            self.mutator.prepare_from_supernet(root)
        try:
            self._check_reachable()
        except Exception:
            to_static_(root)
            raise

    def _check_reachable(self) -> None:
        """Raise now what would else be raised in the middle of training."""
        mutator = self._active
        if not mutator.mutable_units:
            raise ConfigError("Got a model with nothing to prune.")
        make_plan(
            self.target,
            {unit.name: torch.zeros(unit.num_channels) for unit in mutator.units},
            mutator.limits(self.divisor, self.min_ratio),
            mutator.graph.cost,
            scope=self.scope,
        )

    @property
    def _active(self) -> ChannelMutator:
        assert self.mutator is not None, "setup comes first"
        return self.mutator

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what `LightningModule.setup` and `configure_optimizers` made: they have run by now."""
        new = sorted({name for name, _ in pl_module.named_parameters()} - self._parameters)
        if new:
            raise ConfigError(
                f"Got parameters that appeared in LightningModule.setup: {', '.join(new[:4])}; they were not traced. "
                "Make layers in __init__ or in configure_model."
            )
        if self.compact != "never" and any(isinstance(o, LBFGS) for o in trainer.optimizers):
            raise ConfigError("Got LBFGS, whose state cannot shrink. Set compact='never', or use another optimizer.")
        assert self._resolved is not None, "setup comes first"
        hold_until(trainer, self._resolved)

    # During training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the epoch: its checkpoint then pairs the structure with the metric of the same structure."""
        if self.compact == "end" and self.is_done:
            self._compact(trainer, pl_module)
        assert self._resolved is not None, "setup comes first"
        if self._resolved.unit == "epoch" and self.should_prune(trainer.current_epoch):
            self._prune(trainer, pl_module, trainer.current_epoch)
        self._log(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune before the step where the schedule counts steps: gradients of the last step are gone by now."""
        assert self._resolved is not None, "setup comes first"
        if self._resolved.unit == "step" and self.should_prune(trainer.global_step):
            self._prune(trainer, pl_module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become small where no epoch follows the schedule; the last chance before the optimizers go."""
        if self.compact == "end" and self.is_done:
            self._compact(trainer, pl_module)
        if self.verbose and trainer.is_global_zero:
            Console().print(summary_of(self._active))

    @property
    def is_done(self) -> bool:
        """Whether the target is met: no firing follows."""
        return self._progress >= 1.0

    def should_prune(self, time: int) -> bool:
        """Return whether a firing is due that has not happened: at its time, or at the first chance after it.

        Args:
            time: Epoch or optimizer step, as the schedule counts, from zero.
        """
        assert self._resolved is not None, "setup comes first"
        latest = self._resolved.latest(time)
        return not self.is_done and latest is not None and latest > self._last

    def _now(self, trainer: Trainer) -> int:
        assert self._resolved is not None, "setup comes first"
        return trainer.current_epoch if self._resolved.unit == "epoch" else trainer.global_step

    def _prune(self, trainer: Trainer, pl_module: LightningModule, time: int) -> None:
        """Score, plan, apply."""
        mutator, schedule = self._active, self._resolved
        assert schedule is not None, "setup comes first"
        put_back_(mutator.model, self._removed)
        progress = schedule.progress(time)
        scores = mean_over_ranks(trainer, self.importance.scores(mutator.units, self.scope))
        limits = mutator.limits(self.divisor, self.min_ratio)
        plan = plan_of_rank_zero(
            trainer,
            lambda: make_plan(self.target, scores, limits, mutator.graph.cost, scope=self.scope, progress=progress),
        )
        before = mutator.current_plan()
        agree(trainer, lambda: self._apply(plan))
        self._progress, self._last, self._unit = progress, time, schedule.unit
        self._removed = removed_entries(mutator.model)
        self._kept = {unit.name: unit.mutable.current_mask.nonzero().flatten() for unit in mutator.units}
        if self.reset_monitors and mutator.current_plan() != before:
            reset_monitors_(trainer)
        if self.verbose:
            shares = ", ".join(f"{key} {share:.1%}" for key, share in remaining(mutator).items())
            rank_zero_info(f"Pruned at {schedule.unit} {time}: {shares} remain.")

    def _apply(self, plan: KeepPlan) -> KeepPlan:
        self._active.apply(plan)
        return self._active.current_plan()

    def _compact(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the model small in place, and tell those that hold on to its shapes."""
        if not dynamic_ops(pl_module):
            return
        compact_(pl_module, trainer.optimizers)
        self._removed = {}
        rewrap_(trainer, pl_module)
        refresh_summary(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.barebones:
            metrics = {f"pruning/{key}": share for key, share in remaining(self._active).items()}
            pl_module.log_dict(metrics, prog_bar=True, on_epoch=True, batch_size=1, sync_dist=trainer.world_size > 1)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: progress, kept channels, and the values that removed entries had."""
        if not self._kept:
            return {}
        return {
            "version": 1,
            "target": str(self.target),
            "progress": self._progress,
            "last": self._last,
            "unit": self._unit,
            "kept": self._kept,
            "removed": self._removed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the weights are loaded by now, optimizers do not exist yet."""
        if state_dict.get("version", 0) > 1:
            raise CheckpointError(
                f"Got callback state of version {state_dict['version']}; this library reads 1. Upgrade lightning-prune."
            )
        self._progress, self._last, self._unit = state_dict["progress"], state_dict["last"], state_dict["unit"]
        self._kept, self._removed = state_dict["kept"], state_dict["removed"]
        if self.mutator is not None and self._resolved is not None:
            self._restore_masks(self.mutator)
            if self._resolved.unit != self._unit:
                self._last = -1

    def _restore_masks(self, mutator: ChannelMutator) -> None:
        units = {unit.name: unit for unit in mutator.units}
        if set(units) != set(self._kept):
            missing = sorted(set(units) ^ set(self._kept))
            raise CheckpointError(
                f"Got a checkpoint with other units; the first difference is {missing[0]!r}. Use the same ignore, "
                "submodule and example_input as in the run that wrote it."
            )
        for name, kept in self._kept.items():
            units[name].keep(kept.tolist())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the structure under a key of its own, for `load_pruned`: it does not read states of callbacks."""
        units = {name: len(kept) for name, kept in self._kept.items()}
        progress = {"progress": self._progress, "last": self._last, "unit": self._unit}
        checkpoint[KEY] = structure_of(pl_module, units=units, progress=progress)
