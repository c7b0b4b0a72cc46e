"""Calls that cover the rule table, continued: ops that look up or write by position, and patches of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rule_cases import A, aten, case, in_place, words

ROWS = torch.tensor([[0, 3, 8], [1, 1, 7]])
SIX, FIVE = torch.tensor([5, 0, 3]), torch.tensor([4, 1, 1])
OFFSETS = torch.tensor([0, 4])
MASK = torch.arange(6) > 2


def constant(name: str) -> object:
    """Return a call that meets a constant as long as its input; of a random one, only that it is finite shows."""

    def call(x: Tensor) -> Tensor:
        size, value = [x.shape[1]], (2.0,) if "full" in name else ()
        if name in words("randint normal"):
            value = (0, 9) if name == "randint" else (0.0, 1.0)
            return x + torch.isnan(getattr(torch, name)(*value, size)) * 0
        if "strided" in name or "permuted" in name:
            value = ([0 if "permuted" in name else 1],)
        made = getattr(A if name in words("_efficientzerotensor") else x if "new" in name else torch, name)(
            size, *value
        )
        return x + (made * 0).nan_to_num() if "empty" in name or "rand" in name else x * made

    return call


def positions(name: str) -> object:
    """Return a call that meets what differs along an axis of six."""
    made = {
        "hann_window": lambda: torch.hann_window(6),
        "hamming_window": lambda: torch.hamming_window(6),
        "blackman_window": lambda: torch.blackman_window(6),
        "bartlett_window": lambda: torch.bartlett_window(6),
        "kaiser_window": lambda: torch.kaiser_window(6),
        "fft_fftfreq": lambda: torch.fft.fftfreq(6),
        "fft_rfftfreq": lambda: torch.fft.rfftfreq(11),
        "arange": lambda: torch.arange(6),
        "range": lambda: A.range(0, 5),
        "linspace": lambda: torch.linspace(0, 1, 6),
        "logspace": lambda: torch.logspace(0, 1, 6),
        "randperm": lambda: torch.randperm(6) * 0,
        "tril_indices": lambda: torch.tril_indices(3, 3)[0],
        "triu_indices": lambda: torch.triu_indices(3, 3)[1],
    }[name]
    return lambda x: x + made()


def wide(index: Tensor, x: Tensor) -> Tensor:
    """Return positions along axis 1, the same for all else."""
    return index.view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape[0], -1, *x.shape[2:])


def scattered(name: str, *given: object) -> object:
    """Return a call that writes three rows along axis 1."""
    return lambda x, y: getattr(A, name)(x.clone(), 1, wide(SIX, x), y, *given)


CONSTANTS = words("""
    zeros ones new_zeros new_ones full new_full rand randn empty new_empty randint empty_strided empty_permuted
    new_empty_strided normal
""")
POSITIONAL = words("""
    hann_window hamming_window blackman_window bartlett_window kaiser_window fft_fftfreq fft_rfftfreq arange range
    linspace logspace randperm tril_indices triu_indices
