"""Structures as files: templates, units rebuilt from them, and every error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import nn

from lightning_prune.errors import ConfigError
from lightning_prune.mutator import ChannelMutator
from lightning_prune.units import SequentialMutableChannelUnit
from tests.compare import assert_same, outputs, scattered
from tests.zoo import ZOO

FIRST, SECOND = "feature.0_(0, 8)_out_1_in_1", "feature.1_(0, 16)_out_1_in_1"


def prepared(name: str = "two_convolutions", **arguments: Any) -> ChannelMutator:
    mutator = ChannelMutator(example_input=ZOO[name].inputs(), **arguments)
    mutator.prepare_from_supernet(ZOO[name].make())
    return mutator


# Configs


def test_a_template_holds_choices_and_on_request_more() -> None:
    mutator = prepared(channel_unit={"type": "MutableChannelUnit", "default_args": {"divisor": 2}})
    mutator.set_choices({FIRST: 0.5})
    mutator.units[1].fix_chosen()
    config = mutator.config_template()
    assert config["type"] == "ChannelMutator"
    assert config["channel_unit"] == {
        "type": "MutableChannelUnit",
        "default_args": {"divisor": 2},
        "units": {FIRST: {"choice": 0.5}, SECOND: {"choice": 1.0}},
    }
    assert config["fingerprint"]["feature.0.weight"] == "8x3x3x3"
    assert list(mutator.config_template(only_mutable_units=True)["channel_unit"]["units"]) == [FIRST]
    init = mutator.config_template(with_unit_init_args=True)["channel_unit"]["units"][FIRST]["init_args"]
    assert init == {"num_channels": 8, "choice_mode": "ratio", "divisor": 2, "min_value": 1, "min_ratio": 0.0}
    channels = mutator.config_template(with_channels=True)["channel_unit"]["units"][FIRST]["channels"]
    assert [(c["name"], c["start"], c["end"], c["is_output_channel"]) for c in channels["output_related"]] == [
        ("feature.0", 0, 8, True)
    ]
    assert [(c["name"], c["start"], c["end"], c["is_output_channel"]) for c in channels["input_related"]] == [
        ("feature.1", 0, 8, False)
    ]


@pytest.mark.parametrize("name", ["residual", "concat", "grouped", "attention", "flatten_linear", "tied_weights"])
def test_a_rebuilt_unit_has_the_members_of_the_first_one(name: str) -> None:
    mutator = prepared(name)
    again = ChannelMutator.from_config(mutator.config_template(with_channels=True))
    again.prepare_from_supernet(ZOO[name].make())
    for unit, twin in zip(mutator.units, again.units, strict=True):
        assert (twin.name, twin.axis, twin.kind) == (unit.name, unit.axis, unit.kind)
        assert twin.renormalizing == unit.renormalizing
        for side in ("output_related", "input_related"):
            members = [(c.name, c.tensor, c.dim, c.start, c.end) for c in getattr(unit, side)]
            assert [(c.name, c.tensor, c.dim, c.start, c.end) for c in getattr(twin, side)] == members, side


@pytest.mark.parametrize("with_channels", [pytest.param(True, id="with channels"), pytest.param(False, id="choices")])
def test_a_config_goes_through_yaml(with_channels: bool, tmp_path: Path) -> None:
    mutator = prepared("attention")
    mutator.apply(scattered(mutator.units))
    config = mutator.config_template(with_channels=with_channels)
    path = tmp_path / "structure.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    given = {} if with_channels else {"example_input": ZOO["attention"].inputs()}
    for source in (path, str(path), OmegaConf.load(path), config):
        again = ChannelMutator.from_config(source, **given)
        again.prepare_from_supernet(ZOO["attention"].make())
        assert again.current_choices == mutator.current_choices
        assert again.config_template(with_channels=with_channels) == config


def test_a_structure_without_a_trace_is_priced_once_it_has_an_example() -> None:
    config = prepared().config_template(with_channels=True)
    blind, seeing = (
        ChannelMutator.from_config(config),
        ChannelMutator.from_config(config, example_input=ZOO["two_convolutions"].inputs()),
    )
    for mutator in (blind, seeing):
        mutator.prepare_from_supernet(ZOO["two_convolutions"].make())
        mutator.set_choices({FIRST: 0.5})
        assert mutator.model.feature[1].weight.shape == (16, 4, 3, 3)
    with pytest.raises(ConfigError, match="Got no example_input"):
        blind.cost()
    assert seeing.cost() == prepared().cost({FIRST: 0.5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda m: nn.Sequential(m),
            r"parameter 'feature\.0\.weight' is 8x3x3x3 in the structure and absent in the model", id="names",
        ),
        pytest.param(
            lambda m: setattr(m, "head", nn.Linear(16, 10)) or m,
            r"parameter 'head\.weight' is 1000x16 in the structure and 10x16 in the model", id="shapes",
        ),
        pytest.param(
            lambda m: m.add_module("more", nn.Linear(2, 2)) or m,
            r"parameter 'more\.weight' is absent in the structure and 2x2 in the model", id="more",
        ),
    ],
)  # fmt: skip
def test_a_structure_of_another_model_is_refused(change: Callable[[Any], nn.Module], message: str) -> None:
    config = prepared().config_template(with_channels=True)
    model = change(ZOO["two_convolutions"].make())
    before = repr(model)
    with pytest.raises(ConfigError, match=message):
        ChannelMutator.from_config(config).prepare_from_supernet(model)
    assert repr(model) == before


def test_a_file_that_is_no_structure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Got a structure with keys \['units'\]; expected 'channel_unit' among them"):
        ChannelMutator.from_config({"units": {}})
    with pytest.raises(ConfigError, match=r"Got structure file '.*absent\.yaml' that cannot be read"):
        ChannelMutator.from_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="Got a structure of type list; expected a mapping of units"):
        ChannelMutator.from_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml' that cannot be read"):
        ChannelMutator.from_config(tmp_path / "broken.yaml")


def test_units_come_from_a_model_that_is_dynamic_already() -> None:
    mutator = prepared("residual")
    mutator.apply(scattered(mutator.units))
    twin = copy.deepcopy(mutator.model)
    again = ChannelMutator(SequentialMutableChannelUnit)
    again.prepare_from_supernet(twin)
    assert again.current_plan() == mutator.current_plan()
    assert [type(unit) for unit in again.units] == [SequentialMutableChannelUnit] * 2
    inputs = ZOO["residual"].inputs()
    assert_same(outputs(twin, inputs), outputs(mutator.model, inputs))
    again.set_choices(dict.fromkeys(again.current_choices, 0.5))
    assert twin.stem.conv.weight.shape == (4, 3, 3, 3)
    assert mutator.current_plan() != again.current_plan()
