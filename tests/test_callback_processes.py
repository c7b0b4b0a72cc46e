"""Two processes prune alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.lit import QUIET
from tests.processes import two_processes

pytestmark = QUIET


SCRIPT = """
import sys
import torch
from lightning_prune import PruningCallback
from tests.lit import LitNet, loader, pruning, trainer

def score(unit):  # every rank would choose otherwise
    order = torch.arange(unit.num_channels, dtype=torch.float32)
    return order if fit.global_rank == 0 else order.flip(0) * 1.5

torch.set_num_threads(1)
torch.manual_seed(0)
model = LitNet()
callback = pruning(importance=score, compact=sys.argv[1])
fit = trainer(callback, strategy=sys.argv[2], devices=2, max_epochs=5)
fit.fit(model, loader())
kept = {name: indices.tolist() for name, indices in callback.state_dict()["kept"].items()}
torch.save({"weights": dict(model.named_parameters()), "kept": kept}, f"rank{fit.global_rank}.pt")
"""


@pytest.mark.parametrize(
    ("compact", "strategy"),
    [
        pytest.param("end", "ddp_find_unused_parameters_false", id="end"),
        pytest.param("each", "ddp", id="each"),
    ],
)
def test_two_processes_keep_the_same_structure_and_weights(compact: str, strategy: str, tmp_path: Path) -> None:
    result = two_processes(SCRIPT, tmp_path, compact, strategy)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    kept = first["kept"]["conv1_(0, 16)_out_2_in_2"]
    assert kept == list(range(len(kept)))  # the mean of both scores prefers the first channels
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert len(first["weights"]["conv1.weight"]) == len(kept) < 16


DISAGREE = """
from lightning_prune import ChannelMutator
from lightning_prune.plan import KeepPlan
from tests.lit import LitNet, loader, pruning, trainer

apply = ChannelMutator.apply

def other(self, plan):
    if fit.global_rank == 1:
        plan = KeepPlan({name: kept[1:] for name, kept in plan.kept.items()})
    apply(self, plan)

ChannelMutator.apply = other
fit = trainer(pruning(), strategy="ddp", devices=2)
try:
    fit.fit(LitNet(), loader())
finally:
    with open(f"rank{fit.global_rank}.txt", "w") as file:
        import sys
        file.write(str(sys.exc_info()[1]))
"""


def test_a_rank_with_another_structure_stops_all_ranks(tmp_path: Path) -> None:
    assert two_processes(DISAGREE, tmp_path).returncode != 0
    for rank in (0, 1):
        said = (tmp_path / f"rank{rank}.txt").read_text(encoding="utf-8")
        assert "Got different structures on rank 0 and" in said
