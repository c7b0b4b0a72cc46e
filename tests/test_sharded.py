"""Strategies that shard parameters: one-shot pruning in `setup` works, everything else says what does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_prune import PruningCallback, load_pruned
from lightning_prune.callback.sharded import check_one_shot
from lightning_prune.errors import CheckpointError, ConfigError
from tests.lit import QUIET, LitNet, loader, pruning, trainer
from tests.processes import two_processes

pytestmark = QUIET

ONE_SHOT: dict[str, Any] = {"schedule": "one_shot"}


class ShardedNet(LitNet):
    """Shards itself where Lightning asks for it, like a model that is too large for one device."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in (self.conv1, self.conv2, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


SCRIPT = """
import sys
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from tests.lit import loader, pruning, trainer
from tests.test_sharded import ONE_SHOT, ShardedNet

torch.set_num_threads(1)
torch.manual_seed(0)
callback = pruning(**ONE_SHOT)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
fit = trainer(callback, strategy=strategy, devices=2, max_epochs=3)
model = ShardedNet()
fit.fit(model, loader())
fit.save_checkpoint("sharded.ckpt")
kept = {name: indices.tolist() for name, indices in callback.state_dict()["kept"].items()}
whole = {name: weight.full_tensor() for name, weight in model.named_parameters()}
moments = [fit.optimizers[0].state[p]["exp_avg"].shape == p.shape for p in model.parameters()]
torch.save({"kept": kept, "weights": whole, "local": model.conv1.weight.to_local().shape[0], "moments": all(moments),
            "macs": fit.callback_metrics["pruning/macs"].item()}, f"rank{fit.global_rank}.pt")
"""


def test_one_shot_prunes_before_two_processes_shard(tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    assert first["macs"] <= 0.5
    assert first["moments"]
    width = len(first["kept"]["conv1_(0, 16)_out_2_in_2"])
    assert first["weights"]["conv1.weight"].shape[0] == width < 16
    assert first["local"] + second["local"] == width
    small = load_pruned(tmp_path / "sharded.ckpt", LitNet())
    for name, weight in small.named_parameters():
        assert torch.equal(weight, first["weights"][name])
        assert torch.equal(weight, second["weights"][name])


RESUME = """
import sys
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_prune.errors import CheckpointError
from tests.lit import loader, pruning, trainer
from tests.test_sharded import ONE_SHOT, ShardedNet

torch.set_num_threads(1)


def fit(epochs, ckpt=None, save=None, seed=0, is_weak=False):
    torch.manual_seed(seed)
    model = ShardedNet()
    if is_weak:  # the first unit keeps 6 channels, not 16
        for tensor in (model.norm.weight.data, model.conv1.weight.data, model.conv2.weight.data.transpose(0, 1)):
            tensor[6:] *= 1e-6
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=save == "folder.ckpt")
    run = trainer(pruning({"channels": 0.6}, **ONE_SHOT), strategy=strategy, devices=2, max_epochs=epochs)
    try:
        run.fit(model, loader(), ckpt_path=ckpt)
    except CheckpointError as error:
        return str(error)
    if save:
        run.save_checkpoint(save)
    return {name: weight.full_tensor() for name, weight in model.named_parameters()}, run.global_rank


whole, rank = fit(3)
for path in ("folder.ckpt", "file.ckpt"):
    fit(2, save=path)
found = {path: fit(3, path)[0] for path in ("folder.ckpt", "file.ckpt")}
refused = [fit(3, path, **other) for path in found for other in ({"seed": 1}, {"is_weak": True})]
torch.save({"whole": whole, "found": found, "refused": refused}, f"rank{rank}.pt")
"""


def test_a_sharded_run_resumes_where_it_finds_its_structure_again(tmp_path: Path) -> None:
    result = two_processes(RESUME, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    for rank in (0, 1):
        end = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for weights in end["found"].values():
            assert all(torch.equal(weights[name], weight) for name, weight in end["whole"].items())
        assert all("of another structure than the one that was found" in words for words in end["refused"])
        files = [words.split(",")[0].split()[-1] for words in end["refused"]]
        assert files == ["folder.ckpt", "folder.ckpt", "file.ckpt", "file.ckpt"]
    whole = consolidated(tmp_path / "folder.ckpt")
    assert load_pruned(whole, LitNet()).conv2.out_channels == end["whole"]["conv2.weight"].shape[0] == 12


def consolidated(path: Path) -> Path:
    """Do what the error of `load_pruned` says."""
    with pytest.raises(CheckpointError, match="a folder, the distributed checkpoint of a strategy") as caught:
        load_pruned(path, LitNet())
    with pytest.raises(CheckpointError, match="a folder, the distributed checkpoint of a strategy"):
        trainer(pruning()).fit(LitNet(), loader(), ckpt_path=path)
    command = str(caught.value).split("`")[1].split()
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    return path.with_suffix(".ckpt.consolidated")


def test_a_folder_that_is_no_checkpoint_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: it is a folder; expected a file"):
        load_pruned(tmp_path, LitNet())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({}, "fires 2 times from epoch 1 on", id="a schedule"),
        pytest.param({"schedule": {"kind": "one_shot", "begin": 2}}, "fires 1 times from epoch 2 on", id="later"),
        pytest.param({**ONE_SHOT, "importance": "taylor"}, "watches training batches", id="taylor"),
        pytest.param({**ONE_SHOT, "target": {"latency": 0.5}}, "a latency, which is measured", id="latency"),
        pytest.param({**ONE_SHOT, "compact": "never"}, "compact='never'", id="never compact"),
    ],
)
@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_everything_else_is_refused_with_the_way_out(strategy: type, arguments: dict[str, Any], match: str) -> None:
    callback = pruning(**arguments)
    stub: Any = SimpleNamespace(strategy=strategy())
    with pytest.raises(ConfigError, match=rf"{strategy.__name__} with .*{match}.*schedule='one_shot'.*load_pruned"):
        check_one_shot(stub, callback.schedule.resolve(10), callback.compact, callback._collector, callback._timing)


