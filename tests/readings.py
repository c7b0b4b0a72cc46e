"""Models that read their input step by step, in the ways in which recurrent layers are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

BATCH, STEPS, FEATURES, HIDDEN = 3, 9, 7, 12
LSTM, GRU, PAIR = {"rnn_(0, 48)_out_1_in_2": 12}, {"rnn_(0, 36)_out_1_in_2": 12}, {"num_layers": 2}


ONE_LAYER = (1, 0.0, False, False, True)  # number, dropout, train, both directions, batch first
EMBED = {"embed_(0, 10)_out_1_in_1": 10}


class Model(nn.Module):
    """A function, given the module for what it keeps."""

    def __init__(self, function: Callable[..., Any], keeps: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.hidden = function, HIDDEN
        for name, value in keeps.items():
            setattr(self, name, value() if callable(value) and not isinstance(value, nn.Module) else value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Reading(NamedTuple):
    function: Callable[..., Any]
    units: dict[str, int]
    keeps: dict[str, Any]

    def make(self) -> nn.Module:
        return Model(self.function, self.keeps).double()


def reading(function: Callable[..., Any], units: dict[str, int], read: int = HIDDEN, **keeps: Any) -> Reading:
    return Reading(function, units, {**keeps, "head": lambda: nn.Linear(read, 5)})


def both_ways(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.LSTM(FEATURES, HIDDEN, bidirectional=True, batch_first=True, **options)


def gru(inputs: int = FEATURES, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.GRU(inputs, HIDDEN, batch_first=True, **options)


def linear(a: int, b: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b)


def zeros(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(2, len(x), self.hidden, dtype=x.dtype) for _ in "hc")  # type: ignore[return-value]


def packed(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    sequences = pack_padded_sequence(self.embed(x), torch.tensor([9, 4, 6]), batch_first=True, enforce_sorted=False)
    output, (state, _) = self.rnn(sequences)
    padded, _ = pad_packed_sequence(output, batch_first=True)
    return self.head(padded), self.head(torch.cat([state[-2], state[-1]], -1))


def attended(self: Any, x: Tensor) -> Tensor:
    output = self.rnn(x)[0]
    return self.head((self.score(output).softmax(1) * output).sum(1))


READINGS = {
    # the two directions of the outputs
    "directions added by slices": reading(
        lambda self, x: self.head((lambda o: o[..., : self.hidden] + o[..., self.hidden :])(self.rnn(x)[0])),
        LSTM, rnn=both_ways(),
    ),
    "directions added by the size of the layer": reading(
        lambda self, x: self.head((lambda o, n: o[..., :n] + o[..., n:])(self.rnn(x)[0], self.rnn.hidden_size)),
        LSTM, rnn=both_ways(),
    ),
    "directions viewed apart": reading(
        lambda self, x: self.head(self.rnn(x)[0].reshape(BATCH, STEPS, 2, -1).sum(2)), LSTM, rnn=both_ways()
    ),
    "directions chunked": reading(
        lambda self, x: self.head(torch.mul(*self.rnn(x)[0].chunk(2, -1))), LSTM, rnn=both_ways()
    ),
    "directions normalised together": reading(
        lambda self, x: self.head(self.norm(self.rnn(x)[0])),
        {"rnn_(0, 48)_out_2_in_3": 12}, 2 * HIDDEN, rnn=both_ways(), norm=lambda: nn.LayerNorm(2 * HIDDEN),
    ),
    "attention over the steps": reading(
        attended, {"rnn_(0, 48)_out_1_in_3": 12}, 2 * HIDDEN, rnn=both_ways(), score=linear(2 * HIDDEN, 1)
    ),
    # the last states
    "states viewed apart": reading(
        lambda self, x: self.head(
            self.rnn(x)[1][0].view(2, 2, BATCH, self.rnn.hidden_size)[-1].transpose(0, 1).reshape(BATCH, -1)
        ),
        LSTM, 2 * HIDDEN, rnn=both_ways(**PAIR),
    ),
    "states of all layers": reading(
        lambda self, x: self.head(self.rnn(x)[1][0].transpose(0, 1).flatten(1)),
        LSTM, 4 * HIDDEN, rnn=both_ways(**PAIR),
    ),
    "hidden and cell state": reading(
        lambda self, x: self.head(torch.cat([state[-1] for state in self.rnn(x)[1]], -1)),
        LSTM, 2 * HIDDEN, rnn=both_ways(),
    ),
    # the first states
    "zeros of the parent's size": reading(
        lambda self, x: self.head(self.rnn(x, zeros(self, x))[0][:, -1]), LSTM, 2 * HIDDEN, rnn=both_ways()
    ),
    "ones": reading(
        lambda self, x: self.head(self.rnn(x, x.new_ones(1, BATCH, self.rnn.hidden_size))[0]), GRU, rnn=gru()
    ),
    "made by a layer": reading(
        lambda self, x: self.head(self.rnn(x, self.start(x.mean(1))[None])[0]),
        {"start_(0, 12)_out_2_in_2": 12}, start=linear(FEATURES, HIDDEN), rnn=gru(),
    ),
    "of a decoder": reading(
        lambda self, x: self.head(self.decoder(self.embed(x), self.encoder(x)[1])[0]),
        {"encoder_(0, 36)_out_2_in_3": 12, **EMBED}, encoder=gru(**PAIR), embed=linear(FEATURES, 10),
        decoder=gru(10, **PAIR),
    ),
    # several layers
    "residual": reading(
        lambda self, x: self.head((lambda y: y + self.two(y)[0])(self.one(x)[0])),
        {"one_(0, 36)_out_2_in_3": 12}, one=gru(), two=gru(HIDDEN),
    ),
    "one layer twice": reading(
        lambda self, x: self.head(self.rnn(self.rnn(self.embed(x))[0])[0]),
        {"embed_(0, 12)_out_2_in_2": 12}, embed=linear(FEATURES, HIDDEN), rnn=gru(HIDDEN),
    ),
    "after a convolution": reading(
        lambda self, x: self.head(self.rnn(F.relu(self.stem(x[:, None])).permute(0, 3, 1, 2).flatten(2))[0][:, -1]),
        {"stem_(0, 6)_out_1_in_1": 6, **GRU}, stem=lambda: nn.Conv2d(1, 6, 3, padding=1), rnn=gru(6 * STEPS),
    ),
    # sequences
    "packed": reading(
        packed, {**EMBED, **LSTM}, 2 * HIDDEN, embed=linear(FEATURES, 10),
        rnn=lambda: nn.LSTM(10, HIDDEN, 2, bidirectional=True),
    ),
    "packed from a list": reading(
        lambda self, x: self.head(self.rnn(pack_sequence([self.embed(x[0]), self.embed(x[1, :4])]))[1][-1]),
        {**EMBED, **GRU}, embed=linear(FEATURES, 10), rnn=gru(10),
    ),
    "without a batch": reading(
        lambda self, x: self.head(self.rnn(self.embed(x[0]))[0]), {**EMBED, **GRU}, embed=linear(FEATURES, 10),
        rnn=gru(10),
    ),
    # around the layer
    "flattened each time": reading(
        lambda self, x: (self.rnn.flatten_parameters(), self.head(self.rnn(x)[0]))[1], GRU, rnn=gru()
    ),
    "called with its weights": reading(
        lambda self, x: self.head(
            torch.gru(x, x.new_zeros(1, BATCH, self.hidden), self.rnn.all_weights[0], True, *ONE_LAYER)[0]
        ),
        GRU, rnn=gru(),
    ),
    "raw parameters": reading(
        lambda self, x: self.head(
            torch.gru(x, x.new_zeros(1, BATCH, self.hidden), [self.a, self.b], False, *ONE_LAYER)[0]
        ),
        {"a_(0, 36)_out_1_in_2": 12},
        a=lambda: nn.Parameter(torch.randn(36, FEATURES)), b=lambda: nn.Parameter(torch.randn(36, HIDDEN) / 4),
    ),
    # nothing may go
    "outputs of the model": reading(
        lambda self, x: self.rnn(self.embed(x))[0], EMBED, embed=linear(FEATURES, 10), rnn=gru(10)
    ),
    "never called": reading(
        lambda self, x: self.head(self.embed(x)), EMBED, 10, embed=linear(FEATURES, 10), rnn=gru()
    ),
    "one weight read by itself": reading(
        lambda self, x: self.head(F.linear(x, self.rnn.weight_ih_l0)), {}, 3 * HIDDEN, rnn=gru()
    ),
}  # fmt: skip
