"""Calls that cover the rule table, continued: matrices as a whole, spectra, complex numbers, losses, quantisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rule_cases import A, aten, case, quiet, words

SQUARE = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCH = SQUARE @ SQUARE.mT + 3 * torch.eye(5)  # symmetric, with positive eigenvalues


def magnitudes(results: Any) -> list[Tensor]:
    """Return what of a factorisation does not depend on signs and order."""
    return [t.abs().sort(-1)[0] for t in (results if isinstance(results, tuple) else (results,))]


MATRICES = {
    **{
        name: case((getattr(torch.linalg, name)), BATCH, frozen="0.1 0.2")
        for name in words("inv det slogdet cholesky pinv matrix_exp eigvals inv_ex lu_factor lu ldl_factor")
    },
    **{
        name: case((lambda x, name=name: getattr(torch.linalg, name)(x)[0].abs()), BATCH, frozen="0.1 0.2")
        for name in words("eigh svd qr")
    },
    "eig": case((lambda x: magnitudes(torch.linalg.eig(x))[0]), BATCH, frozen="0.1 0.2"),
    "_linalg_eigvals": case(lambda x: A._linalg_eigvals(x).real.sort(-1)[0], BATCH, frozen="0.1 0.2"),
    "cholesky_inverse": case((lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x))), BATCH,
                             frozen="0.1 0.2"),
    "cholesky": case(quiet(torch.cholesky), BATCH, frozen="0.1 0.2"),
    "cholesky_solve": case((lambda x, y: torch.cholesky_solve(y, torch.linalg.cholesky(x))), BATCH, (4, 5, 3),
                           frozen="0.1 0.2 1.1 1.2"),
    "solve": case((torch.linalg.solve), BATCH, (4, 5, 3), frozen="0.1 0.2 1.1 1.2"),
    "solve, one vector each": case((torch.linalg.solve), BATCH, (4, 5), frozen="0.1 0.2 1.1"),
    "lu_solve": case((lambda x, y: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), y)), BATCH, (4, 5, 3),
                     frozen="0.1 0.2 1.1 1.2"),
    "ldl_solve": case((lambda x, y: torch.linalg.ldl_solve(*torch.linalg.ldl_factor(x), y)), BATCH, (4, 5, 3),
                      frozen="0.1 0.2 1.1 1.2"),
    "lstsq": case((lambda x, y: torch.linalg.lstsq(x, y)[0]), BATCH, (4, 5, 3), frozen="0.1 0.2 1.1 1.2"),
    "solve_triangular": case((lambda x, y: torch.linalg.solve_triangular(x, y, upper=True)), BATCH, (4, 5, 3),
                             frozen="0.1 0.2 1.1 1.2"),
    "triangular_solve": case(quiet(lambda x, y: torch.triangular_solve(y, x)[0]), BATCH, (4, 5, 3),
                             frozen="0.1 0.2 1.1 1.2"),
    "householder_product": case(
        lambda x: torch.linalg.householder_product(*torch.geqrf(x)), BATCH, frozen="0.1 0.2"
    ),
    "ormqr": case(lambda x, y: torch.ormqr(*torch.geqrf(x), y), BATCH, (4, 5, 5), frozen="0.1 0.2 1.1 1.2"),
    "lu_unpack": case((lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x))), BATCH, frozen="0.1 0.2"),
    "linalg_cross": case(lambda x, y: torch.linalg.cross(x, y, dim=1), (4, 3, 6), (1, 3, 6), frozen="0.1 1.1"),
    "diagonal": case(lambda x: x.diagonal(0, 1, 2), (4, 6, 6)),
    "diagonal, beside": case(lambda x: x.diagonal(1, 1, 2), (4, 6, 6), frozen="0.1 0.2"),
    "diagonal, not square": case(lambda x: x.diagonal(0, 0, 2), (4, 5, 6), frozen="0.0 0.2"),
    "trace": case(torch.trace, (6, 6), pooled="0.0 0.1"),
    "diag_embed": case(lambda x: torch.diag_embed(x, dim1=0, dim2=2), (4, 6)),
    "diag_embed, beside": case(lambda x: torch.diag_embed(x, 1), (4, 6), frozen="0.1"),
    "diag": case(torch.diag, (6,)),
    "cdist": case(torch.cdist, (4, 5, 6), (1, 7, 6), pooled="0.2 1.2"),
    "_cdist_forward": case(lambda x, y: A._cdist_forward(x, y, 1.0, None), (5, 6), (7, 6), pooled="0.1 1.1"),
    "pdist": case(F.pdist, (5, 6), frozen="0.0", pooled="0.1"),
    "dist": case(torch.dist, (4, 6), (6,), pooled="0.0 0.1 1.0"),
    "kron": case(torch.kron, (4, 6), (3, 5)),
    "block_diag": case(lambda *x: torch.block_diag(*x), (4, 6), (3, 5), (2,)),
    "meshgrid": case(lambda *x: torch.meshgrid(*x, indexing="ij"), (4,), (5,)),
}  # fmt: skip

LAST = (4, 6, 8)
COMPLEX = torch.complex(torch.arange(24.0).view(4, 6), torch.ones(4, 6)).to(torch.complex128)
SPECTRAL = {
    "fft": case(lambda x: torch.fft.fft(x, dim=1), LAST, frozen="0.1"),
    "fft, of complex numbers": case(lambda x: torch.fft.fft(x, dim=1), COMPLEX, frozen="0.1"),
    "fft, longer": case(lambda x: torch.fft.fft(x, n=10), LAST, frozen="0.2"),
    "rfft2": case(torch.fft.rfft2, LAST, frozen="0.1 0.2"),
    "irfft": case(lambda x: torch.fft.irfft(x, dim=1), COMPLEX, frozen="0.1"),
    "fftshift": case(lambda x: torch.fft.fftshift(x, dim=2), LAST, literal=True),
    "filtered": case(lambda x, w: torch.fft.irfft2(torch.fft.rfft2(x) * w), LAST, (6, 5), frozen="0.1 0.2 1.0 1.1"),
    "stft": case(
        lambda x: torch.stft(x, 4, window=torch.ones(4).double(), return_complex=True), (5, 16), frozen="0.1"
    ),
    "view_as_complex": case(torch.view_as_complex, (4, 6, 2), frozen="0.2"),
    "view_as_real": case(torch.view_as_real, COMPLEX),
    "complex": case(torch.complex, (4, 6), (6,)),
    "polar": case(torch.polar, (4, 6), (4, 6)),
    "rotated pairs": case(
        lambda x, angle: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones_like(angle), angle)).flatten(-2), (4, 12), (6,),
    ),
}  # fmt: skip

TARGET = torch.tensor([0, 2, 1, 2])
PAIR = words("mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy_with_logits")
LOSSES = {
    **{name: case(aten(name), (4, 6), (4, 6), pooled="0.0 0.1 1.0 1.1") for name in PAIR},
    "mse_loss, each": case(lambda x, y: A.mse_loss(x, y, 0), (4, 6), (6,)),
    "binary_cross_entropy": case(
        lambda x, y: A.binary_cross_entropy(x.sigmoid(), y.sigmoid(), None, 0), (4, 6), (4, 6)
    ),
    "nll_loss_forward": case(lambda x: F.nll_loss(x, TARGET), (4, 3), frozen="0.0 0.1", pooled="0.0"),
    "nll_loss_forward, each": case(
        lambda x: F.nll_loss(x, (x[:, 0] > 0).long(), reduction="none"), (4, 3), frozen="0.1"
    ),
    "nll_loss2d_forward": case(
        lambda x: F.nll_loss(x, (x[:, 0] > 0).long(), reduction="none"), (4, 3, 5, 6), frozen="0.1"
    ),
    "cross_entropy_loss, weighted": case(
        lambda x, w: F.cross_entropy(x, (x[:, 0] > 0).long(), w.abs()), (4, 3), (3,), frozen="0.1 1.0", pooled="0.0"
    ),
}

QUANTIZED = {
    "fake_quantize_per_tensor_affine": case(
        lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).double(), (4, 6)
    ),
    "fake_quantize_per_channel_affine": case(
        lambda x, s: torch.fake_quantize_per_channel_affine(
            x.float(), s.abs().float() + 0.1, torch.zeros(s.shape[0]), 1, -128, 127
        ).double(),
        (4, 6, 5), (6,),
    ),
    "quantize_per_tensor": case(
        quiet(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8).dequantize().double()), (4, 6)
    ),
    "quantize_per_channel": case(
        quiet(lambda x, s: torch.quantize_per_channel(
            x.float(), s.abs().float() + 0.1, torch.zeros(s.shape[0]), 1, torch.qint8
        ).dequantize().double()),
        (4, 6, 5), (6,),
    ),
    "int_repr": case(quiet(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8).int_repr()), (4, 6)),
}  # fmt: skip
