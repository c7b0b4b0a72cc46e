"""The table from ATen op name to rule, and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_prune.graph.call import Rule

__all__ = ["RULES", "RuleEntry", "rule"]


@dataclass(frozen=True)
class RuleEntry:
    """One rule.

    Args:
        apply: Moves and binds the labels of one call.
        sizes: Arguments that are sizes: they may differ between the dense and the pruned program, since the shapes
            of the results are compared instead.
        index: The op takes indices: the pruned call must select the living part of what the dense call selects.
    """

    apply: Rule
    sizes: frozenset[str] = frozenset()
    index: bool = False


RULES: dict[str, RuleEntry] = {}


def rule(names: str, sizes: Sequence[str] = (), index: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops, named without overload and separated by spaces; every overload shares it."""

    def register(apply: Rule) -> Rule:
        for name in names.split():
            assert f"aten::{name}" not in RULES, f"two rules for {name}"
            RULES[f"aten::{name}"] = RuleEntry(apply, frozenset(sizes), index)
        return apply

    return register
