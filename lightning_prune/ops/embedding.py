"""Embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import on_full, presented_integer, presented_tensor
from lightning_prune.ops.slicing import put_

__all__ = ["DynamicEmbedding"]


class DynamicEmbedding(DynamicOp, nn.Embedding):
    """`torch.nn.Embedding` that looks up the kept features.

    The mask of its rows (`in_channels`, the vocabulary) renumbers them: index i means the i-th row that is kept.
    """

    static_op = nn.Embedding
    aliases = {"in_channels": "num_embeddings", "out_channels": "embedding_dim"}  # noqa: RUF012 - ClassVar in the base
    weight: Any = presented_tensor("weight")
    num_embeddings: Any = presented_integer("num_embeddings")
    embedding_dim: Any = presented_integer("embedding_dim")
    padding_idx: Any = presented_integer("padding_idx")
    reset_parameters: Any = on_full("reset_parameters")

    def _describe(self) -> None:
        self._add_axis("num_embeddings", self.__dict__["num_embeddings"])
        self._add_axis("embedding_dim", self.__dict__["embedding_dim"])
        self._add_axes(weight=("num_embeddings", "embedding_dim"))

    def _integer_names(self) -> list[str]:
        return [*super()._integer_names(), "padding_idx"]

    def _live_integer(self, name: str) -> Any:
        if name != "padding_idx":
            return super()._live_integer(name)
        row, mask = self.__dict__["padding_idx"], self._dynamic.containers["num_embeddings"].current_mask
        return int(mask[:row].sum()) if row is not None and bool(mask[row]) else None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up the kept features; rows that `max_norm` shortens are written back."""
        cuts = self._dynamic.cuts(self, "weight")
        if self.max_norm is None or not cuts:
            found: Tensor = super().forward(input, *args, **kwargs)  # a subclass may take more than an input
            return found
        weight = self.weight
        output = nn.functional.embedding(
            input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        full = self._parameters["weight"]
        assert full is not None, "an embedding always has a weight"
        put_(full, weight.detach(), cuts)
        return output
