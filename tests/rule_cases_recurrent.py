"""Calls that cover the rule table, continued: recurrent layers and cells, and packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.rule_cases import A, RuleCase, case

product = partial(case, product=True)
STEPS, BATCH, INPUTS, HIDDEN, PROJECTED = 5, 3, 6, 7, 3
LENGTHS = torch.tensor([STEPS, 4, 2])  # of the sequences of a batch
BATCH_SIZES = torch.tensor([3, 3, 2, 2, 1])


def layers(gates: int, *, num_layers: int = 1, directions: int = 1, biases: bool = True, projected: int = 0) -> Any:
    """Return the shapes of the weights of a recurrent layer, in the order in which torch takes them."""
    width = projected or HIDDEN
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        for _ in range(directions):
            inputs = INPUTS if layer == 0 else directions * width
            shapes += [(gates * HIDDEN, inputs), (gates * HIDDEN, width), *[(gates * HIDDEN,)] * (2 * biases)]
            shapes += [(width, HIDDEN)] if projected else []
    return shapes


def run(name: str, states: int, *given: Any) -> Callable[..., Any]:
    """Return a call of a layer: input, states, weights; then what else it takes."""

    def call(x: Tensor, *more: Tensor) -> Any:
        hx = list(more[:states]) if name == "lstm" else more[0]
        return getattr(A, name)(x, hx, list(more[states:]), *given)

    return call


def run_packed(name: str, states: int, *given: Any) -> Callable[..., Any]:
    def call(x: Tensor, *more: Tensor) -> Any:
        hx = list(more[:states]) if name == "lstm" else more[0]
        return getattr(A, name)(x, BATCH_SIZES, hx, list(more[states:]), *given)

    return call


def state(copies: int, width: int = HIDDEN) -> tuple[int, ...]:
    return (copies, BATCH, width)


X = (STEPS, BATCH, INPUTS)
# has_biases, num_layers, dropout, train, bidirectional, batch_first
ONE, BOTH_TWICE = (True, 1, 0.0, False, False), (True, 2, 0.0, False, True)
CELL = [(BATCH, HIDDEN)]


def of_cell(gates: int) -> list[tuple[int, ...]]:
    return [(gates * HIDDEN, INPUTS), (gates * HIDDEN, HIDDEN), (gates * HIDDEN,), (gates * HIDDEN,)]


RECURRENT: dict[str, RuleCase] = {
    "lstm": product(run("lstm", 2, *ONE, False), X, state(1), state(1), *layers(4), frozen="0.0"),
    "lstm, two layers in both directions": product(
        run("lstm", 2, *BOTH_TWICE, False),
        X,
        state(4),
        state(4),
        *layers(4, num_layers=2, directions=2),
        frozen="0.0 1.0 2.0",
    ),
    "lstm, projected": product(
        run("lstm", 2, *BOTH_TWICE, False),
        X,
        state(4, PROJECTED),
        state(4),
        *layers(4, num_layers=2, directions=2, projected=PROJECTED),
        frozen="0.0 1.0 2.0",
    ),
    "lstm, projected, no biases": product(
        run("lstm", 2, False, *ONE[1:], False),
        X,
        state(1, PROJECTED),
        state(1),
        *layers(4, biases=False, projected=PROJECTED),
        frozen="0.0",
    ),
    "lstm, batch first": product(
        run("lstm", 2, *ONE, True), (BATCH, STEPS, INPUTS), state(1), state(1), *layers(4), frozen="0.1"
    ),
    "lstm, packed": product(
        run_packed("lstm", 2, *BOTH_TWICE),
        (sum(BATCH_SIZES.tolist()), INPUTS),
        state(4),
        state(4),
        *layers(4, num_layers=2, directions=2),
        frozen="0.0 1.0 1.1 2.0 2.1",
    ),
    "gru": product(
        run("gru", 1, *BOTH_TWICE, False), X, state(4), *layers(3, num_layers=2, directions=2), frozen="0.0 1.0"
    ),
    "gru, no biases": product(
        run("gru", 1, False, *ONE[1:], False), X, state(1), *layers(3, biases=False), frozen="0.0"
    ),
    "gru, packed": product(
        run_packed("gru", 1, *ONE), (sum(BATCH_SIZES.tolist()), INPUTS), state(1), *layers(3), frozen="0.0 1.1"
    ),
    "rnn_tanh": product(run("rnn_tanh", 1, *ONE, False), X, state(1), *layers(1), frozen="0.0"),
    "rnn_relu": product(
        run("rnn_relu", 1, *BOTH_TWICE, False), X, state(4), *layers(1, num_layers=2, directions=2), frozen="0.0 1.0"
    ),
    "lstm_cell": product(lambda x, h, c, *w: A.lstm_cell(x, [h, c], *w), (BATCH, INPUTS), *CELL * 2, *of_cell(4)),
    "lstm_cell, no biases": product(
        lambda x, h, c, *w: A.lstm_cell(x, [h, c], *w), (BATCH, INPUTS), *CELL * 2, *of_cell(4)[:2]
    ),
    "gru_cell": product(A.gru_cell, (BATCH, INPUTS), *CELL, *of_cell(3)),
    "rnn_tanh_cell": product(A.rnn_tanh_cell, (BATCH, INPUTS), *CELL, *of_cell(1)),
    "rnn_relu_cell": product(A.rnn_relu_cell, (BATCH, INPUTS), *CELL, *of_cell(1)[:2]),
    "_pack_padded_sequence": case(lambda x: A._pack_padded_sequence(x, LENGTHS, False)[0], X, frozen="0.0 0.1"),
    "_pad_packed_sequence": case(
        lambda x: A._pad_packed_sequence(x, BATCH_SIZES, True, 0.5, STEPS)[0],
        (sum(BATCH_SIZES.tolist()), INPUTS),
        frozen="0.0",
    ),
    "pad_sequence": case(lambda *x: A.pad_sequence(list(x), True, 0.5), (5, 6), (3, 6), (4, 6), frozen="0.0 1.0 2.0"),
}
