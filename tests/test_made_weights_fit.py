"""Layers whose weight is made of other parameters, while `Trainer.fit` prunes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_prune import load_pruned
from lightning_prune.ops import dynamic_ops
from tests.compare import assert_same
from tests.lit import QUIET, LitNet, data, loader, pruning, trainer
from tests.test_resume import assert_same as assert_same_run
from tests.test_resume import run

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Found keys that are not in the model state dict.*"),
]

FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm, hook": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "masks": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


class Made(LitNet):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv2 = FORMS[form](self.conv2)


@pytest.mark.parametrize("compact", ["end", "each"])
@pytest.mark.parametrize("form", FORMS)
def test_made_weights_are_pruned_while_they_train(form: str, compact: str, tmp_path: Path) -> None:
    module = Made(form)
    fit = trainer(pruning(compact=compact))
    fit.fit(module, loader())
    assert not dynamic_ops(module)
    assert type(module.conv2).__mro__[1:] == type(Made(form).conv2).__mro__[1:]
    inputs, outputs = module.conv1.out_channels, module.head.in_features
    assert inputs * outputs < 16 * 32
    assert (module.conv2.in_channels, module.conv2.out_channels) == (inputs, outputs)
    fit.save_checkpoint(tmp_path / "made.ckpt")
    small = load_pruned(tmp_path / "made.ckpt", Made)
    images = data().tensors[0]
    with torch.no_grad():
        assert_same([small.eval()(images)], [module.eval()(images)])


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_ends_where_the_whole_one_does(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", model=Made(form))
    again = run(tmp_path / "again", model=Made(form), ckpt=tmp_path / "whole" / "epoch=1.ckpt")
    assert_same_run(whole, again)
