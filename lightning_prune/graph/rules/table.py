"""The table from ATen op name to rule, and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.errors import ConfigError
from lightning_prune.graph.call import Rule
from lightning_prune.graph.labels import Axis

__all__ = ["RULES", "RuleEntry", "Stays", "check_rules", "rule"]

Stays = Callable[[Mapping[str, Any], Sequence[Axis]], Any]


@dataclass(frozen=True)
class RuleEntry:
    """One rule.

    Args:
        apply: Moves and binds the labels of one call.
        sizes: Arguments that are sizes: they may differ between the dense and the pruned program, since the shapes
            of the results are compared instead.
        index: The op takes indices: the pruned call must select the living part of what the dense call selects.
        stays: What of its sizes must be equal all the same, from the arguments and the dense axes of the first
            tensor: where a fixed axis is cut, how many groups are normalised. An integer of the model that follows
            one axis may be a number of something else too.
    """

    apply: Rule
    sizes: frozenset[str] = frozenset()
    index: bool = False
    stays: Stays | None = None

    def scalars(self, args: Mapping[str, Any], in_axes: Sequence[Sequence[Axis]]) -> tuple[tuple[str, Any], ...]:
        """Return the arguments that must be equal in the dense and the pruned program; `in_axes` are the dense ones."""
        scalars = tuple(
            (name, tree_map(_blank, value) if _holds_tensor(value) else value)
            for name, value in args.items()
            if name not in self.sizes and not isinstance(value, Tensor)
        )
        return scalars if self.stays is None else (*scalars, ("sizes", self.stays(args, in_axes[0])))

    def taken(self, args: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the sizes that say what an op with indices takes: equal ones take the same of equal axes."""
        return tuple(args.get(name) for name in sorted(self.sizes)) if self.index else ()


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)


def _blank(value: Any) -> Any:
    return "tensor" if isinstance(value, Tensor) else value


RULES: dict[str, RuleEntry] = {}


def rule(
    names: str, sizes: Sequence[str] = (), index: bool = False, stays: Stays | None = None
) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops, named without overload and separated by spaces; every overload shares it.

    An op of another namespace is named with it.
    """

    def register(apply: Rule) -> Rule:
        for word in names.split():
            name = word if "::" in word else f"aten::{word}"
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = RuleEntry(apply, frozenset(sizes), index, stays)
        return apply

    return register


def check_rules(rules: Mapping[str, Rule | RuleEntry] | None) -> dict[str, RuleEntry]:
    """Return the rules of a user as entries.

    Args:
        rules: Schema name, with its namespace and without overload -> a function, or a `RuleEntry` for an op that takes
            sizes or indices.

    Raises:
        ConfigError: A name without a namespace, or a rule that is neither.

    Example:
        >>> def same_axes(call):
        ...     call.put(call.out, call.axes(call["x"]))
        >>> list(check_rules({"my::op": same_axes}))
        ['my::op']
    """
    entries = {}
    for name, given in (rules or {}).items():
        if name.count("::") != 1 or "." in name:
            raise ConfigError(f"Got a rule for {name!r}; expected the schema name of an op, such as 'my::op'.")
        if not (isinstance(given, RuleEntry) or callable(given)):
            raise ConfigError(f"Got {given!r} as the rule for {name}; expected a function or a RuleEntry.")
        entries[name] = given if isinstance(given, RuleEntry) else RuleEntry(given)
    return entries
