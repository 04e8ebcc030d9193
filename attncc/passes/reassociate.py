"""Pairwise attention as a recurrence, where its weights let sums over keys be made before any query is known."""

from __future__ import annotations

from attncc.ir.nodes import Apply, Constant, Expr, Index
from attncc.passes.algebra import linear
from attncc.passes.simplify import simplify_expr

_AT_MOST = {"ge": (0, 1, 0), "gt": (0, 1, 1), "le": (1, 0, 0), "lt": (1, 0, 1)}


def is_true(mask: Expr) -> bool:
    """Whether a mask keeps every pair."""
    return simplify_expr(mask) == Constant(True)


def is_causal(mask: Expr) -> bool:
    """Whether a mask keeps exactly the keys up to the query's own, however that is written."""
    match simplify_expr(mask):
        case Apply(op=op, args=args) if op in _AT_MOST:
            larger, smaller, strictly = _AT_MOST[op]
            found = linear(args[larger]) - linear(args[smaller])
            return found.plus(-strictly) == linear(Apply("sub", (Index("q_idx"), Index("kv_idx"))))
        case _:
            return False
