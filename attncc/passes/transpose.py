"""Block structure the other way round: which queries a tile of keys sees.

Before: a mask over coordinates, loads and parameters.
After:  the ranges of query rows that a tile of keys sees, and the questions to ask of each tile of queries in them.

The analysis of `attncc.passes.blocks` solves for kv_idx, which counts the N keys from 0. So query rows and keys
exchange their names, it is asked, and its answers get their own names back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attncc.ir.blocks import BlockStructure, KeyRange
from attncc.ir.nodes import Apply, Expr, Index, Load, Size, Summary
from attncc.ir.rewrite import map_children, substitute
from attncc.passes.algebra import canonical
from attncc.passes.blocks import block_structure
from attncc.passes.simplify import simplify_expr

_OFFSET = Size("q_offset")
_LENGTHS: dict[Expr, Expr] = {Size("M"): Size("N"), Size("N"): Size("M")}
_EXCHANGED: dict[Expr, Expr] = {
    Index("q_row"): Index("kv_idx"),
    Index("q_idx"): Apply("add", (Index("kv_idx"), _OFFSET)),
    Index("kv_idx"): Index("q_idx"),
    **_LENGTHS,
}
_BACK: dict[Expr, Expr] = {
    Index("kv_idx"): Apply("sub", (Index("q_idx"), _OFFSET)),
    Index("kv_lo"): Apply("sub", (Index("q_lo"), _OFFSET)),
    Index("kv_hi"): Apply("sub", (Index("q_hi"), _OFFSET)),
    Index("q_idx"): Index("kv_idx"),
    Index("q_lo"): Index("kv_lo"),
    Index("q_hi"): Index("kv_hi"),
    **_LENGTHS,
}


def transposed_block_structure(mask: Expr) -> BlockStructure:
    """The block structure of a bool expression for tiles of keys: its ranges are of query rows, [lo, hi) within [0, M),
    over kv_lo, kv_hi and summaries of axis "kv". Where lists would serve, tiles are asked in the loop."""
    found = block_structure(substitute(mask, _EXCHANGED))
    return BlockStructure(
        strategy="bounds" if found.strategy == "bounds" else "scan",
        ranges=tuple(
            KeyRange(_back(rows.lo), _back(rows.hi), _back(rows.full_lo), _back(rows.full_hi)) for rows in found.ranges
        ),
        possible=_back(found.possible),
        certain=_back(found.certain),
        summaries=tuple(_summary_back(summary) for summary in found.summaries),
    )


def _back(expr: Expr) -> Expr:
    return simplify_expr(canonical(_renamed(expr, _BACK)))


def _renamed(expr: Expr, names: Mapping[Expr, Expr]) -> Expr:
    """`expr` with its names replaced, and its summaries along the other axis."""
    match expr:
        case Summary():
            return _summary_back(expr)
        case _ if expr in names:
            return names[expr]
        case _:
            return map_children(expr, lambda child: _renamed(child, names))


def _summary_back(summary: Summary) -> Summary:
    load = canonical(substitute(summary.load, _BACK))
    assert isinstance(load, Load)
    return replace(summary, load=load, axis="q" if summary.axis == "kv" else "kv")
