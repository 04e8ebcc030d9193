"""Column sums of weights, as an attention of its own: queries and keys exchange their roles.

Before: a softmax over the keys of each query, whose rows have been summed: lse
After:  weight = exp(score - lse[b, h, query]), summed over the queries of each key: what rows are divided by is the sum

Rows of q are now those of k, once per query head, and the other way round; position j of a key is that of row j. The
derived attention goes through the same kernels as any other, mask and block structure included.
"""

from __future__ import annotations

from dataclasses import replace

from attncc.ir.nodes import (
    Apply,
    Attention,
    Element,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    RowName,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    TensorParameter,
    identity_row,
)
from attncc.ir.rewrite import map_children, substitute
from attncc.ir.types import DType, Kind

# No specification has a parameter whose name begins with an underscore.
LSE, GROUP, WIDTH_V = "_lse", "_group", "_width_v"

_GROUP = Parameter(GROUP, Kind.INT)
_LENGTHS: dict[Expr, Expr] = {Size("M"): Size("N"), Size("N"): Size("M")}
_EXCHANGED: dict[Expr, Expr] = {
    **_LENGTHS,
    Index("kv_idx"): Index("q_row"),
    Index("q_row"): Index("kv_idx"),
    # The derived attention is called with the negative of the offset.
    Index("q_idx"): Apply("sub", (Index("kv_idx"), Size("q_offset"))),
    Size("q_offset"): Apply("neg", (Size("q_offset"),)),
    # It has a key/value head for each query head, and values of width 1.
    Index("hkv"): Apply("floordiv", (Index("h"), _GROUP)),
    Size("HKV"): Apply("floordiv", (Size("H"), _GROUP)),
    Size("E"): Parameter(WIDTH_V, Kind.INT),
}
_ROWS: dict[RowName, RowName] = {"q": "k", "k": "q", "v": "v"}


def column_sums(attention: Attention) -> Attention:
    """The attention whose rows sum up to the column sums of the softmax `attention`, before dropout.

    It is called with k repeated for each query head as q, with q as k, with any values of width 1, with -q_offset and
    with these inputs besides: LSE, +inf where nothing was summed; GROUP, query heads per key/value head; WIDTH_V.
    """
    assert isinstance(attention.normalizer, Softmax)
    lse = Load(LSE, (Index("b"), Index("h"), Index("kv_idx")), Kind.FLOAT)
    weight = Apply("exp", (Apply("sub", (Hole("score"), lse)),))
    parameters = (
        *(_exchanged_shape(p) if isinstance(p, TensorParameter) else p for p in attention.parameters),
        TensorParameter(LSE, (DType.F32, DType.F64), (Size("B"), Size("H"), Size("N"))),
        ScalarParameter(GROUP, Kind.INT, None),
        ScalarParameter(WIDTH_V, Kind.INT, None),
    )
    return replace(
        attention,
        name=f"{attention.name}_columns",
        parameters=parameters,
        q=_exchanged(attention.k),
        k=_exchanged(attention.q),
        v=identity_row("v"),
        scale=_exchanged(attention.scale),
        score=_exchanged(attention.score),
        mask=_exchanged(attention.mask),
        normalizer=Sum(weight),
        dropout=None,
    )


def _exchanged_shape(tensor: TensorParameter) -> TensorParameter:
    return replace(tensor, shape=tuple(substitute(axis, _LENGTHS) for axis in tensor.shape))


def _exchanged(expr: Expr) -> Expr:
    if isinstance(expr, Element):
        return Element(_ROWS[expr.row], _exchanged(expr.index))
    return _EXCHANGED[expr] if expr in _EXCHANGED else map_children(expr, _exchanged)
