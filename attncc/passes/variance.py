"""Which coordinates an expression varies with: what hoisting and the analysis of masks both ask."""

from __future__ import annotations

from typing import assert_never

from attncc.ir.nodes import (
    Apply,
    Constant,
    Element,
    Expr,
    Hole,
    Index,
    IndexName,
    Load,
    Parameter,
    Reduce,
    Size,
    Summary,
    Variable,
)

_NONE: frozenset[str] = frozenset()
_PAIR = frozenset({"b", "h", "q", "kv"})

# The corners of a tile are uniform within it.
_COORDINATE: dict[IndexName, frozenset[str]] = {
    "b": frozenset({"b"}),
    "h": frozenset({"h"}),
    "hkv": frozenset({"h"}),
    "q_row": frozenset({"q"}),
    "q_idx": frozenset({"q"}),
    "kv_idx": frozenset({"kv"}),
    "d": frozenset({"d"}),
    "q_lo": _NONE,
    "q_hi": _NONE,
    "kv_lo": _NONE,
    "kv_hi": _NONE,
}


def variance(expr: Expr) -> frozenset[str]:
    """The coordinates among {"b", "h", "q", "kv", "d"} that the value of `expr` may depend on.

    `hkv` counts as h, `q_row` as q. An element of a row varies with its batch, its head and its position.
    Raises ValueError for a `Variable`: what a plan has bound stands for something only the plan knows.
    """
    match expr:
        case Constant() | Size() | Parameter():
            return _NONE
        case Index(name=name):
            return _COORDINATE[name]
        case Hole():
            return _PAIR
        case Load(indices=indices):
            return _union(indices)
        case Apply(args=args):
            return _union(args)
        case Element(row=row, index=index):
            return variance(index) | {"b", "h", "q" if row == "q" else "kv"}
        case Reduce(body=body, size=size):
            return (variance(body) - {"d"}) | variance(size)
        case Summary(load=load, axis=axis):
            return variance(load) - {axis}
        case Variable(name=name):
            raise ValueError(f"variance of the planned variable {name!r}")
        case _:
            assert_never(expr)


def _union(exprs: tuple[Expr, ...]) -> frozenset[str]:
    return _NONE.union(*map(variance, exprs))
