"""Dynamic ops: layers that run with a mutable number of channels, and export themselves as plain smaller layers."""

from __future__ import annotations

from lightning_prune.ops.activation import DynamicPReLU
from lightning_prune.ops.attention import DynamicMultiheadAttention, SlimMultiheadAttention, see_through
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.conv import (
    DynamicConv1d,
    DynamicConv2d,
    DynamicConv3d,
    DynamicConvTranspose1d,
    DynamicConvTranspose2d,
    DynamicConvTranspose3d,
)
from lightning_prune.ops.embedding import DynamicEmbedding
from lightning_prune.ops.generic import GenericDynamic
from lightning_prune.ops.linear import DynamicBilinear, DynamicLinear
from lightning_prune.ops.model import OPS, convert_, dynamic_ops, static_view, tensor_cuts, to_static_
from lightning_prune.ops.norm import (
    DynamicBatchNorm1d,
    DynamicBatchNorm2d,
    DynamicBatchNorm3d,
    DynamicGroupNorm,
    DynamicInstanceNorm1d,
    DynamicInstanceNorm2d,
    DynamicInstanceNorm3d,
    DynamicLayerNorm,
    DynamicRMSNorm,
    DynamicSyncBatchNorm,
)
from lightning_prune.ops.present import presented_integer, presented_tensor
from lightning_prune.ops.recurrent import (
    DynamicGRU,
    DynamicGRUCell,
    DynamicLSTM,
    DynamicLSTMCell,
    DynamicRNN,
    DynamicRNNCell,
)

__all__ = [
    "OPS",
    "DynamicBatchNorm1d",
    "DynamicBatchNorm2d",
    "DynamicBatchNorm3d",
    "DynamicBilinear",
    "DynamicConv1d",
    "DynamicConv2d",
    "DynamicConv3d",
    "DynamicConvTranspose1d",
    "DynamicConvTranspose2d",
    "DynamicConvTranspose3d",
    "DynamicEmbedding",
    "DynamicGRU",
    "DynamicGRUCell",
    "DynamicGroupNorm",
    "DynamicInstanceNorm1d",
    "DynamicInstanceNorm2d",
    "DynamicInstanceNorm3d",
    "DynamicLSTM",
    "DynamicLSTMCell",
    "DynamicLayerNorm",
    "DynamicLinear",
    "DynamicMultiheadAttention",
    "DynamicOp",
    "DynamicPReLU",
    "DynamicRMSNorm",
    "DynamicRNN",
    "DynamicRNNCell",
    "DynamicSyncBatchNorm",
    "GenericDynamic",
    "SlimMultiheadAttention",
    "convert_",
    "dynamic_ops",
    "presented_integer",
    "presented_tensor",
    "see_through",
    "static_view",
    "tensor_cuts",
    "to_static_",
]
