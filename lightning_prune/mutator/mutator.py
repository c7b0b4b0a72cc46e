"""`ChannelMutator`: traces, certifies, converts and wires a model, lists its units, and applies plans to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.errors import ConfigError, PlanError, TraceError, did_you_mean
from lightning_prune.graph import ChannelGraph, Cost, analyze, certify_kept
from lightning_prune.graph.call import Rule
from lightning_prune.graph.rules import RuleEntry, check_rules
from lightning_prune.graph.snapshot import reset_caches
from lightning_prune.graph.trace import DenseTrace
from lightning_prune.mutator import config as written
from lightning_prune.mutator import wiring
from lightning_prune.mutator.arguments import (
    check_model,
    check_plan,
    make_unit,
    parse_channel_unit,
    split_input,
    units_matching,
)
from lightning_prune.mutator.describe import describe_structure
from lightning_prune.mutator.overrides import Override, limits_of, match_overrides, parse_overrides
from lightning_prune.mutator.rebuild import Prepared, rebuild_parts, remember_
from lightning_prune.ops import DynamicOp, dynamic_ops, see_through, static_view, to_static_
from lightning_prune.plan import KeepPlan, StructureReport, UnitLimits
from lightning_prune.units import L1MutableChannelUnit, MutableChannelUnit

__all__ = ["ChannelMutator"]


class ChannelMutator:
    """The structure of one model: its units, and one choice for each.

    Args:
        channel_unit: Class of the units; its name; or a mapping with "type", "default_args" (arguments of every unit)
            and "units" (unit name -> {"init_args", "choice"}).
        example_input: What to trace with: a tensor, a tuple (positional) or a mapping (keywords).
        units: More entries like `channel_unit["units"]`: unit name or glob -> choice, or {"init_args", "choice"}.
        ignore: Globs over module and parameter names; a matching layer keeps its outputs, its inputs follow.
        rules: Rules for ops that have none, by schema name: `{"my::op": rule}`. A rule is a function that sets the axes
            of the result, `call.put(call.out, axes)`, from those of the arguments, `call.axes(call["x"])`; channels
            that must agree it binds, `call.bind(a, b)`, others it freezes, `call.freeze(axis, why)`.
        ops: Dynamic ops for further layers: `{MyConv: DynamicMyConv}`, each a subclass of `DynamicOp` and the layer. A
            layer without one gets a generic op where something of it is cut.
        strict: Raise where something cannot be certified, instead of freezing it.
        tie_kinds: Make one unit of all isomorphic ones (equal but for layer numbers), so that every layer of a kind
            keeps the same channels: then one number says the width of them all.
        overrides: What plans may do with some units, by unit name or glob over units and the layers that make them:
            `{"layer1*": {"min": 0.5, "max": 0.9}, "head*": {"choice": 32}, "stem*": {"ignore": True}}`, also "divisor".

    Raises:
        ConfigError: An argument that does not fit.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
        >>> mutator = ChannelMutator(example_input=torch.randn(2, 3, 8, 8))
        >>> mutator.prepare_from_supernet(model)
        >>> mutator.set_choices({"0_(0, 8)_out_1_in_1": 0.5})
        >>> model[0].weight.shape, model[1].weight.shape
        (torch.Size([4, 3, 3, 3]), torch.Size([4, 4, 3, 3]))
    """

    def __init__(
        self,
        channel_unit: type[MutableChannelUnit] | str | Mapping[str, Any] = L1MutableChannelUnit,
        example_input: Any = None,
        *,
        units: Mapping[str, Any] | None = None,
        ignore: Sequence[str] | str = (),
        rules: Mapping[str, Rule | RuleEntry] | None = None,
        ops: Mapping[type[nn.Module], type[DynamicOp]] | None = None,
        strict: bool = False,
        tie_kinds: bool = False,
        overrides: Mapping[str, Mapping[str, Any] | Override] | None = None,
    ) -> None:
        self.unit_type, self.default_args, own = parse_channel_unit(channel_unit)
        self.example_input = example_input
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.ops = ops
        self.overrides = parse_overrides(overrides)
        self._options: dict[str, Any] = {"rules": check_rules(rules), "strict": strict, "tie_kinds": tie_kinds}
        self.units: list[MutableChannelUnit] = []
        self._entries = {**own, **(written.load_plain(units) if units is not None else {})}
        self._config: dict[str, Any] | None = None
        self._graph: ChannelGraph | None = None
        self._trace: DenseTrace | None = None
        self._model: nn.Module | None = None

    @classmethod
    def from_config(cls, config: Any, **arguments: Any) -> ChannelMutator:
        """Return a mutator for the structure that `config_template` wrote.

        Args:
            config: Mapping, DictConfig or path to YAML.
            arguments: Further arguments of the constructor, such as `example_input`.

        Raises:
            ConfigError: The config is unreadable or lacks "channel_unit".
        """
        plain = written.load_plain(config)
        if "channel_unit" not in plain:
            raise ConfigError(f"Got a structure with keys {sorted(plain)}; expected 'channel_unit' among them.")
        mutator = cls(plain["channel_unit"], **arguments)
        mutator._config = plain
        return mutator

    # The model

    def prepare_from_supernet(self, model: nn.Module) -> None:
        """Trace, certify, convert and wire the model in place; its outputs do not change by a bit.

        Args:
            model: A plain model, or one whose dynamic ops already share mutables.

        Raises:
            ConfigError: No module, no example input, this mutator already has a model, a model without parameters or
                with lazy ones, a structure of another model, or an entry or override for a unit that does not exist or
                does not take it. The model is unchanged.
            TraceError: The model's own forward fails on the example input. The model is unchanged.
        """
        if self._model is not None:
            raise ConfigError("This ChannelMutator already has a model; make another one.")
        check_model(model)
        if self._config is not None and self._config.get("fingerprint"):
            written.check_fingerprint(self._config["fingerprint"], model)
        found = dynamic_ops(model)
        try:
            if any(c.spans for op in found.values() for c in op.mutable_attrs.values()):
                self.units = wiring.adopt_units(model, lambda size: self.unit_type(size, **self.default_args))
            elif written.has_channels(self._config):
                self._prepare_from_config(model)
            else:
                self._prepare_from_trace(model)
            self._model = model
            self._apply_entries()
            self.limits()  # what overrides ask for exists
        except Exception:  # raised again
            if not found:
                to_static_(model)  # nothing is cut: it is as it was
            self._model, self._graph, self._trace, self.units = None, None, None, []
            raise
        if self._prepared is not None:
            remember_(model, self._prepared)

    def _prepare_from_trace(self, model: nn.Module) -> None:
        graph, self._trace = self._analyze(model)
        self._graph = graph
        arguments = self.unit_type, self.default_args, self._entries
        by_name = {spec.name: make_unit(*arguments, spec.num_channels, spec.name) for spec in graph.units}
        for unit, spec in zip(by_name.values(), graph.units, strict=True):
            unit.axis, unit.kind, unit.renormalizing = spec.axis, spec.kind, spec.renormalizing
            unit.divisor = int(np.lcm(unit.divisor, spec.divisor))
        wiring.convert_model_(model, graph, self.ops)
        wiring.wire_(model, graph, by_name)
        roles = wiring.roles_of(model, graph)
        wiring.members(model, by_name, lambda *key: roles.get(key, (False, False)))
        self.units = list(by_name.values())

    def rewire(self) -> None:
        """Convert and wire the model again after it was made plain and dense: same units, masks and choices."""
        wiring.convert_model_(self.model, self.graph, self.ops)
        wiring.wire_(self.model, self.graph, {unit.name: unit for unit in self.units})

    def _analyze(self, model: nn.Module) -> tuple[ChannelGraph, DenseTrace]:
        if self.example_input is None:
            raise ConfigError("Got no example_input; expected a tensor, a tuple or a mapping to trace the model with.")
        args, kwargs = split_input(self.example_input)
        with static_view(model), see_through(model):
            return analyze(model, args, kwargs, ignore=self.ignore, **self._options)

    def _prepare_from_config(self, model: nn.Module) -> None:
        assert self._config is not None, "checked by the caller"
        entries = self._config["channel_unit"]["units"]
        by_name = {}
        for name, entry in entries.items():
            size = int(entry["init_args"]["num_channels"])
            unit = by_name[name] = make_unit(self.unit_type, self.default_args, self._entries, size, name)
            unit.axis, unit.kind = entry.get("axis", "channels"), entry.get("kind", "")
        roles = written.wire_from_config_(model, self._config, by_name, self.ops)
        wiring.members(model, by_name, lambda *key: roles.get(key, (False, False)))
        self.units = list(by_name.values())

    def _apply_entries(self) -> None:
        choices = {n: e.get("choice") if isinstance(e, Mapping) else e for n, e in self._entries.items()}
        chosen = {n: c for n, c in choices.items() if c is not None}
        if chosen:
            self.set_choices(chosen, by_value=True)

    @property
    def model(self) -> nn.Module:
        """The model, converted.

        Raises:
            ConfigError: `prepare_from_supernet` has not been called.
        """
        if self._model is None:
            raise ConfigError("This ChannelMutator has no model yet; call prepare_from_supernet(model) first.")
        return self._model

    @property
    def graph(self) -> ChannelGraph:
        """The certified graph; made now where the units came without a trace.

        Raises:
            ConfigError: No model, or no example input to trace it with.
        """
        if self._graph is None:
            graph, self._trace = self._analyze(self.model)
            missing = {u.name for u in self.units} ^ {u.name for u in graph.units}
            if missing:
                raise ConfigError(f"Got units {sorted(missing)} that the trace and the structure do not share.")
            self._graph = graph
        return self._graph

    @property
    def _prepared(self) -> Prepared | None:
        if self._graph is None or self._trace is None:
            return None
        return Prepared(self._graph, self._trace, {unit.name: unit.mutable for unit in self.units})

    # Choices

    @property
    def mutable_units(self) -> list[MutableChannelUnit]:
        """The units whose choice may still change."""
        return [unit for unit in self.units if unit.is_mutable]

    @property
    def current_choices(self) -> dict[str, float | int]:
        """Unit name -> what remains, for every mutable unit."""
        return {unit.name: unit.current_choice for unit in self.mutable_units}

    @property
    def choice_template(self) -> dict[str, float | int]:
        """Unit name -> current choice, to be edited and handed to `set_choices`."""
        return self.current_choices

    def sample_choices(self, kind: str = "random") -> dict[str, float | int]:
        """Return one choice per mutable unit; nothing changes.

        Args:
            kind: "random", "max" (everything) or "min" (as little as the units allow).

        Raises:
            ConfigError: Another `kind`.
        """
        if kind == "random":
            return {unit.name: unit.sample_choice() for unit in self.mutable_units}
        if kind not in ("max", "min"):
            raise ConfigError(f"Got kind={kind!r}. {did_you_mean(kind, ('random', 'max', 'min'))}")
        counts = {u.name: (u.num_channels if kind == "max" else u.min_channels) for u in self.mutable_units}
        return {u.name: u._choice_of(counts[u.name]) for u in self.mutable_units}

    def set_choices(self, choices: Mapping[str, float | int], *, by_value: bool = False) -> None:
        """Set choices and certify the structure they give.

        Args:
            choices: Unit name or glob -> choice. Units not named keep theirs.
            by_value: Read numbers as in files: up to 1 is a ratio, above 1 a count.

        Raises:
            ConfigError: A name that matches no unit, or a choice out of range. Nothing has changed.
            TraceError: The structure does not certify. Nothing has changed.
        """
        counts: dict[str, int] = {}
        for pattern, choice in written.load_plain(choices).items():
            for unit in units_matching(self.units, pattern):
                counts[unit.name] = unit.choice_to_count(choice, by_value=by_value)
        with self._all_or_nothing():
            for unit in self.units:
                if unit.name in counts and counts[unit.name] != unit.activated_channels:
                    unit.keep_count(counts[unit.name])
            self.certify(self.current_plan())

    @contextmanager
    def _all_or_nothing(self) -> Any:
        masks = [unit.mutable.current_mask for unit in self.units]
        try:
            yield
        except Exception:  # raised again
            for unit, mask in zip(self.units, masks, strict=True):
                unit.mutable.current_choice = mask
            raise
        self._reset_caches()
        for op in dynamic_ops(self.model).values():
            op._dynamic.settle(op)

    def _reset_caches(self) -> None:
        """Empty what the model caches between forwards: it may hold tensors of the old structure."""
        if self._graph is not None:
            reset_caches(self.model, self._graph.caches)
        if self._trace is not None:
            self._trace.sandbox.memos.forget()

    def current_plan(self) -> KeepPlan:
        """Return the channels that every unit keeps now."""
        return KeepPlan({u.name: tuple(u.mutable.current_mask.nonzero().flatten().tolist()) for u in self.units})

    def certify(self, plan: KeepPlan) -> None:
        """Certify a structure by one more trace, without touching the model.

        Raises:
            PlanError: The plan names an unknown unit or channel.
            TraceError: The pruned program would not be the dense one on the kept channels.
        """
        check_plan(plan, {u.name: u.num_channels for u in self.units})
        if self._graph is None and self.example_input is None:
            return  # units of a written structure were certified when it was made
        graph = self.graph
        if self._trace is None:
            raise TraceError("This mutator was loaded without its trace; prepare the model again to certify.")
        with static_view(self.model), see_through(self.model):
            certify_kept(graph, self._trace, plan.kept)

    def apply(self, plan: KeepPlan) -> None:
        """Certify a plan, then set the masks; units it does not name keep their channels.

        Raises:
            PlanError: See `certify`; or the plan changes a fixed unit.
            TraceError: See `certify`. Nothing has changed.
        """
        full = KeepPlan({**self.current_plan().kept, **plan.kept})
        self.certify(full)
        with self._all_or_nothing():
            for unit in self.units:
                if unit.is_mutable:
                    unit.keep(full.kept[unit.name])
                elif unit.activated_channels != len(full.kept[unit.name]):
                    raise PlanError(f"Got a plan for unit {unit.name!r}, which is fixed at {unit.current_choice}.")

    def fix_channel_mutables(self) -> None:
        """Make every choice final: later writes raise and `is_mutable` turns False."""
        for unit in self.units:
            unit.fix_chosen()

    # What it costs, and what it is

    def counts(self, choices: Mapping[str, float | int] | None = None) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the kept count of every unit in the order of `graph.cost.names`."""
        kept = {u.name: u.activated_channels for u in self.units}
        for pattern, choice in (choices or {}).items():
            kept.update({u.name: u.choice_to_count(choice) for u in units_matching(self.units, pattern)})
        return np.array([kept[name] for name in self.graph.cost.names], np.int64)

    def cost(self, choices: Mapping[str, float | int] | None = None) -> Cost:
        """Price the current structure, or the one that `choices` would give.

        Raises:
            ConfigError: The mutator has neither a trace nor an example input.
        """
        return self.graph.cost.cost(self.counts(choices))

    def limits(self, divisor: int = 1, min_ratio: float = 0.0) -> list[UnitLimits]:
        """Return what a plan may do with each unit, overrides included; a fixed one stays at the count it has.

        Args:
            divisor: Kept counts are multiples of it, on channel axes of at least twice as many channels.
            min_ratio: Floor of what remains, beside each unit's own.
        """
        own = match_overrides(self.overrides, self.units)
        return [limits_of(unit, divisor, min_ratio, own.get(unit.name)) for unit in self.units]

    def report(self, divisor: int = 1, min_ratio: float = 0.0) -> StructureReport:
        """Return every unit with its share of the cost, what can be reached, and every frozen axis with its reason.

        Args:
            divisor: As in `limits`, for what can be reached.
            min_ratio: As in `limits`, for what can be reached.
        """
        report = describe_structure(self.graph, self.limits(divisor, min_ratio), self.counts())
        notes = rebuild_parts(self.model, self._prepared)[1] if self._prepared is not None else []
        return replace(report, notes=(*report.notes, *notes))

    def config_template(
        self, only_mutable_units: bool = False, with_unit_init_args: bool = False, with_channels: bool = False
    ) -> dict[str, Any]:
        """Return the structure as plain containers that YAML can hold.

        Args:
            only_mutable_units: Leave out units that are fixed.
            with_unit_init_args: Add each unit's constructor arguments.
            with_channels: Add the wiring, so that `from_config` needs no trace.
        """
        units = self.mutable_units if only_mutable_units else self.units
        wires = written.spans_of(self.model, {u.name: u for u in self.units}) if with_channels else None
        kind = {"type": self.unit_type.__name__, "default_args": dict(self.default_args)}
        entries = written.entries_of(units, wires, with_unit_init_args)
        with static_view(self.model):
            fingerprint = written.fingerprint(self.model)
        template = {"type": type(self).__name__, "channel_unit": {**kind, "units": entries}, "fingerprint": fingerprint}
        return template if wires is None else {**template, "integers": wires["integers"]}
