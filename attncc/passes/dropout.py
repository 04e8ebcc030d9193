"""Dropout: each weight is kept with probability 1 - p and then divided by it, or else 0.

Before: an attention
After:  the same with the clause  dropout = where(uniform(key, q_idx, kv_idx) < p, 0, 1 / (1 - p)),
        key = random_key(seed, b * H + h), and scalars of the call for p and the two halves of the seed, the lower one
        less 2**31: scalars have 32 bits and a sign

Which weights are kept depends on the seed, the head and the two positions alone: not on tiles, targets or threads, and
the backward pass draws the same again.
"""

from __future__ import annotations

from dataclasses import replace

from attncc.ir.nodes import Apply, Attention, Constant, Expr, Index, Parameter, ScalarParameter, Size
from attncc.ir.types import Kind

# No specification has a parameter whose name begins with an underscore.
P, SEED_HIGH, SEED_LOW = "_dropout_p", "_seed_high", "_seed_low"
# Numbers are drawn with so many bits: p is rounded to a multiple of 2**-BITS, so that all float types compare alike.
BITS = 24

_WORD = 2**32


def with_dropout(attention: Attention) -> Attention:
    """`attention` with dropout of its weights."""
    p = Parameter(P, Kind.FLOAT)
    high, low = Parameter(SEED_HIGH, Kind.INT), Parameter(SEED_LOW, Kind.INT)
    seed = _add(_mul(high, Constant(_WORD)), _add(low, Constant(_WORD // 2)))
    key = Apply("random_key", (seed, _add(_mul(Index("b"), Size("H")), Index("h"))))
    drawn = Apply("uniform", (key, Index("q_idx"), Index("kv_idx")))
    kept = Apply("div", (Constant(1.0), Apply("sub", (Constant(1.0), p))))
    scalars = (
        ScalarParameter(P, Kind.FLOAT, None),
        ScalarParameter(SEED_HIGH, Kind.INT, None),
        ScalarParameter(SEED_LOW, Kind.INT, None),
    )
    return replace(
        attention,
        parameters=(*attention.parameters, *scalars),
        dropout=Apply("where", (Apply("lt", (drawn, p)), Constant(0.0), kept)),
    )


def dropout_scalars(p: float, seed: int) -> dict[str, int | float]:
    """The scalars of a call with that probability, within [0, 1), and that seed of 64 bits."""
    return {P: rounded(p), SEED_HIGH: seed // _WORD, SEED_LOW: seed % _WORD - _WORD // 2}


def rounded(p: float) -> float:
    """`p` as numbers are compared with it: below 1, as it is."""
    return min(round(p * 2**BITS), 2**BITS - 1) / 2**BITS


def _add(a: Expr, b: Expr) -> Expr:
    return Apply("add", (a, b))


def _mul(a: Expr, b: Expr) -> Expr:
    return Apply("mul", (a, b))
