"""Topologies of the zoo with recurrent layers and cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo_models import CLASSES

FEATURES, DIM = 7, 10


class LastOutput(nn.Module):
    """Two layers in both directions; the head reads the output of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, DIM)
        self.lstm = nn.LSTM(DIM, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * 12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0][:, -1])


class Projected(nn.Module):
    """Steps first; the state that a layer hands on is a projection of its hidden channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, DIM)
        self.lstm = nn.LSTM(DIM, 15, num_layers=2, proj_size=5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.embed(x).transpose(0, 1))
        return self.head(state[-1])


class LearnedStart(nn.Module):
    """A recurrent layer whose initial state is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 1, 9))
        self.gru = nn.GRU(DIM, 9, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        _, states = self.gru(x, self.start.expand(-1, len(x), -1).contiguous())
        return states.transpose(0, 1).flatten(1)


class BothStates(nn.Module):
    """The head reads the last states of both directions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, DIM)
        self.encoder = LearnedStart()
        self.head = nn.Linear(2 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))


class MeanOutput(nn.Module):
    """A plain recurrent layer without biases, averaged over its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, DIM)
        self.rnn = nn.RNN(DIM, 11, num_layers=2, nonlinearity="relu", bias=False, batch_first=True)
        self.head = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


class Cells(nn.Module):
    """Three cells in a loop of Python, each reading the state of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(FEATURES, 10)
        self.second = nn.GRUCell(10, 8)
        self.third = nn.RNNCell(8, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        one = two = three = None
        for step in x.unbind(1):
            one = self.first(step, one)
            two = self.second(one[0], two)
            three = self.third(two, three)
        return self.head(three)


class ConvLSTM(nn.Module):
    """A convolution over the input beside the state, which is zeros at first: arXiv:1506.04214."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 9
        self.gates = nn.Conv2d(3 + self.hidden, 4 * self.hidden, 3, padding=1)
        self.head = nn.Linear(self.hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden, *x.shape[2:])
        cell = torch.zeros_like(state)
        for _ in range(3):
            i, f, o, g = self.gates(torch.cat([x, state], 1)).split(self.hidden, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        return self.head(state.mean((2, 3)))