""")
ROWWISE = words("index_add index_add_ index_copy index_copy_")

INDEXING = {
    **{f"{name}, as long as its partner": case(constant(name), (4, 6)) for name in CONSTANTS},
    **{name: case(positions(name), (4, 6), frozen="0.1") for name in POSITIONAL},
    "_embedding_bag": case(lambda w: A._embedding_bag(w, ROWS.flatten(), OFFSETS), (9, 6), frozen="0.0"),
    "_embedding_bag, largest": case(
        lambda w: A._embedding_bag(w, ROWS.flatten(), OFFSETS, mode=2), (9, 6), frozen="0.0"
    ),
    "_embedding_bag_forward_only": case(
        lambda w: A._embedding_bag_forward_only(w, ROWS.flatten(), OFFSETS), (9, 6), frozen="0.0"
    ),
    "embedding": case(lambda w: F.embedding(ROWS, w), (9, 6), frozen="0.0"),
    "embedding_bag": case(lambda w: F.embedding_bag(ROWS, w), (9, 6), frozen="0.0"),
    "index": case(lambda x: x[:, SIX], (4, 6, 5), frozen="0.1"),
    "index, from the back": case(lambda x: x[:, [-2]], (4, 6, 5), literal=True),
    "index, from the front": case(lambda x: x[:, [1]], (4, 6, 5), literal=True),
    "index, two apart": case(lambda x: x[FIVE % 4, :, FIVE], (4, 6, 5), frozen="0.0 0.2"),
    "index, two adjacent": case(lambda x: x[:, SIX[:, None], FIVE[:2]], (4, 6, 5), frozen="0.1 0.2"),
    "index by a mask": case(lambda x: x[:, MASK], (4, 6, 5), frozen="0.1"),
    "index by a mask of two axes": case(lambda x: x[MASK.view(2, 3)], (2, 3, 6, 5), frozen="0.0 0.1"),
    "index by a mask and by numbers": case(lambda x: x[MASK, :, FIVE], (6, 4, 5), frozen="0.0 0.2"),
    "index by a mask of channels": case(lambda x, y: x[y > 0], (4, 6, 5), (4, 6), frozen="0.0 0.1 1.0 1.1"),
    "_unsafe_index": case(lambda x: A._unsafe_index(x, [None, SIX]), (4, 6, 5), frozen="0.1"),
    "index_select": case(lambda x: x.index_select(-1, SIX), (4, 6), frozen="0.1"),
    "gather": case(lambda x: x.gather(1, wide(SIX[:2], x)), (4, 6, 5), frozen="0.1"),
    "gather, only a part": case(
        lambda x: x.gather(1, torch.zeros(4, 2, 3).long()), (4, 6, 5), frozen="0.1 0.2", literal=True
    ),
    "take_along_dim": case(lambda x: torch.take_along_dim(x, SIX[None, :, None], 1), (4, 6, 5), frozen="0.1"),
    "take_along_dim, of all": case(lambda x: torch.take_along_dim(x, SIX), (4, 6), frozen="0.0 0.1"),
    "one_hot": case(lambda x: F.one_hot((x > 0).long(), 5), (4, 6)),
    "bucketize": case(torch.bucketize, (4, 6), (5,), frozen="1.0"),
    "isin": case(torch.isin, (4, 6), (5,), frozen="1.0"),
    "isin, a number": case(lambda x: torch.isin(x, 3), (4, 6)),
    "searchsorted": case(lambda rows, x: torch.searchsorted(rows.sort(-1)[0], x), (5,), (4, 6), frozen="0.0"),
    "searchsorted, rows": case(lambda rows, x: torch.searchsorted(rows.cumsum(-1), x), (4, 5), (4, 6), frozen="0.1"),
    "multinomial": case(
        lambda x: torch.multinomial(torch.where(torch.arange(6) == 2, x.abs(), 0.0), 1), (4, 6), frozen="0.1"
    ),
    "scalar_tensor": case(lambda x: x * torch.scalar_tensor(2.0).double(), (4, 6)),
    "eye": case(lambda x: x + torch.eye(4, 6), (4, 6), frozen="0.0 0.1"),
    "normal, given means": case(lambda x: A.normal(x, 0.0), (4, 6)),
    "poisson": case(lambda x: A.poisson(x * 0), (4, 6)),
    "binomial": case(lambda x: A.binomial((x * 0 + 3).round(), x * 0 + 1), (4, 6)),
}

SCATTER = {
    **{n: case(scattered(n), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1") for n in words("scatter scatter_ scatter_add")},
    **{
        n: case(scattered(n, "amax"), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1")
        for n in words("scatter_reduce scatter_reduce_")
    },
    "scatter_add_": case(scattered("scatter_add_"), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1"),
    "scatter, a number": case(lambda x: x.scatter(1, wide(SIX, x), 2.0), (4, 6, 5), frozen="0.1"),
    "scatter, only a part": case(
        lambda x: x.scatter(1, torch.zeros(4, 2, 3).long(), 2.0), (4, 6, 5), frozen="0.1 0.2", literal=True
    ),
    "scatter, from a longer source": case(
        lambda x, y: x.scatter(1, wide(SIX, x), y), (4, 6, 5), (4, 3, 7), frozen="0.1 0.2 1.1 1.2"
    ),
    "scatter into a constant": case(
        lambda x, y: x + torch.zeros_like(x[:, :1]).expand_as(x).clone().scatter_(1, wide(SIX, x), y),
        (4, 6, 5),
        (4, 3, 5),
        frozen="0.1 1.1",
    ),
    **{n: case((in_place if n[-1] == "_" else aten)(n, 1, SIX, torch.ones(4, 3, 1).double().expand(4, 3, 5)),
               (4, 6, 5), frozen="0.0 0.1 0.2") for n in ROWWISE},
    "index_add, whole rows": case(lambda x, y: x.index_add(1, SIX, y), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1"),
    "index_copy, whole rows": case(lambda x, y: x.index_copy(1, SIX, y), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1"),
    "index_reduce": case(
        lambda x, y: A.index_reduce(x, 1, SIX, y, "amax"), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1"
    ),
    "index_fill": case(lambda x: x.index_fill(1, SIX, 2.0), (4, 6, 5), frozen="0.1"),
    "index_fill_": case(in_place("index_fill_", 1, SIX, 2.0), (4, 6, 5), frozen="0.1"),
    "index_put": case(lambda x, y: A.index_put(x, [None, SIX], y), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1"),
    "index_put, a row for all": case(lambda x, y: A.index_put(x, [SIX % 4], y), (4, 6), (6,), frozen="0.0"),
    "index_put_, by a mask": case(
        lambda x: A.index_put_(x.clone(), [None, MASK], torch.tensor(2.0).double()), (4, 6, 5), frozen="0.1"
    ),
    "index_put_, by a mask of channels": case(
        lambda x, y: A.index_put_(x.clone(), [y > 0], torch.tensor(2.0).double()),
        (4, 6, 5), (4, 6), frozen="0.0 0.1 1.0 1.1",
    ),
    "_index_put_impl": case(
        lambda x, y: A._index_put_impl(x, [SIX % 4], y, True), (4, 6), (3, 6), frozen="0.0 1.0"
    ),
    "_unsafe_index_put": case(lambda x, y: A._unsafe_index_put(x, [SIX % 4], y), (4, 6), (3, 6), frozen="0.0 1.0"),
    "masked_scatter, whole rows": case(
        lambda x, y: x.masked_scatter((torch.arange(4) > 1)[:, None].expand(-1, x.shape[1]), y),
        (4, 6), (2, 6), frozen="0.0 1.0",
    ),
    "masked_scatter_": case(
        lambda x, y: x.clone().masked_scatter_(torch.ones(4, 6).bool().tril(), y), (4, 6), (4, 6),
        frozen="0.0 0.1 1.0 1.1",
    ),
    "select_scatter": case(lambda x, y: x.select_scatter(y, 1, 2), (4, 6, 5), (4, 5), frozen="0.1"),
    "slice_scatter": case(
        lambda x, y: x.slice_scatter(y, 1, 2, 5), (4, 6, 5), (4, 3, 5), frozen="0.1 1.1"
    ),
    "diagonal_scatter": case(
        lambda x, y: x.diagonal_scatter(y, 0, 1, 2), (4, 6, 6), (4, 6), frozen="0.1 0.2 1.1"
    ),
}  # fmt: skip

IMAGE, VOLUME = (2, 6, 4, 4), (2, 6, 4, 4, 4)
RESIZE = words("""
    upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa
