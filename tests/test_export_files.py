"""Files for deployment: ONNX and programs, that compute what the model does or are not there."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune import ChannelMutator, export_onnx, export_program, export_pruned
from lightning_prune.errors import ConfigError, ExportError
from tests.compare import assert_same
from tests.zoo import ZOO

WRITERS = pytest.mark.parametrize(
    ("write", "suffix"), [(export_onnx, ".onnx"), (export_program, ".pt2")], ids=["ONNX", "program"]
)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.head = nn.Conv2d(width, width, 3), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def masked(model: nn.Module, example_input) -> nn.Module:
    mutator = ChannelMutator(example_input=example_input)
    mutator.prepare_from_supernet(model)
    mutator.set_choices({unit.name: 0.5 for unit in mutator.mutable_units})
    return model.eval()


def make(seed: int = 0, width: int = 64) -> Net:
    torch.manual_seed(seed)
    return Net(width).eval()


def run_file(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    fed = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    return torch.as_tensor(session.run(None, fed)[0])


@WRITERS
def test_folders_on_the_way_are_made(write, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / f"model{suffix}"
    write(make(), IMAGES, path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@WRITERS
@pytest.mark.parametrize("batch", [1, 2], ids=["one example", "two"])
def test_a_file_computes_what_the_model_does_for_any_batch(write, suffix: str, batch: int, tmp_path: Path) -> None:
    model, path = masked(make(), IMAGES), tmp_path / f"model{suffix}"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert write(model.train(), IMAGES[:batch], path) == path
    model.eval()
    for images in (IMAGES[:1], IMAGES, torch.randn(5, 3, 8, 8)):
        torch.testing.assert_close(run_file(path, images), model(images), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@WRITERS
def test_a_file_is_no_larger_than_that_of_a_narrow_model(write, suffix: str, tmp_path: Path) -> None:
    write(masked(make(), IMAGES), IMAGES, tmp_path / f"pruned{suffix}")
    write(make(width=32), IMAGES, tmp_path / f"narrow{suffix}")
    sizes = {name: (tmp_path / f"{name}{suffix}").stat().st_size for name in ("pruned", "narrow")}
    assert sizes["pruned"] <= sizes["narrow"]


@WRITERS
@pytest.mark.parametrize("name", ["concat", "split"])
def test_topologies_go_through(write, suffix: str, name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    model, inputs = masked(case.make(), case.inputs()), case.inputs()
    write(model, inputs, tmp_path / f"model{suffix}")
    torch.testing.assert_close(run_file(tmp_path / f"model{suffix}", *inputs), model(*inputs), atol=1e-5, rtol=1e-4)


@WRITERS
def test_a_batch_may_be_fixed_and_inputs_named(write, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    write(make(), {"x": IMAGES}, path)
    write(make(), IMAGES, path, dynamic_batch=False)
    with pytest.raises(Exception, match=r"(?i)dim|shape|size"):
        run_file(path, torch.randn(5, 3, 8, 8))


class Constant(nn.Module):
    """An exporter takes what it saw for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * (1.0 if torch.compiler.is_compiling() else 2.0)


@WRITERS
def test_a_file_that_computes_something_else_is_not_written(write, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("what was there")
    with pytest.raises(ExportError, match=r"differ from the model's by \d.*in output 0; expected at most 1e-04"):
        write(Constant(), torch.randn(2, 4), path)
    assert path.read_text() == "what was there"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


class ReadsBatch(nn.Module):
    """Has the number of its examples in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * [0.0, 1.0, 2.0, 3.0][int(x.sum() > 0) + x.shape[0] - 1]


@WRITERS
def test_a_model_that_the_exporter_refuses_is_told(write, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Got ReadsBatch, which torch\..*cannot write: .*dynamic_batch=False"):
        write(ReadsBatch(), torch.randn(2, 4), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


class FixesBatch(nn.Module):
    """Has the number of its examples in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).reshape(2, 2, 2)


@WRITERS
def test_a_batch_that_the_model_fixes_is_told(write, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"dynamic_batch=False"):
        write(FixesBatch(), torch.randn(2, 4), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []
    assert write(FixesBatch(), torch.randn(2, 4), tmp_path / f"model{suffix}", dynamic_batch=False).exists()


def test_a_file_that_the_runtime_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.export.onnx.write_onnx", lambda *_, **__: Path(_[3]).write_bytes(b"no model"))
    with pytest.raises(ExportError, match="ONNX Runtime refuses"):
        export_onnx(make(), IMAGES, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("example", "message"),
    [
        pytest.param(3, "Got 3 to export with; expected a tensor with a batch", id="no tensor"),
        pytest.param({"y": IMAGES}, r"none of Net\.forward", id="no argument of that name"),
    ],
)
def test_inputs_that_are_none_are_told(example, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_program(make(), example, tmp_path / "model.pt2")


# What else users do with an exported model

EXPORTED = ["bottleneck", "grouped", "multi_output", "auxiliary_head", "grouped_queries", "multihead", "detect"]


@pytest.mark.parametrize("name", [*EXPORTED, "lstm"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # advice to use torch.export
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes that are fixed in the trace
def test_an_exported_model_can_be_scripted_by_trace(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    small, inputs = export_pruned(masked(case.make(), case.inputs())).eval(), case.inputs()
    torch.jit.trace(small, inputs, strict=False).save(tmp_path / "model.pt")  # not strict: outputs may be a dict
    assert_same(tree_leaves(torch.jit.load(tmp_path / "model.pt")(*inputs)), tree_leaves(small(*inputs)))


@pytest.mark.parametrize("name", EXPORTED)  # torch does not compile an LSTM whole
def test_an_exported_model_compiles_without_a_break(name: str) -> None:
    case = ZOO[name]
    small, inputs = export_pruned(masked(case.make(), case.inputs())).eval(), case.inputs()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = tree_leaves(compiled(*inputs)), tree_leaves(small(*inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
