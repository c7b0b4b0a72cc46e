"""What the tests of importances that watch training share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.callback.collect import Collector
from tests.lit import LitNet

WATCHING = ["taylor", "taylor2", "hessian", "fisher", "activation", "wanda", "apoz"]


class Smooth(LitNet):
    """Without statistics of a batch: examples do not see one another."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.norm = nn.Identity()  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def spied_scores(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Return a list that gets the scores of every firing, as they come."""
    found: list[dict[str, Tensor]] = []
    scores = Collector.scores

    def spy(self: Collector, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found.append(scores(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Collector, "scores", spy)
    return found
