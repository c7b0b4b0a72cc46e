"""A recurrent classifier under `PruningCallback`: it shrinks while it trains, resumes, and loads small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import load_pruned
from lightning_prune.ops import dynamic_ops
from tests.lit import QUIET, pruning, trainer
from tests.test_resume import assert_same

pytestmark = QUIET
EPOCHS, WORDS, LENGTH, WIDTH, HIDDEN = 5, 11, 9, 12, 16


class Tagger(LightningModule):
    """Does a sequence hold more low words than high ones?"""

    def __init__(self, layer: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.rnn = getattr(nn, layer)(WIDTH, HIDDEN, batch_first=True, **options)
        outputs = options.get("proj_size") or HIDDEN
        self.head = nn.Linear(outputs * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(words))[0].mean(1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def words() -> TensorDataset:
    drawn = torch.randint(WORDS, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    return TensorDataset(drawn, ((drawn < WORDS // 2).sum(1) > LENGTH // 2).long())


def run(path: Path, model: Tagger, ckpt: Path | None = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    files = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    fit = trainer(pruning(**given), files, max_epochs=EPOCHS, path=path)
    fit.fit(model, DataLoader(words(), 16), ckpt_path=ckpt)
    return fit


def gates(options: dict[str, Any], inputs: int, hidden: int) -> int:
    """Return the multiply-adds of all weights of a layer for one step."""
    directions = 2 if options.get("bidirectional") else 1
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[options["layer"]] * hidden
    read = [inputs, *[directions * hidden] * (options.get("num_layers", 1) - 1)]
    return directions * sum(rows * (n + hidden) for n in read)


LAYERS = [
    pytest.param({"layer": "LSTM", "num_layers": 2, "bidirectional": True}, id="lstm"),
    pytest.param({"layer": "GRU"}, id="gru"),
    pytest.param({"layer": "RNN", "num_layers": 2}, id="rnn"),
]


@pytest.mark.parametrize("compact", ["end", "each"])
@pytest.mark.parametrize("options", LAYERS)
def test_a_run_shrinks_resumes_and_loads(options: dict[str, Any], compact: str, tmp_path: Path) -> None:
    model = Tagger(**options)
    held, dense = list(model.parameters()), sum(p.numel() for p in model.parameters())
    whole = run(tmp_path / "whole", model, compact=compact)
    assert not dynamic_ops(model)
    assert type(model.rnn) is getattr(nn, options["layer"])
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    for parameter, state in whole.optimizers[0].state.items():
        assert state["exp_avg"].shape == parameter.shape
    step = gates(options, model.rnn.input_size, model.rnn.hidden_size)
    share = (LENGTH * step + 2 * model.head.in_features) / (
        LENGTH * gates(options, WIDTH, HIDDEN) + 2 * Tagger(**options).head.in_features
    )
    assert 0.4 < share <= 0.5
    assert whole.callback_metrics["pruning/macs"].item() == pytest.approx(share)
    assert sum(p.numel() for p in model.parameters()) < dense
    for epoch in (0, 1, EPOCHS - 1):
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        assert_same(whole, run(tmp_path / f"resumed {epoch}", Tagger(**options), ckpt, compact=compact))
    loaded, example = load_pruned(ckpt, Tagger).eval(), words().tensors[0]
    assert (loaded.rnn.hidden_size, type(loaded.rnn)) == (model.rnn.hidden_size, type(model.rnn))
    assert torch.equal(loaded(example), model.eval()(example))
    assert_same(whole, run(tmp_path / "loaded", load_pruned(ckpt, Tagger), ckpt, compact=compact))
