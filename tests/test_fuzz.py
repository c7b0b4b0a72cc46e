"""Random networks keep every promise; and the fuzz would say so if they did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lightning_prune.graph.call import Call
from lightning_prune.graph.labels import LabelSpace
from lightning_prune.graph.rules import RULES, RuleEntry, normalization, reduction
from lightning_prune.ops.state import DynamicState
from tests.fuzz import Network, network_with, networks, node, random_network, shrink
from tests.fuzz_blocks import BLOCKS
from tests.fuzz_checks import Outcome, examine

ZEROED = "removed and zeroed differ"


def test_random_networks_keep_every_promise() -> None:
    passed: dict[Any, Outcome] = {}

    @settings(max_examples=140, database=None, suppress_health_check=list(HealthCheck))
    @given(networks())
    def run(network: Network) -> None:
        wiring = network.inputs, tuple((each.block, each.inputs) for each in network.nodes)
        if wiring not in passed:  # hypothesis likes to draw what it has drawn, but for an option
            passed[wiring] = examine(network)

    run()
    found = list(passed.values())
    assert len(found) >= 80
    units = sum((outcome.units for outcome in found), Counter[str]())
    assert sum(bool(outcome.pruned) for outcome in found) >= 0.8 * len(found), "too few networks have units"
    assert min(units[axis] for axis in ("channels", "heads", "head_dim", "groups")) > 0, units
    refused = [reason for outcome in found for reason in outcome.refused]
    assert len(refused) <= 0.1 * sum(outcome.structures for outcome in found), refused


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - {"Reading", "Lookup"}))
def test_a_block_is_pruned_in_some_network(name: str) -> None:
    family = BLOCKS[name].family
    assert any(family in examine(network_with(name, seed)).pruned for seed in range(8))


def test_a_seed_is_a_network() -> None:
    assert random_network(7) == random_network(7) != random_network(8)
    network = random_network(7)
    assert eval(repr(network), {"Network": Network, "node": node}) == network


def test_what_fails_is_made_smaller() -> None:
    network = Network(
        ("tokens",),
        (
            node("Dense", 0, out=4, spelling="layer"),
            node("Activation", 1, spelling="relu"),
            node("Split", 2, at=2, spelling="chunk"),
            node("Join", 3, 4, spelling="add"),
            node("Scale", 5, spelling="flat"),
        ),
        ((6, "pool"), (2, "as it is")),
    )
    smaller = shrink(network, lambda each: any(n.block == "Split" for n in each.nodes))
    assert smaller == Network(("tokens",), (node("Split", 0, at=2, spelling="chunk"),), ((1, "pool"),))


def test_a_position_that_lives_by_two_channels_of_a_unit_binds_them() -> None:
    """Padded and sliced at other places, a channel stands where a group begins; only its neighbour was registered."""
    conv = node("Conv", 0, out=12, groups=1, kernel=3, stride=2, dilation=1, bias=False, spelling="raw")
    transposed = node("TransposedConv", 1, out=9, groups=3, stride=2, bias=True)
    merged = node("SplitAndMerge", 1, at=5, spelling="unbind", treat="layer", swap=True)
    assert examine(Network(("image",), (conv, transposed, merged), ((3, "flatten"),), seed=34)).structures > 0


# Broken on purpose

Patch = Callable[[pytest.MonkeyPatch], None]
ATTENTION = {"heads": 2, "head_dim": 4, "shared": 1, "projection": "separate", "sizes": "attributes"}


def tokens(*nodes: Any) -> Network:
    nodes = (node("Dense", 0, out=8, spelling="layer"), *nodes)
    return Network(("tokens",), nodes, ((len(nodes), "pool"),))


def with_rule(name: str, rule: Callable[[Call], None], **changes: Any) -> Patch:
    entry = replace(RULES[f"aten::{name}"], apply=rule, **changes)
    return lambda patch: patch.setitem(RULES, f"aten::{name}", entry)


def keep_axes(call: Call) -> None:
    call.put(call.out, call.axes(call["self"]))


def ignore_role(patch: pytest.MonkeyPatch) -> None:
    mark = LabelSpace.mark
    patch.setattr(LabelSpace, "mark", lambda self, role, axis: role == "rescaled" or mark(self, role, axis))


def ignore_renormalizing(patch: pytest.MonkeyPatch) -> None:
    for module in (normalization, reduction):
        patch.setattr(module, "renormalize", lambda call, axis: None)


def forget_an_axis(patch: pytest.MonkeyPatch) -> None:
    count = Call.count
    patch.setattr(Call, "count", lambda self, *sizes: count(self, *sizes[1:]))


def write_nothing_back(patch: pytest.MonkeyPatch) -> None:
    leave = DynamicState.leave_forward
    patch.setattr(DynamicState, "leave_forward", lambda self, written=True: leave(self, written=False))


def ignore(owner: type, method: str) -> Patch:
    return lambda patch: patch.setattr(owner, method, lambda *_: None)


MUTANTS: dict[str, tuple[Patch, Network, str]] = {
    "softmax that keeps channels": (
        with_rule("softmax", keep_axes), tokens(node("Reading", 1, spelling="softmax")), ZEROED
    ),
    "a roll that moves nothing": (
        with_rule("roll", keep_axes, index=False), tokens(node("Reorder", 1, by=2, spelling="roll")), ZEROED
    ),
    "numbers that are not compared": (
        lambda patch: patch.setattr(RuleEntry, "scalars", lambda *_: ()),
        tokens(node("Reading", 1, spelling="divide")), ZEROED,
    ),
    "norms that are not reported": (ignore_renormalizing, tokens(node("Norm", 1, groups=1, spelling="layer")), ZEROED),
    "a scale that is not reported": (
        ignore_role, tokens(node("Attention", 1, **ATTENTION, product="sdpa", extra="nothing", residual=True)), ZEROED
    ),
    "constants of any size": (ignore(Call, "pin"), tokens(node("Reading", 1, spelling="sum of ones")), ZEROED),
    "a cost that forgets an axis": (forget_an_axis, tokens(), "a cost of"),
    "statistics that are not written back": (
        write_nothing_back, tokens(node("Norm", 1, groups=1, spelling="batch")), "dynamic and exported differ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_promise_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, network, what = MUTANTS[name]
    examine(network)
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=what):
        examine(network)
