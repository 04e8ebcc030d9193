"""Rows as segments of channels, within each of which nothing is chosen by channel.

concat(1, x, outer(x, x)), of D = 16           0 .. 1      1
where(d < 1, 1, where(d < 17, x[d - 1],        1 .. 17     x[d]
      x[(d - 17) // 16] * x[(d - 17) % 16]))   17 .. 273   x[d // 16] * x[d % 16], channels from 0 on
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from attncc.ir.nodes import Apply, Constant, Expr, Index, Reduce
from attncc.ir.rewrite import children, has_free, map_children, substitute
from attncc.passes.simplify import simplify_expr
from attncc.passes.simplify_arithmetic import split

D = Index("d")

# By how much the truth of a comparison with a number changes after that number: at it, one later, or both.
_CHANGES = {"lt": (0,), "ge": (0,), "le": (1,), "gt": (1,), "eq": (0, 1), "ne": (0, 1)}


@dataclass(frozen=True, slots=True)
class Segment:
    """`width` channels from `start` on; `value` of each, over `d` from 0 on."""

    start: int
    width: int
    value: Expr


def segments(row: Expr, width: int) -> Iterator[Segment]:
    """Those of an expression over `d` in [0, width)."""
    edges = sorted({0, width, *(edge for edge in _edges(row) if 0 < edge < width)})
    for start, end in itertools.pairwise(edges):
        shifted = substitute(_decided(row, start), {D: Apply("add", (D, Constant(start)))})
        yield Segment(start, end - start, simplify_expr(shifted))


def _edges(expr: Expr) -> Iterator[int]:
    """The channels where comparisons of `d` with numbers change."""
    if isinstance(expr, Reduce) and expr.over == "d":
        return
    if (place := _place(expr)) is not None:
        assert isinstance(expr, Apply)
        yield from (place + change for change in _CHANGES[expr.op])
    for child in children(expr):
        yield from _edges(child)


def _place(expr: Expr) -> int | None:
    """The number that `expr` compares `d` with; None where it does not."""
    match expr:
        case Apply(op=op, args=(x, Constant(value=int() as value))) if op in _CHANGES:
            rest, constant = split(x)
            return value - constant if rest == D else None
        case _:
            return None


def _decided(expr: Expr, channel: int) -> Expr:
    """`expr` with comparisons as they are at a channel."""
    if isinstance(expr, Reduce) and expr.over == "d":
        return expr
    if _place(expr) is not None:
        return simplify_expr(substitute(expr, {D: Constant(channel)}))
    return map_children(expr, lambda child: _decided(child, channel))


@dataclass(frozen=True, slots=True)
class Outer:
    """A product over two channels: d = i * width + j has left[i] * right[j], each over a `d` of its own."""

    left: Expr
    right: Expr
    width: int


def outer(value: Expr) -> Outer | None:
    """`value` as such a product; None where it is none."""
    widths = set(_divisors(value))
    if len(widths) != 1:
        return None
    width = widths.pop()
    row, column = Apply("floordiv", (D, Constant(width))), Apply("mod", (D, Constant(width)))
    if has_free(substitute(value, {row: Constant(0), column: Constant(0)}), "d"):
        return None
    left: Expr = Constant(1.0)
    right: Expr = Constant(1.0)
    for factor, divides in factors(value):
        op = "div" if divides else "mul"
        of_row, of_column = substitute(factor, {row: D}), substitute(factor, {column: D})
        if factor not in (of_row, of_column):
            return None
        if of_column != factor:
            right = Apply(op, (right, of_column))
        else:
            left = Apply(op, (left, of_row))
    return Outer(simplify_expr(left), simplify_expr(right), width)


def _divisors(expr: Expr) -> Iterator[int]:
    """What `d` is divided by, for a quotient or a rest."""
    if isinstance(expr, Reduce) and expr.over == "d":
        return
    match expr:
        case Apply(op="floordiv" | "mod", args=(Index(name="d"), Constant(value=int() as value))) if value > 0:
            yield value
        case _:
            for child in children(expr):
                yield from _divisors(child)


def factors(expr: Expr, divides: bool = False) -> Iterator[tuple[Expr, bool]]:
    """The factors of a product, and whether it is divided by each."""
    match expr:
        case Apply(op="mul", args=(a, b)):
            yield from factors(a, divides)
            yield from factors(b, divides)
        case Apply(op="div", args=(a, b)):
            yield from factors(a, divides)
            yield from factors(b, not divides)
        case _:
            yield expr, divides
