"""Recurrent layers and cells: gates are copies of the hidden channels, and the next step reads what this one made.

Torch has one `hidden_size` (and one `proj_size`) for all layers and directions of a layer, so these share their
channels: channel c of every gate, of every layer and of both directions lives and dies with hidden channel c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor, nn

from lightning_prune.graph.call import Call, is_weight
from lightning_prune.graph.labels import ANY, FIXED, Axis, is_labelled
from lightning_prune.graph.rules.table import rule

__all__ = ["Weights", "recurrent_weights", "tie_weights", "weights_of"]

T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")


@dataclass(frozen=True)
class Weights(Generic[T_co]):
    """The weights of one layer in one direction, or something of each: G gates, H hidden and P projected channels.

    Args:
        ih: `[G H, inputs]`.
        hh: `[G H, P]`.
        biases: `[G H]` each; none, or two.
        hr: `[P, H]`; None without projection, when P is H.
    """

    ih: T_co
    hh: T_co
    biases: tuple[T_co, ...]
    hr: T_co | None

    @property
    def matrices(self) -> list[T_co]:
        """The weights that have two axes."""
        return [self.ih, self.hh, *([] if self.hr is None else [self.hr])]

    def map(self, function: Callable[[T_co], U]) -> Weights[U]:
        """Return what a function gives for each weight."""
        hr = None if self.hr is None else function(self.hr)
        return Weights(function(self.ih), function(self.hh), tuple(map(function, self.biases)), hr)


def weights_of(args: Mapping[str, Any]) -> list[Weights[Tensor]]:
    """Return the weights of a call of `aten::lstm`, `gru` or `rnn_*`, layer by layer, forward before reverse."""
    groups = args["num_layers"] * (2 if args["bidirectional"] else 1)
    return _grouped(list(args["params"]), len(args["params"]) // groups, bool(args["has_biases"]))


def recurrent_weights(module: nn.RNNBase | nn.RNNCellBase) -> list[Weights[Tensor]] | None:
    """Return the weights of a layer or cell; None where some are no parameters of it: others make them."""
    layers = module._all_weights if isinstance(module, nn.RNNBase) else [["weight_ih", "weight_hh"]]
    if isinstance(module, nn.RNNCellBase) and module.bias:
        layers = [[*layers[0], "bias_ih", "bias_hh"]]
    found = [module._parameters.get(name) for names in layers for name in names]
    present = [tensor for tensor in found if tensor is not None]
    return _grouped(present, len(layers[0]), bool(module.bias)) if len(present) == len(found) else None


def _grouped(weights: Sequence[Tensor], each: int, has_biases: bool) -> list[Weights[Tensor]]:
    groups = [weights[k : k + each] for k in range(0, len(weights), each)]
    biases = 2 if has_biases else 0
    return [Weights(g[0], g[1], tuple(g[2 : 2 + biases]), g[-1] if each % 2 else None) for g in groups]


def tie_weights(
    call: Call, layers: Sequence[Weights[Sequence[Axis]]], gates: int, directions: int
) -> tuple[Axis, Axis]:
    """Bind the axes of all weights of a recurrent layer to its hidden channels, and those of its outputs.

    Args:
        call: Where to bind and freeze.
        layers: Axes of the weights, layer by layer, forward before reverse.
        gates: G.
        directions: 1 or 2.

    Returns:
        The hidden channels (H), and the output channels of one direction (P).
    """
    hidden, output = ANY, ANY
    for layer in layers:
        for axis in (layer.ih[0], layer.hh[0], *(bias[0] for bias in layer.biases)):
            for part in np.split(axis, gates) if is_labelled(axis) else [axis]:
                hidden = call.bind(hidden, part)
        if layer.hr is not None:
            hidden, output = call.bind(hidden, layer.hr[1]), call.bind(output, layer.hr[0])
    if layers[0].hr is None:
        output = hidden
    elif is_labelled(hidden):  # torch tells a projection from none by sizes that differ, and asks for H > P
        projected = len(output) if is_labelled(output) else 1
        call.freeze(hidden[: projected + 1], "more hidden channels are asked for than projected ones")
    for k, layer in enumerate(layers):
        call.bind(output, layer.hh[1])
        if k >= directions:
            call.bind(_repeated(output, directions), layer.ih[1])
    return hidden, output


def _repeated(output: Axis, directions: int) -> Axis:
    """Return the output axis of a layer: the channels of the forward direction, then those of the reverse one."""
    if is_labelled(output):
        return np.tile(output, directions)
    return output if directions == 1 else FIXED  # one channel that may not go, twice


def _axes(call: Call, weights: Weights[Tensor]) -> Weights[Sequence[Axis]]:
    """Return the axes of weights, and note which side of them is read and which is made."""
    for tensor in weights.matrices:
        made, read = call.axes(tensor)
        if is_weight(tensor):
            call.space.mark("out", made)
            call.space.mark("in", read)
        elif isinstance(read, str) and read == ANY:
            call.pin(tensor, 1)  # a sum over equal values depends on how many there are
    return weights.map(call.axes)


def _states(call: Call) -> list[Tensor]:
    """Return the initial states: hidden and, in an LSTM, cell."""
    return [call["hx"]] if isinstance(call["hx"], Tensor) else list(call["hx"])


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call) -> None:
    """Layers over a sequence: `[time, batch, I]`, `[batch, time, I]`, or packed `[entries, I]` with batch sizes."""
    packed = "data" in call
    x = call["data"] if packed else call["input"]
    states = _states(call)
    weights = weights_of(call.args)
    axes = [_axes(call, w) for w in weights]
    directions = 2 if call["bidirectional"] else 1
    hidden, output = tie_weights(call, axes, weights[0].ih.shape[0] // states[-1].shape[-1], directions)
    for layer in axes[:directions]:
        call.bind(call.axes(x)[-1], layer.ih[1])
    time = 1 if call["batch_first"] and not packed else 0
    rows = call.axes(x)[:-1]
    call.freeze(rows[time], "the steps of a sequence")
    batch = FIXED if packed else rows[1 - time]
    for state, channels in zip(states, (output, hidden), strict=False):
        index, examples, width = call.axes(state)
        call.freeze(index, "the layers of a recurrent state")
        call.bind(channels, width)
        batch = call.bind(batch, examples)
    rows = [FIXED] if packed else [batch, FIXED] if time else [FIXED, batch]
    call.put(call.outputs[0], [*rows, _repeated(output, directions)])
    for out, channels in zip(call.outputs[1:], (output, hidden), strict=False):
        call.put(out, [FIXED, batch, channels])
    sizes = call.sized(x, *range(x.dim() - 1))
    for tensor in (t for w in weights for t in w.matrices):
        call.count(*sizes, *call.sized(tensor))


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(call: Call) -> None:
    """One step: `[batch, I]` and the states `[batch, H]` give the next states."""
    x, states = call["input"], _states(call)
    biases = tuple(b for b in (call["b_ih"], call["b_hh"]) if b is not None)
    weights = Weights(call["w_ih"], call["w_hh"], biases, None)
    axes = _axes(call, weights)
    hidden, _ = tie_weights(call, [axes], weights.ih.shape[0] // states[0].shape[-1], 1)
    *rows, inputs = call.axes(x)
    call.bind(inputs, axes.ih[1])
    for state in states:
        *examples, width = call.axes(state)
        rows = [call.bind(a, b) for a, b in zip(rows, examples, strict=True)]
        hidden = call.bind(hidden, width)
    for out in call.outputs:
        call.put(out, [*rows, hidden])
    for tensor in weights.matrices:
        call.count(*call.sized(x, *range(x.dim() - 1)), *call.sized(tensor))


@rule("_pack_padded_sequence")
def pack(call: Call) -> None:
    """Padded sequences to their entries, longest first: `[time, batch, ...]` -> `[entries, ...]`."""
    axes = call.axes(call["input"])
    for axis in axes[:2]:
        call.freeze(axis, "sequences are packed")
    data, sizes = call.outputs
    call.put(data, [FIXED, *axes[2:]])
    call.put(sizes, [FIXED])


@rule("_pad_packed_sequence")
def pad(call: Call) -> None:
    """Entries back to padded sequences: every channel is padded alike."""
    axes = call.axes(call["data"])
    call.freeze(axes[0], "sequences are packed")
    padded, lengths = call.outputs
    call.put(padded, [FIXED, FIXED, *axes[1:]])
    call.put(lengths, [FIXED])


@rule("pad_sequence")
def pad_sequence(call: Call) -> None:
    """Sequences `[time, ...]` of several lengths to one tensor `[batch, time, ...]` or `[time, batch, ...]`."""
    sequences = [call.axes(t) for t in call["sequences"]]
    for steps, *_ in sequences:
        call.freeze(steps, "sequences are padded")
    rest = sequences[0][1:]
    for _, *others in sequences[1:]:
        rest = [call.bind(a, b) for a, b in zip(rest, others, strict=True)]
    call.put(call.out, [FIXED, FIXED, *rest])
