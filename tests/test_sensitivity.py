"""Each unit pruned alone: the numbers, that nothing else changes, the table, and the importance that it makes."""

from __future__ import annotations

import copy
import io
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import nn
from torchmetrics import MeanMetric

from lightning_prune import ChannelMutator, export_pruned, sensitivity
from lightning_prune.errors import ConfigError
from lightning_prune.ops import dynamic_ops
from lightning_prune.sensitivity import SensitivityRow, SensitivityTable
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer

pytestmark = QUIET

FIRST, SECOND = "conv1_(0, 16)_out_2_in_2", "conv2_(0, 32)_out_1_in_1"


class Net(LitNet):
    """Tells its input, has a metric of its own, and a validation that draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(2, 3, 6, 6)
        self.mean = MeanMetric()
        self.seen: list[int] = []
        self.norm.running_mean.normal_()

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.mean(torch.rand(()))
        self.log("val_noise", self.mean)
        self.seen.append(index)


class Data(LightningDataModule):
    def val_dataloader(self) -> Any:
        return loader()


def loss_of(model: nn.Module) -> float:
    """The loss of a plain model over the data, without Lightning."""
    images, labels = data().tensors
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(images), labels))


def quiet(**arguments: Any) -> Any:
    return trainer(**arguments)


def measured(model: nn.Module, datamodule: Any = None, **arguments: Any) -> SensitivityTable:
    return sensitivity(model, loader() if datamodule is None else datamodule, trainer=quiet(), **arguments)


def test_values_are_those_of_the_model_with_one_unit_pruned() -> None:
    model = Net()
    table = measured(model, ratios=(0.25, 0.5))
    assert (table.monitor, table.mode, table.ratios) == ("val_loss", "min", (0.5, 0.25))
    assert table.before == pytest.approx(loss_of(copy.deepcopy(model)), rel=1e-5)
    assert [(row.unit, row.num_channels, row.kept) for row in table.rows] == [
        (FIRST, 16, (8, 4)),
        (SECOND, 32, (16, 8)),
    ]
    for row in table.rows:
        for ratio, value in zip(table.ratios, row.values, strict=True):
            alone = copy.deepcopy(model)
            mutator = ChannelMutator(example_input=model.example_input_array)
            mutator.prepare_from_supernet(alone)
            mutator.set_choices({row.unit: ratio})
            assert value == pytest.approx(loss_of(export_pruned(alone)), rel=1e-5)
            assert value != table.before


def test_data_in_every_form() -> None:
    class WithData(Net):
        def val_dataloader(self) -> Any:
            return loader()

    torch.manual_seed(0)
    expected = measured(Net(), ratios=[0.5])
    for form in (Data(), [loader()]):
        torch.manual_seed(0)
        assert measured(Net(), form, ratios=[0.5]) == expected
    torch.manual_seed(0)
    assert sensitivity(WithData(), ratios=[0.5]) == expected  # and a trainer of its own


# What stays


def everything(model: nn.Module) -> dict[str, Any]:
    """Classes, modes, tensors with their identity, other attributes, hooks and random states."""
    found: dict[str, Any] = {"random": random.getstate(), "torch": torch.get_rng_state().tolist()}
    found["numpy"] = [np.asarray(part).tolist() for part in np.random.get_state()]
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not isinstance(v, dict | list | set | torch.Tensor)}
        contents = {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, dict | list | set)}
        found[name] = (
            type(module),
            attributes,
            {k: v for k, v in contents.items() if k not in ("_parameters", "_buffers")},
        )
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        found[f"{name} tensors"] = {
            k: (id(v), v.requires_grad, v.tolist()) for k, v in tensors.items() if isinstance(v, torch.Tensor)
        }
    return found


def restless(model: nn.Module, dataset: Any) -> float:
    """Changes BatchNorm statistics, modes, attributes and every random state."""
    model.train()
    value = F.cross_entropy(
        model(dataset.tensors[0] + torch.rand(()) + np.random.rand() + random.random()), dataset.tensors[1]
    )
    model.norm.momentum = 0.5
    model.extra = torch.ones(3)
    model.seen.append(7)
    model.mean.update(value)
    return float(value)


@pytest.mark.parametrize(
    "arguments",
    [pytest.param({"trainer": True}, id="validation"), pytest.param({"evaluate": restless}, id="restless evaluation")],
)
def test_a_plain_model_is_as_it_was(arguments: dict[str, Any]) -> None:
    model = Net()
    model.conv2.eval()
    model.head.weight.requires_grad_(False)
    given = {"trainer": quiet()} if "trainer" in arguments else arguments
    before = everything(model)
    sensitivity(model, loader() if "trainer" in arguments else data(), ratios=[0.5, 0.25], **given)
    assert everything(model) == before
    assert not dynamic_ops(model)


def test_a_supernet_keeps_its_masks() -> None:
    model, mutator = Net(), ChannelMutator(example_input=torch.randn(2, 3, 6, 6))
    mutator.prepare_from_supernet(model)
    mutator.set_choices({FIRST: 0.5})
    plan, state = mutator.current_plan(), copy.deepcopy(model.state_dict())
    table = sensitivity(model, data(), mutator=mutator, ratios=[0.75, 0.5], evaluate=restless, importance="l1")
    assert mutator.current_plan() == plan
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert dynamic_ops(model)
    assert table.rows[0].kept == (12, 8)
    assert table.rows[0].values[1] == table.before  # half of it remained before
    assert table.rows[0].values[0] != table.before
    assert mutator.model is model


def test_a_mutator_without_a_model_is_used_for_it() -> None:
    model, mutator = Net(), ChannelMutator(example_input=torch.randn(2, 3, 6, 6), ignore="conv1")
    table = measured(model, mutator=mutator, ratios=[0.5])
    assert [row.unit for row in table.rows] == [SECOND]
    assert not dynamic_ops(model)


def test_an_error_leaves_the_model_too() -> None:
    model, calls = Net(), []

    def fails(model: nn.Module, data: Any) -> float:
        calls.append(model.conv1.weight.shape[0])
        model.norm.running_mean.zero_()
        if len(calls) == 2:
            raise RuntimeError("no data left")
        return 0.0

    before = everything(model)
    with pytest.raises(RuntimeError, match="no data left"):
        sensitivity(model, data(), evaluate=fails)
    assert calls == [16, 12]
    assert everything(model) == before


def test_training_goes_on_as_without_it() -> None:
    def run(look: bool) -> LitNet:
        torch.manual_seed(0)
        model = Net()
        trainer(max_epochs=1).fit(model, loader(shuffle=True))
        if look:
            measured(model, ratios=[0.5])
        trainer(pruning(), max_epochs=4).fit(model, loader(shuffle=True))
        return model

    without, after = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), after.parameters(), strict=True))


def test_every_run_draws_the_same_numbers_on_the_same_parameters() -> None:
    model = Net()
    ids = {id(parameter) for parameter in model.parameters()}

    def noise(seen: nn.Module, data: Any) -> float:
        assert seen is model
        assert not any(module.training for module in seen.modules())
        assert not torch.is_grad_enabled()
        assert {id(p) for m in seen.modules() for p in m._parameters.values() if p is not None} == ids
        return float(torch.rand(())) + random.random() + float(np.random.rand())

    table = sensitivity(model, evaluate=noise, monitor="noise")
    assert {value for row in table.rows for value in row.values} == {table.before}
    assert measured(model, monitor="val_noise", ratios=[0.5]).rows[0].values[0] == pytest.approx(
        measured(model, monitor="val_noise", ratios=[0.5]).before
    )


def test_the_importance_says_which_channels_go_first() -> None:
    model, seen = Net(), []

    def kept(model: nn.Module, mutator: ChannelMutator) -> float:
        seen.append(mutator.current_plan().kept[FIRST])
        return 0.0

    mutator = ChannelMutator(example_input=torch.randn(2, 3, 6, 6))
    mutator.prepare_from_supernet(model)
    arguments = {"mutator": mutator, "units": "conv1*", "ratios": [0.25], "evaluate": kept}
    sensitivity(model, mutator, importance=lambda unit: torch.arange(float(unit.num_channels)), **arguments)
    sensitivity(model, mutator, importance={"name": "l1", "normalizer": "max"}, **arguments)
    best = model.conv1.weight.abs().sum((1, 2, 3)).argsort(descending=True)[:4].sort().values.tolist()
    assert seen == [tuple(range(16)), (12, 13, 14, 15), tuple(range(16)), tuple(best)]


def test_a_count_is_measured_once() -> None:
    seen = []
    table = sensitivity(
        Net(),
        evaluate=lambda model, _: float(seen.append(1) or len(seen)),
        ratios=[0.5, 0.51, 0.1, 0.08],
        units=[FIRST],
    )
    assert table.rows == (SensitivityRow(FIRST, 16, (8, 8, 1, 1), (2.0, 2.0, 3.0, 3.0)),)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"ratios": []}, "no ratios", id="no ratios"),
        pytest.param({"ratios": [0.5, 1.5]}, r"ratio 1.5 in ratios=\[0.5, 1.5\]", id="ratio above 1"),
        pytest.param({"ratios": [0]}, "ratio 0 ", id="ratio zero"),
        pytest.param({"ratios": [True]}, "ratio True", id="ratio bool"),
        pytest.param({"mode": "mix"}, "mode='mix'. Did you mean 'min'", id="mode"),
        pytest.param({"units": "conv3*"}, r"unit 'conv3\*', which matches none", id="unit"),
        pytest.param({"importance": "taylor"}, "'taylor', which has to watch training", id="watching"),
        pytest.param({"importance": "l3"}, "importance 'l3'. Did you mean", id="importance"),
        pytest.param(
            {"monitor": "val_los"},
            "'val_los', which validation did not log. Did you mean 'val_loss'",
            id="monitor",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=match):
        measured(model, **arguments)
    assert not dynamic_ops(model)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="a Linear, which is no LightningModule; expected one, or evaluate="):
        sensitivity(nn.Linear(2, 2), loader())
    with pytest.raises(ConfigError, match="no example_input"):
        measured(LitNet())
    mutator = ChannelMutator(example_input=torch.randn(2, 3, 6, 6))
    mutator.prepare_from_supernet(Net())
    with pytest.raises(ConfigError, match="a mutator of another model, a Net"):
        measured(Net(), mutator=mutator)
    mutator.fix_channel_mutables()
    with pytest.raises(ConfigError, match="units=None, of which none can be pruned"):
        measured(mutator.model, mutator=mutator)


# The table

TABLE = SensitivityTable(
    "val_acc",
    "max",
    0.9,
    (0.75, 0.5),
    (SensitivityRow("a", 4, (3, 2), (0.8, 0.6)), SensitivityRow("b", 8, (6, 4), (0.91, 0.88))),
)


def test_a_table_prints_and_goes_through_json(tmp_path: Path) -> None:
    assert TABLE.to_dict() == {
        "monitor": "val_acc",
        "mode": "max",
        "before": 0.9,
        "ratios": [0.75, 0.5],
        "rows": [
            {"unit": "a", "num_channels": 4, "kept": [3, 2], "values": [0.8, 0.6]},
            {"unit": "b", "num_channels": 8, "kept": [6, 4], "values": [0.91, 0.88]},
        ],
    }
    TABLE.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json") == TABLE
    with pytest.raises(ConfigError, match="sensitivity table without 'rows'"):
        SensitivityTable.from_dict({"monitor": "x"})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken.json', which cannot be read"):
        SensitivityTable.load(tmp_path / "broken.json")
    text = str(TABLE)
    for part in ("val_acc with each unit pruned alone; 0.9 before", "0.75", "0.5", "0.88"):
        assert part in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(TABLE)
    assert "0.91" in console.export_text()


def test_a_plot_has_a_line_for_each_unit(tmp_path: Path) -> None:
    figure = TABLE.plot(tmp_path / "plot.png")
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0.5, 0.6], [0.75, 0.8], [1.0, 0.9]],
        [[0.5, 0.88], [0.75, 0.91], [1.0, 0.9]],
    ]
    assert [text.get_text() for text in axes.get_legend().texts] == ["a", "b"]
    assert axes.get_ylabel() == "val_acc"
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ConfigError, match=r"without matplotlib; install it with: pip install 'lightning-prune\[plots\]'"
    ):
        TABLE.plot()
