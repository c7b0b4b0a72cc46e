"""Attention in its many spellings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_blocks.block import IMAGE, TOKENS, WIDTHS, Block, Pick, Shape, block, divisors, literal


def rotate_half(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


@block
class Attention(Block):
    """Separate or fused projections, shared key-value heads, and every way to say how many heads there are.

    Args:
        shape: Of the tokens.
        heads: H, of the queries.
        head_dim: D.
        shared: Query heads for each key-value head; more than 1 only with separate projections.
        projection: "separate", or how a fused one is taken apart.
        sizes: How the module knows H and D.
        product: How scores are made, and where their scale comes from.
        extra: What else is done to queries and keys, scores or values.
        residual: Add the tokens to the result.
    """

    family = "attention"
    takes = (TOKENS,)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        width, heads = shapes[0][1], pick(2, 4, 3)
        projection = pick("separate", "reshape", "unbind", "chunk", "thirds", "by head")
        return {
            "heads": heads,
            "head_dim": pick(4, 6, 5, 3, *((width // heads,) if width % heads == 0 and width > heads else ())),
            "shared": pick(1, *divisors(heads), heads) if projection == "separate" else 1,
            "projection": projection,
            "sizes": pick("attributes", "heads", "head_dim", "tuple", "width", "config", "quotient"),
            "product": pick("matmul", "sdpa", "sdpa scale", "baddbmm", "einsum"),
            "extra": pick("nothing", "relative table", "gamma", "mask", "unit length", "rotary"),
            "residual": pick(True, False),
        }

    def __init__(
        self,
        shape: Shape,
        heads: int,
        head_dim: int,
        shared: int,
        projection: str,
        sizes: str,
        product: str,
        extra: str,
        residual: bool,
    ) -> None:
        super().__init__()
        tokens, width = shape
        self.projection, self.sizes, self.product, self.residual = projection, sizes, product, residual
        self.shared, self.scale = literal(shared), head_dim**-0.5
        self.keep_sizes(heads, head_dim)
        if projection == "separate":
            self.q = nn.Linear(width, heads * head_dim)
            self.k, self.v = (nn.Linear(width, heads // shared * head_dim) for _ in "kv")
        else:
            self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)
        self.extra = "nothing" if extra == "rotary" and head_dim % 2 else extra
        if self.extra == "relative table":
            place = torch.arange(tokens)
            self.register_buffer("index", (place[:, None] - place + tokens - 1).flatten())
            self.table = nn.Parameter(torch.randn(2 * tokens - 1, heads))
        if self.extra == "gamma":
            self.gamma = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        if self.extra == "rotary":
            angle = torch.outer(torch.arange(tokens), 0.5 ** torch.arange(head_dim // 2)).repeat(1, 2)
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

    def keep_sizes(self, heads: int, head_dim: int) -> None:
        match self.sizes:
            case "attributes":
                self.num_heads, self.kv_heads, self.head_dim = heads, heads // self.shared(), head_dim
            case "heads" | "quotient":
                self.num_heads, self.kv_heads = heads, heads // self.shared()
            case "head_dim":
                self.head_dim = head_dim
            case "tuple":
                self.grid_size = (heads, head_dim)
            case "width":
                self.inner, self.num_heads = heads * head_dim, heads
            case "config":
                self.config = {"heads": heads, "head_dim": head_dim}

    def grid(self, x: Tensor, is_query: bool) -> tuple[int, int]:
        """Return how the last axis is viewed: heads and their size, one of them may be -1."""
        match self.sizes:
            case "attributes":
                return (self.num_heads if is_query else self.kv_heads), self.head_dim
            case "heads":
                return (self.num_heads if is_query else self.kv_heads), -1
            case "quotient":
                heads = self.num_heads if is_query else self.kv_heads
                return heads, x.shape[-1] // heads // (1 if self.projection in ("separate", "chunk", "thirds") else 3)
            case "head_dim":
                return -1, self.head_dim
            case "tuple":
                return (self.grid_size[0] if is_query else -1), self.grid_size[1]
            case "width":
                return -1, self.inner // self.num_heads
        return -1, self.config["head_dim"]

    def heads_of(self, x: Tensor, is_query: bool = True) -> Tensor:
        return x.unflatten(-1, self.grid(x, is_query)).transpose(1, 2)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v as `[B, H, N, D]`."""
        if self.projection == "separate":
            return self.heads_of(self.q(x)), self.heads_of(self.k(x), False), self.heads_of(self.v(x), False)
        fused = self.qkv(x)
        heads, head_dim = self.grid(fused, True)
        match self.projection:
            case "reshape":
                qkv = fused.reshape(*fused.shape[:2], 3, heads, head_dim).permute(2, 0, 3, 1, 4)
                return qkv[0], qkv[1], qkv[2]
            case "unbind":
                return fused.unflatten(-1, (3, heads, head_dim)).transpose(1, 3).unbind(2)
            case "chunk":
                return tuple(self.heads_of(part) for part in fused.chunk(3, -1))
            case "thirds":
                return tuple(self.heads_of(part) for part in fused.split(fused.shape[-1] // 3, -1))
        width = head_dim if head_dim < 0 else 3 * head_dim
        return fused.unflatten(-1, (heads, width)).transpose(1, 2).chunk(3, -1)

    def prepared(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.parts(x)
        if self.extra == "unit length":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.extra == "rotary":
            q, k = (y * self.cos + rotate_half(y) * self.sin for y in (q, k))
        if self.shared() > 1:
            k, v = (y.repeat_interleave(self.shared(), 1) for y in (k, v))
        return q, k, v

    def bias(self, tokens: int) -> Tensor | None:
        if self.extra == "relative table":
            return self.table[self.index].view(tokens, tokens, -1).permute(2, 0, 1)
        if self.extra == "mask":
            return torch.ones(tokens, tokens).tril().log().clamp(min=-50).to(self.proj.weight)
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.bias(q.shape[-2])
        match self.product:
            case "sdpa":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            case "sdpa scale":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
            case "einsum":
                scores = torch.einsum("bhid,bhjd->bhij", q * self.scale, k)
            case "baddbmm":
                flat = torch.baddbmm(q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=self.scale)
                scores = flat.unflatten(0, q.shape[:2])
            case _:
                scores = q @ k.transpose(-2, -1) * self.scale
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*self.prepared(x))
        if self.extra == "gamma":
            y = y * self.gamma
        y = self.proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return x + y if self.residual else y


@block
class WindowAttention(Block):
    """Windows of an image shifted by one, each with its own attention, as in Swin."""

    family = "attention"
    takes = (IMAGE,)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return shapes[0][1:] == (4, 4)

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return Attention.options(pick, (4, shapes[0][0]))

    def __init__(self, shape: Shape, **options: Any) -> None:
        super().__init__()
        self.attention = Attention((4, shape[0]), **options)

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape[:2]
        windows = x.roll((-1, -1), (2, 3)).reshape(batch, width, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1)
        y = self.attention(windows.reshape(4 * batch, 4, width)).view(batch, 2, 2, 2, 2, -1)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, 4, 4).roll((1, 1), (2, 3))


@block
class Multihead(Block):
    """The attention of torch itself, alone or in its whole layer."""

    family = "attention"
    takes = (TOKENS,)
    spellings = ("alone", "layer")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(divisors(shapes[0][1])) > 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"heads": pick(*divisors(shapes[0][1])), **super().options(pick)}

    def __init__(self, shape: Shape, heads: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        if spelling == "layer":
            self.layer: nn.Module = nn.TransformerEncoderLayer(shape[1], heads, 10, dropout=0.0, batch_first=True)
        else:
            self.layer = nn.MultiheadAttention(shape[1], heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.spelling == "layer" else x + self.layer(x, x, x, need_weights=False)[0]


@block
class CrossAttention(Block):
    """Tokens look at other tokens of any width, with one head; keys and values may come from one layer."""

    family = "attention"
    takes = (TOKENS, TOKENS)
    spellings = ("separate", "fused", "sizes")

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return True

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"hidden": pick(*WIDTHS), "value": pick(*WIDTHS), **super().options(pick)}

    def __init__(self, one: Shape, two: Shape, hidden: int, value: int, spelling: str) -> None:
        super().__init__(spelling=spelling)
        self.q = nn.Linear(one[1], hidden)
        if spelling == "separate":
            self.k, self.v = nn.Linear(two[1], hidden), nn.Linear(two[1], value)
        else:
            self.kv = nn.Linear(two[1], hidden + value)
            self.hidden, self.value = hidden, value
        self.out = nn.Linear(value, one[1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        match self.spelling:
            case "separate":
                k, v = self.k(y), self.v(y)
            case "fused":
                kv = self.kv(y)
                k, v = kv[..., : self.hidden], kv[..., self.hidden :]
            case _:
                k, v = self.kv(y).split([self.hidden, self.value], -1)
        return x + self.out((self.q(x) @ k.mT * 0.4).softmax(-1) @ v)


@block
class ChannelAttention(Block):
    """Attention between the channels of a head, as in XCiT: only whole heads can go."""

    family = "attention"
    takes = (TOKENS,)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return len(divisors(shapes[0][1])) > 0

    @classmethod
    def options(cls, pick: Pick, *shapes: Shape) -> dict[str, Any]:
        return {"heads": pick(*divisors(shapes[0][1]))}

    def __init__(self, shape: Shape, heads: int) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(shape[1], 3 * shape[1]), nn.Linear(shape[1], shape[1])

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(*x.shape[:2], -1))
