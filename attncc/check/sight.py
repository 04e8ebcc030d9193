"""What the expression of each clause may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attncc.check.limit_errors import OtherRow, RowInPair
from attncc.check.name_errors import NotAvailable
from attncc.diagnostics import Diagnostic, Label
from attncc.ir.nodes import Element, Expr, Hole, Index, Reduce
from attncc.ir.rewrite import children
from attncc.source import Span

_HEADS = frozenset(("b", "h", "hkv"))
# `t` is named in recurrences only.
_QUERY = _HEADS | {"q_row", "q_idx", "t"}
_KEY = _HEADS | {"kv_idx", "t"}


@dataclass(frozen=True, slots=True)
class Sight:
    """What the expression of a clause may read: coordinates, its own row, values that the kernel supplies."""

    coordinates: frozenset[str]
    row: str = ""
    holes: frozenset[str] = frozenset()


SIGHTS: Mapping[str, Sight] = {
    "q": Sight(_QUERY | {"d"}, "q"),
    "k": Sight(_KEY | {"d"}, "k"),
    "v": Sight(_KEY | {"d"}, "v"),
    "scale": Sight(_QUERY | _KEY),
    "score": Sight(_QUERY | _KEY, holes=frozenset(("qk",))),
    "mask": Sight(_QUERY | _KEY),
    "weight": Sight(_QUERY | _KEY, holes=frozenset(("score",))),
    "sink": Sight(_QUERY),
}


def blind_spots(expr: Expr, clause: str, span: Span) -> Iterator[Diagnostic]:
    """What is wrong with what a clause reads, at the places where it is read."""
    sight = SIGHTS[clause]
    seen: set[tuple[type, str]] = set()
    for leaf in _shared_walk(expr):
        name = getattr(leaf, "name", None) or getattr(leaf, "row", "")
        diagnostic = _blind_spot(leaf, clause, sight, leaf.span or span)
        # Each name once, and of a computation with rows its outermost part only.
        key = (type(diagnostic), "" if isinstance(diagnostic, RowInPair) else name)
        if diagnostic is None or key in seen:
            continue
        seen.add(key)
        place = diagnostic.span
        if place is not None and not (place.source is span.source and span.start <= place.start < span.end):
            related = (Label(span, f"`{clause}` reads it here"),)
            diagnostic = dataclasses.replace(diagnostic, related=related)
        yield diagnostic


def _blind_spot(leaf: Expr, clause: str, sight: Sight, span: Span) -> NotAvailable | OtherRow | RowInPair | None:
    """What is wrong with reading `leaf` in a clause; None if nothing."""
    match leaf:
        case Index(name=name) if name not in sight.coordinates and name not in ("d", "e"):
            if sight.row:
                own = "q_idx" if sight.row == "q" else "kv_idx"
                return NotAvailable(span, name, clause, f"the position of a row of `{clause}` is `{own}`")
            return NotAvailable(span, name, clause, "one sink serves all keys of a row")
        case Hole(name=name) if name not in sight.holes:
            return NotAvailable(span, name, clause, *_hole_reason(name, clause, sight))
        case Element(row=row) if row != sight.row:
            if sight.row:
                return OtherRow(span, clause, row)
            hint = "`qk` is `scale * dot(q, k)`; transform the rows with `q = …` and `k = …`"
            return RowInPair(span, clause, f"the row `{row}`", hint)
        case Reduce() if not sight.row:
            hint = "compute it before the call and pass it as a tensor"
            if any(isinstance(part, Element) for part in _shared_walk(leaf)):
                hint = "`qk` is `scale * dot(q, k)`; transform the rows with `q = …` and `k = …`"
            return RowInPair(span, clause, "a reduction over a row", hint)
        case _:
            return None


def _hole_reason(name: str, clause: str, sight: Sight) -> tuple[str, str]:
    if sight.row:
        return "rows are transformed before queries meet keys", ""
    if name == "score" and clause == "score":
        return "this is the clause that defines it", "write `qk` for the scaled product of q and k"
    if clause == "mask":
        hint = f"a condition on the score goes into it: `score = {name} if … else -inf`".replace("score if", "qk if")
        return "the mask is known before any score", hint
    if clause == "weight":
        return "there is a `score` clause, and the weight is made of it", "write `score`"
    return f"`{name}` is computed after `{clause}`", ""


def _shared_walk(expr: Expr) -> Iterator[Expr]:
    """Every part of an expression, parents first; parts that are shared once."""
    seen: set[int] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(reversed(children(node)))
