"""The zoo: one tiny model per topology, its inputs, and the units it must give, worked out by hand.

Counting, as in the unit's name `{first output-related layer}_({start}, {end})_out_{n}_in_{m}`: a layer that makes the
channels is output-related, one that reads them is input-related, one that does both per channel (norm, depthwise,
PReLU, a raw scale) is both; a layer counts once per axis it has in the unit. Only units that can lose channels are
listed: images, tokens, classes and every axis of an output are frozen.
"""

from __future__ import annotations

from torch import nn

from tests import zoo_attention as attention
from tests import zoo_blocks as blocks
from tests import zoo_heads as heads
from tests import zoo_models as models
from tests import zoo_partial as partial
from tests import zoo_recurrent as recurrent
from tests.zoo_case import IMAGE, LARGER_IMAGE, MORE_TOKENS, TOKENS, Case

__all__ = ["ZOO", "Case"]

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
    # The chunk pairs channel i with i + 8; the two groups of the shuffle are fixed, so that what is interleaved goes
    # together: channel i of the branch with channel i of the other half. 8 in all, in stem, project and the next layer.
    "channel_shuffle": Case(
        blocks.channel_shuffle,
        {"stem.conv_(0, 16)_out_4_in_4": 8, "unit.expand.conv_(0, 10)_out_4_in_4": 10},
    ),
    # 24 = 6 x 4: the four that make one pixel stay together.
    "pixel_shuffle": Case(blocks.pixel_shuffle, {"stem.conv_(0, 8)_out_2_in_2": 8, "up_(0, 24)_out_1_in_1": 6}),
    # Each channel is four columns of the next layer.
    "pixel_unshuffle": Case(
        blocks.pixel_unshuffle, {"stem.conv_(0, 6)_out_2_in_2": 6, "down.conv_(0, 10)_out_2_in_2": 10}
    ),
    # Halves of a gate: channel i goes with i + 8, and with i + 14.
    "gated_convolution": Case(blocks.gated_convolution, {"stem_(0, 16)_out_1_in_1": 8}),
    "swiglu": Case(
        blocks.SwiGLU,
        {"embed_(0, 20)_out_2_in_2": 20, "both_(0, 28)_out_1_in_1": 14},
        shapes=TOKENS,
        larger=MORE_TOKENS,
    ),
    # The halves of `first` are bound; the shortcuts bind what both bottlenecks make to the second half. Made by first
    # and twice by `two` with their norms; read by the norms, twice by `one`, and at four places by last.
    "c2f": Case(
        blocks.c2f,
        {
            "stem.conv_(0, 8)_out_2_in_2": 8,
            "block.first.conv_(0, 12)_out_6_in_6": 6,
            "block.steps.0.one.conv_(0, 7)_out_2_in_2": 7,
            "block.steps.1.one.conv_(0, 9)_out_2_in_2": 9,
            "block.last.conv_(0, 10)_out_2_in_2": 10,
        },
    ),
    # Each channel comes four times, pooled more and more.
    "sppf": Case(
        blocks.sppf,
        {
            "stem.conv_(0, 8)_out_2_in_2": 8,
            "block.first.conv_(0, 6)_out_2_in_2": 6,
            "block.last.conv_(0, 10)_out_2_in_2": 10,
        },
    ),
    # Boxes, bins and classes are outputs; what each branch holds inside is not.
    "detect": Case(
        blocks.Detect,
        {
            "stem.conv_(0, 8)_out_2_in_4": 8,
            "down.conv_(0, 12)_out_2_in_3": 12,
            "boxes.0.0.conv_(0, 6)_out_2_in_2": 6,
            "boxes.1.0.conv_(0, 7)_out_2_in_2": 7,
            "scores.0.0.conv_(0, 9)_out_2_in_2": 9,
            "scores.1.0.conv_(0, 10)_out_2_in_2": 10,
        },
    ),
    # 48 = 2 x 3 x 8 queries: the three that share a key-value head go with it. One `head_dim` shapes q, k and v.
    **{
        name: Case(
            build,
            {
                "embed_(0, 20)_out_2_in_4": 20,
                "attn.q_(0, 48)_out_3_in_1_heads": 2,
                "attn.q_(0, 48)_out_3_in_1_head_dim": 8,
            },
            shapes=TOKENS,
            larger=MORE_TOKENS,
        )
        for name, build in (
            ("grouped_queries", heads.grouped_queries),
            ("grouped_queries_torch", heads.grouped_by_torch),
        )
    },
    # Rotation pairs the channels of queries and keys: i with i + 4, or 2 i with 2 i + 1. Values are not rotated; their
    # shape leaves the last axis open, so that they have channels of their own.
    **{
        name: Case(
            build,
            {
                "embed_(0, 20)_out_2_in_4": 20,
                "attn.q_(0, 32)_out_3_in_1_heads": 4,
                "attn.q_(0, 32)_out_3_in_1_head_dim": 4,
                "attn.v_(0, 32)_out_1_in_1_head_dim": 8,
            },
            shapes=TOKENS,
            larger=MORE_TOKENS,
        )
        for name, build in (("rotary", heads.rotary), ("rotary_complex", heads.rotary_complex))
    },
    # Raw weights, whose module is the layer: heads, the channels of q and k, and those of v. Every weight reads or
    # makes the embedding, and the last one reads heads and values.
    "einsum": Case(
        heads.einsum,
        {
            "embed_(0, 20)_out_2_in_2": 20,
            "attn_(0, 4)_out_1_in_1": 4,
            "attn_(0, 6)_out_1_in_0": 6,
            "attn_(0, 6)_out_1_in_1": 6,
        },
        shapes=TOKENS,
        larger=MORE_TOKENS,
        counted=False,
    ),
    # A column of the table of positions belongs to each head; its rows are distances.
    "windows": Case(
        heads.windows,
        {
            "embed_(0, 20)_out_2_in_2": 20,
            "attn_(0, 3)_out_2_in_2_heads": 3,
            "attn.qkv_(0, 54)_out_1_in_1_head_dim": 6,
        },
        shapes=((8, 7),),
        larger=((12, 7),),
    ),
    # 36 = 3 heads x 3 parts x 4: a head is three groups, of the image and of its neighbourhoods; all have one width.
    "multi_scale": Case(
        heads.multi_scale,
        {"stem_(0, 8)_out_2_in_2": 8, "qkv_(0, 36)_out_3_in_3_groups": 3, "qkv_(0, 36)_out_3_in_3_head_dim": 4},
    ),
    # 60 = 3 x 4 heads x 5.
    "multihead": Case(
        heads.multihead,
        {
            "embed_(0, 20)_out_2_in_2": 20,
            "attn.inner_(0, 60)_out_1_in_1_heads": 4,
            "attn.inner_(0, 60)_out_1_in_1_head_dim": 5,
        },
        shapes=TOKENS,
        larger=MORE_TOKENS,
        slim=True,
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
    # 36 = 4 x 9. The first state is zeros, as many as the number `hidden` of the module says, which follows.
    "conv_lstm": Case(recurrent.ConvLSTM, {"gates_(0, 36)_out_1_in_2": 9}),
    # A layer is one layer, whatever its weight is made of. The depthwise one normalises each filter for itself, so that
    # only those that read the stem and the depthwise one mix what they read.
    "weight_norm": Case(
        partial.weight_normed,
        {"stem.conv_(0, 8)_out_2_in_2": 8, "body_(0, 12)_out_2_in_2": 12, "up_(0, 10)_out_1_in_1": 10},
        renormalizing=True,
        pickles=False,
    ),
}
