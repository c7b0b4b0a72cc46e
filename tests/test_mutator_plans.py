"""Plans of a mutator, what they cost, and its report."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, outputs, scattered
from tests.test_mutator import FIRST, SECOND, prepared


def test_a_plan_keeps_the_channels_it_names() -> None:
    mutator = prepared()
    mutator.apply(KeepPlan({FIRST: (1, 6)}))
    assert mutator.current_plan() == KeepPlan({FIRST: (1, 6), SECOND: tuple(range(16))})
    weight = mutator.model.feature[0]._parameters["weight"]
    assert torch.equal(mutator.model.feature[0].weight, weight[[1, 6]])
    assert torch.equal(mutator.model.feature[1].weight, mutator.model.feature[1]._parameters["weight"][:, [1, 6]])
    mutator.apply(KeepPlan({FIRST: (0, 3), SECOND: (2,)}))
    assert mutator.current_plan().kept == {FIRST: (0, 3), SECOND: (2,)}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        pytest.param({"feature.9": (0,)}, r"Got a plan for unit 'feature\.9'\. Valid: ", id="unknown unit"),
        pytest.param({FIRST: (0, 8)}, r"Got channel 8 to keep for unit .* of 8 channels", id="no such channel"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(kept: dict[str, tuple[int, ...]], message: str) -> None:
    mutator = prepared()
    with pytest.raises(PlanError, match=message):
        mutator.apply(KeepPlan({SECOND: (1,), **kept}))
    assert mutator.current_choices == {FIRST: 1.0, SECOND: 1.0}


def test_certifying_does_not_touch_the_model() -> None:
    mutator = prepared()
    versions = [unit.mutable.version for unit in mutator.units]
    mutator.certify(KeepPlan({FIRST: (1, 2)}))
    assert [unit.mutable.version for unit in mutator.units] == versions


class Cached(nn.Module):
    """Keeps what it made of its weights, as models do in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.made = nn.Linear(7, 12), nn.Linear(12, 5), {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.made:
            self.made["scale"] = self.one.weight.abs().amax(1)
        return self.two(self.one(x) * self.made["scale"])


class CachedAttribute(nn.Module):
    """Keeps it as an attribute, with a flag that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 12), nn.Linear(12, 5)
        self.is_made = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_made:
            self.scale, self.is_made = self.one.weight.abs().amax(1), True
        return self.two(self.one(x) * self.scale)


@pytest.mark.parametrize("cached", [Cached, CachedAttribute])
def test_caches_of_the_model_are_emptied_when_a_choice_changes(cached: type[nn.Module]) -> None:
    model, x = cached(), torch.randn(2, 7)
    dense = outputs(copy.deepcopy(model), (x,))
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    model(x)
    mutator.set_choices({"one_(0, 12)_out_1_in_1": 0.5})
    expected = outputs(export_pruned(model), (x,))
    assert_same(outputs(model, (x,)), expected)
    mutator.set_choices({"one_(0, 12)_out_1_in_1": 1.0})
    assert_same(outputs(model, (x,)), dense)


def test_limits_follow_the_units_and_what_is_asked() -> None:
    mutator = prepared(channel_unit={"default_args": {"divisor": 2, "min_value": 3}})
    assert [(x.name, x.num_channels, x.floor, x.divisor) for x in mutator.limits()] == [
        (FIRST, 8, 4, 2),
        (SECOND, 16, 4, 2),
    ]
    assert [(x.floor, x.divisor) for x in mutator.limits(divisor=8, min_ratio=0.3)] == [(4, 2), (5, 8)]
    heads = {x.name.rpartition("_")[2]: x.divisor for x in prepared("attention").limits(divisor=2)}
    assert heads == {"heads": 1, "dim": 1, "2": 2}


# Costs and reports


def test_costs_of_choices_and_of_now() -> None:
    mutator = prepared()
    assert mutator.cost().macs == 2 * (16 * 27 * 8 + 4 * 72 * 16 + 16000)
    assert mutator.cost({FIRST: 0.5, SECOND: 9}).macs == 2 * (16 * 27 * 4 + 4 * 36 * 9 + 9000)
    assert mutator.current_choices == {FIRST: 1.0, SECOND: 1.0}
    mutator.set_choices({FIRST: 0.5, SECOND: 9})
    assert mutator.cost().params == 28 * 4 + 36 * 9 + 9 + 9000 + 1000
    assert mutator.cost().per_example == 16 * 27 * 4 + 4 * 36 * 9 + 9000


def test_a_report_tells_units_costs_and_reasons() -> None:
    mutator = prepared()
    mutator.set_choices({FIRST: 0.5})
    found = mutator.report().to_dict()
    row = found["units"][0]
    assert (row["name"], row["axis"], row["kept"], row["num_channels"]) == (FIRST, "channels", 4, 8)
    assert row["layers"] == ("feature.0", "feature.1")
    dense = 2 * (16 * 27 * 8 + 4 * 72 * 16 + 16000)
    assert row["macs_share"] == pytest.approx(2 * (16 * 27 * 7 + 4 * 9 * 7 * 16) / dense)
    reach = {"minimum": 2 * (432 + 36 + 1000), "maximum": dense}
    assert found["costs"]["macs"] == {"current": mutator.cost().macs, "dense": dense, **reach}
    assert found["costs"]["channels"] == {"current": 20, "dense": 24, "minimum": 2, "maximum": 24}
    assert {"tensor": "head.weight", "axis": 0, "size": 1000, "reason": "model output"} in found["frozen"]
    text = str(mutator.report())
    assert found["batch_size"] == 2
    for part in (FIRST, "head.weight", "model output", f"{dense:,}", f"Costs of a batch of {found['batch_size']}"):
        assert part in text
    size = found["batch_size"]
    assert (f"Costs of a batch of {size}" in text) == (size > 1)


def test_a_report_remarks_on_units_whose_removal_is_not_zeroing_and_on_unknown_ops() -> None:
    remarks = {row.name: row.remarks for row in prepared("layer_norm").report().units}
    assert remarks == {"embed_(0, 20)_out_4_in_4": ("renormalizing",), "hidden_(0, 28)_out_1_in_1": ()}
    notes = prepared("unknown_op").report().notes
    assert notes == ("no rule for lightning_prune_zoo::position_scale (1 call): what it touches is frozen",)


class GroupedMatrix(nn.Module):
    """A layer that has groups and a weight, and is no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.weight = 3, nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bgc,gcd->bgd", x.unflatten(1, (self.groups, -1)), self.weight).flatten(1)


def test_a_layer_with_groups_need_not_be_a_convolution() -> None:
    model, inputs = (
        nn.Sequential(nn.Linear(7, 12), GroupedMatrix(), nn.Linear(15, 2)).double(),
        torch.randn(2, 7).double(),
    )
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    mutator.apply(scattered(mutator.units))
    assert (model[1].groups, model[1].weight.shape[0]) == (2, 2)
    assert_same(outputs(model, (inputs,)), outputs(export_pruned(model), (inputs,)))
