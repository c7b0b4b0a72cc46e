"""Memory read in steps, on real tensors: windows over tokens leave channels, windows that reach over them do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from tests.compare import assert_same, outputs, scattered, zeroed_outputs


def prepared(model: nn.Module, *shape: int) -> tuple[nn.Module, ChannelMutator, Tensor]:
    model, x = model.double().eval(), torch.randn(shape, dtype=torch.float64)
    mutator = ChannelMutator(example_input=x)
    mutator.prepare_from_supernet(model)
    return model, mutator, x


class Windows(nn.Module):
    """Reads a value, so that it runs on real tensors; queries meet the keys of windows that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 6
        self.query, self.key, self.leave = nn.Linear(5, 24), nn.Linear(5, 24), nn.Linear(24, 2)

    def windows(self, x: Tensor) -> Tensor:
        """Return windows of four tokens out of eight, every two of them; heads lie inside the tokens."""
        x = x.view(8, len(x) * x.shape[1] // 8, self.heads, self.head_dim)
        x = x.transpose(0, 1).transpose(1, 2).reshape(-1, 8, self.head_dim)
        heads, tokens, entries = x.stride()
        return x.as_strided((len(x), 3, 4, x.shape[2]), (heads, 2 * tokens, tokens, entries))

    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all().item()
        q, k = self.windows(self.query(x)), self.windows(self.key(x))
        y = ((q @ k.mT).softmax(-1) @ k).mean(1).view(x.shape[1], self.heads, 4, self.head_dim)
        z: Tensor = self.leave(y.transpose(1, 2).reshape(x.shape[1], 4, self.heads * self.head_dim))
        return z


def test_windows_over_tokens_leave_heads_and_their_channels() -> None:
    model, mutator, x = prepared(Windows(), 8, 3, 5)
    assert sorted((u.axis, u.num_channels) for u in mutator.units) == [("head_dim", 6), ("heads", 4)]
    mutator.apply(scattered(mutator.units))
    torch.testing.assert_close(outputs(model, (x,)), zeroed_outputs(model, (x,)), rtol=1e-12, atol=1e-12)
    assert_same(outputs(model, (x,)), outputs(export_pruned(model), (x,)))


class Tokens(nn.Module):
    """Reads tokens of six channels in steps, as it is told."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        self.enter, self.size, self.stride = nn.Linear(5, 6), size, stride

    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all().item()
        return self.enter(x).as_strided(self.size, self.stride).sum((1, 2))


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        pytest.param((7, 3, 6), (18, 6, 2), id="every second channel"),
        pytest.param((8, 2, 7), (18, 6, 1), id="into the next token"),
        pytest.param((8, 3, 5), (18, 6, 1), id="a part of the channels"),
        pytest.param((8, 2, 6), (18, 7, 1), id="along tokens and channels"),
    ],
)
def test_what_reaches_over_channels_keeps_them(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    _, mutator, _ = prepared(Tokens(size, stride), 8, 3, 5)
    assert mutator.units == []
    assert any("read in steps of memory" in reason for *_, reason in mutator.report().frozen)