""")


def grid(x: Tensor, rank: int) -> Tensor:
    return torch.ones(1, *[3] * rank, rank).double().expand(x.shape[0], *[-1] * (rank + 1)) / 3


def spatial(rank: int) -> dict[str, object]:
    """Pooling, padding and upsampling over the last axes."""
    frozen = " ".join(f"0.{2 + d}" for d in range(rank))
    given = {
        "avg_pool{}d": 2,
        "max_pool{}d": 2,
        "max_pool{}d_with_indices": 2,
        "adaptive_avg_pool{}d": 2,
        "adaptive_max_pool{}d": 2,
        "upsample_nearest{}d": 8,
        "_upsample_nearest_exact{}d": 8,
        "reflection_pad{}d": (1, 1),
        "replication_pad{}d": (1, 1),
    }
    if rank > 1:
        given["_adaptive_avg_pool{}d"] = 2
    sizes = {n: list(v) * rank if isinstance(v, tuple) else [v] * rank for n, v in given.items()}
    return {
        n.format(rank): case(aten(n.format(rank), size), (2, 6, *[4] * rank), frozen=frozen)
        for n, size in sizes.items()
    }


POOLING = {
    **{name: c for rank in (1, 2, 3) for name, c in spatial(rank).items()},
    **{name: case(aten(name, [8, 8], False), IMAGE, frozen="0.2 0.3") for name in RESIZE},
    "avg_pool2d, ceil": case(lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), IMAGE, frozen="0.2 0.3"),
    "avg_pool2d, along one axis": case(lambda x: F.avg_pool2d(x, (2, 1), ceil_mode=True), IMAGE, frozen="0.2"),
    "avg_pool2d, some left out": case(lambda x: F.avg_pool2d(x, (2, 1), 2), IMAGE, frozen="0.2 0.3"),
    "max_pool2d, along one axis": case(lambda x: F.max_pool2d(x, (3, 1), (2, 1), (1, 0)), IMAGE, frozen="0.2"),
    "max_pool2d, where": case(
        lambda x: F.max_pool2d(x, (2, 1), return_indices=True)[0], IMAGE, frozen="0.2 0.3"
    ),
    "avg_pool2d, no batch": case(lambda x: F.avg_pool2d(x, 2), (6, 4, 4), frozen="0.1 0.2"),
    "adaptive_max_pool2d, no batch": case(lambda x: A.adaptive_max_pool2d(x, [2, 2]), (6, 4, 4), frozen="0.1 0.2"),
    "upsample_linear1d": case(lambda x: A.upsample_linear1d(x, [8], False), (2, 6, 4), frozen="0.2"),
    "upsample_trilinear3d": case(
        lambda x: A.upsample_trilinear3d(x, [6, 6, 6], False), (2, 6, 3, 3, 3), frozen="0.2 0.3 0.4"
    ),
    "padded round": case(lambda x: F.pad(x, (1, 1, 2, 0), mode="circular"), IMAGE, frozen="0.2 0.3"),
    "max_unpool2d": case(
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), IMAGE, frozen="0.2 0.3"
    ),
    "max_unpool3d": case(
        lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), VOLUME, frozen="0.2 0.3 0.4"
    ),
    "grid_sampler_2d": case(
        lambda x: A.grid_sampler_2d(x, grid(x, 2), 0, 0, False),
        IMAGE,
        frozen="0.2 0.3",
    ),
    "grid_sampler_2d, a grid of its own": case(
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), IMAGE, (2, 3, 3, 2), frozen="0.2 0.3 1.1 1.2 1.3"
    ),
    "grid_sampler_3d": case(
        lambda x: A.grid_sampler_3d(x, grid(x, 3), 0, 0, False),
        (2, 6, 3, 3, 3),
        frozen="0.2 0.3 0.4",
    ),
    "affine_grid_generator": case(
        lambda m, x: F.affine_grid(m, [m.shape[0], x.shape[1], 4, 4], align_corners=False) + x.sum() * 0,
        (5, 2, 3), (2, 6), frozen="0.1 0.2", pooled="1.0 1.1",
    ),
    "fractional_max_pool2d": case(
        lambda x: A.fractional_max_pool2d(x, [2, 2], [2, 2], torch.full((*x.shape[:2], 2), 0.3).double()),
        IMAGE,
        frozen="0.2 0.3",
    ),
    "fractional_max_pool3d": case(
        lambda x: A.fractional_max_pool3d(x, [2] * 3, [2] * 3, torch.full((*x.shape[:2], 3), 0.3).double()),
        VOLUME,
        frozen="0.2 0.3 0.4",
    ),
    "im2col": case(lambda x: F.unfold(x, 2), IMAGE, frozen="0.2 0.3"),
    "im2col, no batch": case(lambda x: F.unfold(x, 2), (6, 4, 4), frozen="0.1 0.2"),
    "col2im": case(lambda x: F.fold(x, (4, 4), 2), (2, 24, 9), frozen="0.2"),
    "pixel_shuffle": case(lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 3), frozen="0.2 0.3"),
    "pixel_unshuffle": case(lambda x: F.pixel_unshuffle(x, 2), (2, 6, 4, 4), frozen="0.2 0.3"),
    "channel_shuffle": case(lambda x: F.channel_shuffle(x, 3), (2, 12, 3, 3)),
    "native_channel_shuffle": case(lambda x: A.native_channel_shuffle(x, 3), (2, 12, 3, 3)),
}  # fmt: skip
