"""Fourier transforms along fixed axes, and complex numbers as pairs."""

from __future__ import annotations

from lightning_prune.graph.call import Call, normalize_dims
from lightning_prune.graph.labels import FIXED
from lightning_prune.graph.rules.table import rule


@rule("_fft_r2c _fft_c2c _fft_c2r")
def fourier(call: Call) -> None:
    """Every frequency depends on every value of the transformed axes."""
    axes = call.axes(call["self"])
    for d in normalize_dims(call["dim"], len(axes)):
        call.freeze(axes[d], "a spectrum over channels")
        axes[d] = FIXED
    call.put(call.out, axes)


@rule("view_as_complex")
def as_complex(call: Call) -> None:
    """The last axis holds real and imaginary part."""
    *axes, parts = call.axes(call["self"])
    call.freeze(parts, "real and imaginary part")
    call.put(call.out, axes)


@rule("view_as_real")
def as_real(call: Call) -> None:
    """Add an axis for real and imaginary part."""
    call.put(call.out, [*call.axes(call["self"]), FIXED])
