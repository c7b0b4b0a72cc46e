"""Real models as they are: certified, dynamic == exported, removed == zeroed, priced, their units found.

A third of them; `--all-models` takes all, in this process. `make zoo` takes all, each in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examine import examine, unexpected
from tests.models import models, quick_models

# torchvision: units found by reading the code
BY_HAND = {
    "resnet18": 12,
    "resnet50": 37,
    "mobilenet_v2": 25,
    "mobilenet_v3_small": 27,
    "densenet121": 120,
    "googlenet": 61,
    "vgg16_bn": 15,
    "inception_v3": 96,
    "efficientnet_b0": 40,
    "squeezenet1_1": 25,
    "mnasnet1_0": 25,
    "convnext_tiny": 22,
}
EXPECTED: dict[str, Any] = json.loads(Path(__file__).with_name("expected_units.json").read_text(encoding="utf-8"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", models() if metafunc.config.getoption("--all-models") else quick_models())


def test_a_model_is_certified_cut_and_priced(name: str) -> None:
    assert not unexpected(examine(name), EXPECTED)


@pytest.mark.parametrize("model", BY_HAND)
def test_as_many_units_are_expected_as_were_worked_out_by_hand(model: str) -> None:
    expected = EXPECTED[f"torchvision:{model}"]
    assert sum(expected["units"].values()) == BY_HAND[model]
    assert not expected["absent"]


def test_every_model_has_its_expected_units() -> None:
    assert set(EXPECTED) == set(models())


def test_the_models_of_every_run_are_a_third_of_all() -> None:
    assert set(quick_models()) < set(models())
    assert 3 * len(quick_models()) >= len(models())
