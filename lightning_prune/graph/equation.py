"""The letters of an einsum."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["spell_equation"]


def spell_equation(equation: str, ranks: Sequence[int], rank_out: int) -> tuple[list[str], str]:
    """Return the letters of every operand and of the result, ellipses spelled out with private letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = re.sub(r"[^a-zA-Z]", "", left)
        right = ("..." if "..." in left else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)

    def spell(term: str, rank: int) -> str:
        missing = rank - len(term.replace("...", ""))
        return term.replace("...", "".join(chr(0x3B1 + k) for k in range(missing, 0, -1)))

    return [spell(t, r) for t, r in zip(terms, ranks, strict=True)], spell(right, rank_out)
