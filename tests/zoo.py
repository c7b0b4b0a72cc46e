"""The zoo: one tiny model per topology, its inputs, and the units it must give, worked out by hand.

Counting, as in the unit's name `{first output-related layer}_({start}, {end})_out_{n}_in_{m}`: a layer that makes the
channels is output-related, one that reads them is input-related, one that does both per channel (norm, depthwise,
PReLU, a raw scale) is both; a layer counts once per axis it has in the unit. Only units that can lose channels are
listed: images, tokens, classes and every axis of an output are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests import zoo_attention as attention
from tests import zoo_models as models
from tests import zoo_partial as partial
from tests import zoo_recurrent as recurrent

IMAGE, LARGER_IMAGE = ((3, 8, 8),), ((3, 12, 10),)
TOKENS, MORE_TOKENS = ((9, 7),), ((11, 7),)  # tokens, features


@dataclass(frozen=True)
class Case:
    """A model of the zoo and what is known of it.

    Args:
        build: Makes the module; `make` seeds it.
        units: Name -> channels of every unit that can lose channels.
        shapes: Shape of each input without its batch.
        larger: The same for a second input size.
        vocabulary: Inputs are token indices below it.
        renormalizing: A unit takes part in a mean or variance over its own channels, so zeroing is not removing.
        pickles: Torch pickles the model; it refuses parametrised ones.
    """

    build: Callable[[], nn.Module]
    units: Mapping[str, int]
    shapes: tuple[tuple[int, ...], ...] = field(default=IMAGE)
    larger: tuple[tuple[int, ...], ...] = field(default=LARGER_IMAGE)
    vocabulary: int | None = None
    renormalizing: bool = False
    pickles: bool = True

    def make(self) -> nn.Module:
        """Return a new module; every call gives the same weights, whatever the global seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.build()
        return randomize_norms_(module)

    def inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2."""
        return self._inputs(2, self.shapes)

    def larger_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 3 with more pixels or tokens, where the model allows it."""
        return self._inputs(3, self.larger)

    def _inputs(self, batch: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        if self.vocabulary is not None:
            return tuple(torch.randint(self.vocabulary, (batch, *shape), generator=generator) for shape in shapes)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def randomize_norms_(module: nn.Module) -> nn.Module:
    """Give every norm a bias and statistics that are not 0 and 1: a zeroed channel must not pass for a removed one."""
    generator = torch.Generator().manual_seed(2)
    for layer in module.modules():
        if "Norm" not in type(layer).__name__:
            continue
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                low, high = (-1.0, 1.0) if name in ("bias", "running_mean") else (0.5, 1.5)
                with torch.no_grad():
                    tensor.uniform_(low, high, generator=generator)
    return module


ZOO: dict[str, Case] = {
    # Each convolution and its norm make the channels; the norm and the next layer read them.
    "chain": Case(models.chain, {"one.conv_(0, 8)_out_2_in_2": 8, "two.conv_(0, 12)_out_2_in_2": 12}),
    # No norm: the convolution makes, the next layer reads; the 1000 classes are an output.
    "two_convolutions": Case(
        models.TwoConvolutions, {"feature.0_(0, 8)_out_1_in_1": 8, "feature.1_(0, 16)_out_1_in_1": 16}
    ),
    # Its input is the image and its output is the model's.
    "lone_convolution": Case(lambda: nn.Conv2d(3, 8, 3, padding=1), {}),
    # The sum binds stem to block: made by stem, two and both norms; read by both norms, one and the head.
    "residual": Case(models.Residual, {"stem.conv_(0, 8)_out_4_in_4": 8, "one.conv_(0, 12)_out_2_in_2": 12}),
    # The stem feeds reduce and shortcut; the sum binds expand to shortcut, read by two norms and the head.
    "bottleneck": Case(
        models.Bottleneck,
        {
            "stem.conv_(0, 8)_out_2_in_3": 8,
            "reduce.conv_(0, 6)_out_2_in_2": 6,
            "middle.conv_(0, 10)_out_2_in_2": 10,
            "expand.conv_(0, 16)_out_4_in_3": 16,
        },
    ),
    # Each branch owns its span of the common norm and of fuse.
    "concat": Case(
        models.Concat,
        {"left_(0, 6)_out_2_in_2": 6, "right_(0, 10)_out_2_in_2": 10, "fuse_(0, 12)_out_1_in_1": 12},
    ),
    # Every later norm holds a span of every earlier output: stem in norm1-3, conv1, conv2, head; and so on down.
    "dense_block": Case(
        models.DenseBlock,
        {"stem_(0, 8)_out_4_in_6": 8, "conv1_(0, 4)_out_3_in_4": 4, "conv2_(0, 6)_out_2_in_2": 6},
    ),
    # `self.sizes` follows both parts, so each is a unit of its own: 6 and 10 of the stem's 16.
    "split": Case(
        models.Split,
        {
            "stem.conv_(0, 6)_out_2_in_2": 6,
            "stem.conv_(6, 16)_out_2_in_2": 10,
            "left_(0, 7)_out_1_in_1": 7,
            "right_(0, 9)_out_1_in_1": 9,
        },
    ),
    # The halves of a chunk stay equal only if channel i and channel i + 8 go together: 8 pairs, two readers.
    "chunk": Case(
        models.Chunk,
        {"stem.conv_(0, 16)_out_2_in_3": 8, "left_(0, 7)_out_1_in_1": 7, "right_(0, 9)_out_1_in_1": 9},
    ),
    # `self.cut` follows the first part; the second ends where the tensor ends.
    "slice": Case(
        models.Slice,
        {
            "stem.conv_(0, 6)_out_2_in_2": 6,
            "stem.conv_(6, 16)_out_2_in_2": 10,
            "left_(0, 7)_out_1_in_1": 7,
            "right_(0, 9)_out_1_in_1": 9,
        },
    ),
    # Nothing can rewrite the 6 in `x[:, :6]`, so the first six stay; `x[:, 6:]` holds whatever else remains.
    "slice_literal": Case(
        models.SliceLiteral,
        {"stem.conv_(6, 16)_out_2_in_2": 10, "left_(0, 7)_out_1_in_1": 7, "right_(0, 9)_out_1_in_1": 9},
    ),
    # The depthwise convolution and its norm do both, like the norm of expand.
    "depthwise": Case(models.depthwise, {"expand.conv_(0, 12)_out_4_in_4": 12, "project.conv_(0, 10)_out_2_in_2": 10}),
    # 24 = 4 groups x 6 in, 28 = 4 x 7 out. A whole group goes through every layer; the channels of a group on either
    # side are units of their own. The grouped convolution has both of its axes in the unit of groups.
    "grouped": Case(
        models.grouped,
        {
            "stem.conv_(0, 24)_out_4_in_4_groups": 4,
            "stem.conv_(0, 24)_out_2_in_2": 6,
            "grouped.conv_(0, 28)_out_2_in_2": 7,
        },
    ),
    # As a chain; the three output maps are the model's.
    "transposed": Case(
        models.transposed,
        {"down.conv_(0, 8)_out_2_in_2": 8, "up_(0, 12)_out_2_in_2": 12},
    ),
    # The second call reads what the first made, so both axes of `shared` are in the stem's unit.
    "shared_module": Case(models.SharedModule, {"stem.conv_(0, 12)_out_3_in_3": 12}),
    # One tensor is the embedding's output axis and the decoder's input axis; the vocabulary is an output.
    "tied_weights": Case(
        models.TiedWeights,
        {"embedding_(0, 12)_out_2_in_2": 12, "hidden_(0, 20)_out_1_in_1": 20},
        shapes=((6,),),
        larger=((9,),),
        vocabulary=23,
    ),
    # Each channel is 4 columns of the hidden layer.
    "flatten_linear": Case(
        models.flatten_linear,
        {"stem.conv_(0, 8)_out_2_in_2": 8, "hidden_(0, 10)_out_2_in_2": 10},
        larger=IMAGE,
    ),
    # The product binds the gate to the stem.
    "squeeze_excitation": Case(
        models.SqueezeExcitation, {"stem.conv_(0, 16)_out_3_in_3": 16, "squeeze_(0, 6)_out_1_in_1": 6}
    ),
    # The 4 groups are fixed: channel i of every group goes together, and each group is normalised over fewer.
    "group_norm": Case(
        models.group_norm,
        {"stem_(0, 24)_out_2_in_2": 6, "conv.conv_(0, 10)_out_2_in_2": 10},
        renormalizing=True,
    ),
    # The residual stream: made by embed, back and both norms, read by both norms, hidden and the head.
    "layer_norm": Case(
        models.TransformerMLP,
        {"embed_(0, 20)_out_4_in_4": 20, "hidden_(0, 28)_out_1_in_1": 28},
        shapes=TOKENS,
        larger=MORE_TOKENS,
        renormalizing=True,
    ),
    # The head reads both inputs' channels, each its span.
    "multi_input": Case(
        models.MultiInput,
        {"image.conv_(0, 8)_out_2_in_2": 8, "table_(0, 12)_out_1_in_1": 12},
        shapes=(*IMAGE, (7,)),
        larger=(*LARGER_IMAGE, (7,)),
    ),
    # `locate` is an output, so only its input side is in a unit.
    "multi_output": Case(models.MultiOutput, {"trunk.conv_(0, 8)_out_2_in_3": 8, "classify.conv_(0, 6)_out_2_in_2": 6}),
    # What never runs is in no unit and keeps its full size, its input side too.
    "unused_branch": Case(models.UnusedBranch, {"one.conv_(0, 8)_out_2_in_2": 8, "two.conv_(0, 12)_out_2_in_2": 12}),
    # In train mode the second head reads the first unit as well.
    "auxiliary_head": Case(
        models.AuxiliaryHead,
        {
            "one.conv_(0, 8)_out_2_in_3": 8,
            "two.conv_(0, 12)_out_2_in_2": 12,
            "aux.conv_(0, 6)_out_2_in_2": 6,
        },
    ),
    # 72 = 3 x 4 heads x 6: the 3 is indexed by constants, so q, k and v share heads and head_dim.
    "attention": Case(
        attention.fused_attention,
        {
            "embed_(0, 20)_out_2_in_2": 20,
            "attn.qkv_(0, 72)_out_1_in_1_heads": 4,
            "attn.qkv_(0, 72)_out_1_in_1_head_dim": 6,
        },
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # q and k share a head_dim by contraction; v joins them because all three are shaped by one `self.head_dim`.
    "separate_attention": Case(
        attention.separate_attention,
        {
            "embed_(0, 20)_out_2_in_4": 20,
            "attn.q_(0, 24)_out_3_in_1_heads": 4,
            "attn.q_(0, 24)_out_3_in_1_head_dim": 6,
        },
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # The module that owns the parameters is the layer: the kernel makes, the projection reads.
    "functional": Case(attention.functional, {"body_(0, 10)_out_1_in_1": 10}),
    # The raw scale is per channel, so its module `block` counts on both sides, with stem.norm.
    "layer_scale": Case(
        attention.LayerScale, {"stem.conv_(0, 14)_out_4_in_4": 14, "block.expand_(0, 18)_out_1_in_1": 18}
    ),
    # The op without a rule freezes the 12 channels that it touches, and only those.
    "unknown_op": Case(attention.UnknownOp, {"one.conv_(0, 8)_out_2_in_2": 8, "three.conv_(0, 10)_out_2_in_2": 10}),
    # A slope per channel counts on both sides; the single slope is in no unit.
    "prelu": Case(attention.PReLUChain, {"one_(0, 8)_out_2_in_2": 8, "two_(0, 12)_out_1_in_1": 12}),
    # Instance norm works per channel: no channel sees another.
    "sequence": Case(
        attention.sequence, {"0_(0, 8)_out_2_in_2": 8, "3_(0, 12)_out_2_in_2": 12}, shapes=((3, 16),), larger=((3, 21),)
    ),
    # As a chain, in three dimensions.
    "volume": Case(
        attention.volume,
        {"0_(0, 8)_out_2_in_2": 8, "3_(0, 12)_out_1_in_1": 12},
        shapes=((3, 4, 4, 4),),
        larger=((3, 5, 4, 6),),
    ),
    # The four gates of a layer are rows of its weights: 48 = 4 x 12. Both layers and directions share the 12; the LSTM
    # makes them, and reads them in its next step and its second layer.
    "lstm": Case(
        recurrent.LastOutput,
        {"embed_(0, 10)_out_1_in_1": 10, "lstm_(0, 48)_out_1_in_2": 12},
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # Torch wants more hidden channels (15) than projected ones (5): the first six stay. What the gates make, the
    # projection reads; what the projection makes, the next step, the second layer and the head read.
    "lstm_projections": Case(
        recurrent.Projected,
        {"embed_(0, 10)_out_1_in_1": 10, "lstm_(6, 60)_out_1_in_1": 9, "lstm_(0, 5)_out_1_in_2": 5},
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # 27 = 3 x 9. The initial state is per channel, so its module `encoder` counts on both sides.
    "gru": Case(
        recurrent.BothStates,
        {"embed_(0, 10)_out_1_in_1": 10, "encoder_(0, 9)_out_2_in_3": 9},
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # One gate.
    "rnn": Case(
        recurrent.MeanOutput,
        {"embed_(0, 10)_out_1_in_1": 10, "rnn_(0, 11)_out_1_in_2": 11},
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # Each cell reads its own state and that of the cell before: 40 = 4 x 10, 24 = 3 x 8.
    "cells": Case(
        recurrent.Cells,
        {"first_(0, 40)_out_1_in_2": 10, "second_(0, 24)_out_1_in_2": 8, "third_(0, 6)_out_1_in_2": 6},
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # A layer is one layer, whatever its weight is made of. The depthwise one normalises each filter for itself, so that
    # only those that read the stem and the depthwise one mix what they read.
    "weight_norm": Case(
        partial.weight_normed,
        {"stem.conv_(0, 8)_out_2_in_2": 8, "body_(0, 12)_out_2_in_2": 12, "up_(0, 10)_out_1_in_1": 10},
        renormalizing=True,
        pickles=False,
    ),
}