def test_the_callback_asks_for_it_in_setup() -> None:
    class Unsharded(Callback):
        """Takes the place of what shards, so that one process is enough."""

    run = trainer(pruning(), Unsharded())
    run.strategy.__class__ = type("SingleFSDP", (type(run.strategy), FSDPStrategy), {})
    with pytest.raises(ConfigError, match="SingleFSDP with a schedule that fires"):
        run.callbacks[0].setup(run, LitNet(), "fit")  # type: ignore[attr-defined]


# Where there are GPUs

GPU_SCRIPT = """
import sys
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from tests.lit import loader, pruning, trainer
from tests.test_sharded import ONE_SHOT, LitNet, ShardedNet

name = sys.argv[1]
strategies = {"ddp": "ddp", "fsdp": FSDPStrategy(state_dict_type="full"),
              "model_parallel": ModelParallelStrategy(2, 1, False)}
torch.manual_seed(0)
callback = pruning(**(ONE_SHOT if name != "ddp" else {}))
fit = trainer(callback, strategy=strategies[name], accelerator="gpu", devices=2, max_epochs=5)
model = ShardedNet() if name == "model_parallel" else LitNet()
fit.fit(model, loader())
fit.save_checkpoint(f"{name}.ckpt")
assert fit.callback_metrics["pruning/macs"] <= 0.5
"""


@pytest.mark.gpu(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "model_parallel"])
def test_two_gpus(strategy: str, tmp_path: Path) -> None:
    result = two_processes(GPU_SCRIPT, tmp_path, strategy)
    assert result.returncode == 0, result.stderr[-4000:]
    assert load_pruned(tmp_path / f"{strategy}.ckpt", LitNet()).conv1.out_channels < 16


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_one_gpu(precision: Any, tmp_path: Path) -> None:
    callback: PruningCallback = pruning(importance="taylor")
    run = trainer(callback, accelerator="gpu", devices=1, max_epochs=5, precision=precision)
    run.fit(LitNet(), loader())
    run.save_checkpoint(tmp_path / "gpu.ckpt")
    assert run.callback_metrics["pruning/macs"] <= 0.5
    assert load_pruned(tmp_path / "gpu.ckpt", LitNet).conv1.out_channels < 16
