"""Block structure of a mask: which tiles hold nothing, everything or some, without looking at pairs.

Before: a mask over coordinates, loads and parameters.
After:  the ranges of keys that a tile of queries sees, and the questions to ask of each tile within them.

Which of the three ways a kernel is to use:
  bounds   every condition is a limit on kv_idx, or decides about whole ranges, or says nothing of tiles
           (`ancestor[b, q_row, kv_idx]`): the ranges are all there is to know
  scan     what remains is arithmetic: asking it of a tile costs a few scalar operations, thousands of times less than
           computing the tile, so even a pattern that keeps one tile in a hundred is scanned
  list     what remains reads tensors that differ between tiles of keys: the loop would wait for each of those reads,
           and the answers can be shared by all heads for which they are the same
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import Literal

from attncc.ir.blocks import BlockStructure, KeyRange
from attncc.ir.nodes import Expr, Index, Load, Size, Summary
from attncc.ir.rewrite import contains, walk
from attncc.passes.algebra import (
    FALSE,
    TRUE,
    ZERO,
    at_most,
    below,
    canonical,
    choice,
    greatest,
    least,
    linear,
)
from attncc.passes.intervals import Truth, truth
from attncc.passes.simplify import simplify_expr
from attncc.passes.solve import Limit, Region, solve

MOST_RANGES = 4

_N = Size("N")


def block_structure(mask: Expr) -> BlockStructure:
    """The block structure of a bool expression."""
    mask = canonical(mask)
    regions = solve(mask)
    ranges, told = _ranges(regions)
    ranges = tuple(_simplified(key_range) for key_range in ranges)
    held = truth(mask)
    possible, certain = simplify_expr(held.possible), simplify_expr(held.certain)
    exprs = [*(end for key_range in ranges for end in _ends(key_range)), possible, certain]
    summaries = dict.fromkeys(node for expr in exprs for node in walk(expr) if isinstance(node, Summary))
    return BlockStructure(_strategy(regions, held, told=told), ranges, possible, certain, tuple(summaries))


def _strategy(regions: Iterable[Region], mask: Truth, *, told: bool) -> Literal["bounds", "scan", "list"]:
    """told: whether the ranges say all that the regions do."""
    residual = [truth(condition) for region in regions for condition in region.residual]
    open_questions = [held for held in residual if held != Truth(FALSE, TRUE)]
    if not told or any(region.hull for region in regions):
        open_questions.append(mask)
    if any(_reads_keys(answer) for held in open_questions for answer in (held.possible, held.certain)):
        return "list"
    return "scan" if open_questions else "bounds"


def _reads_keys(expr: Expr) -> bool:
    """Whether `expr` reads a tensor at a place that depends on the tile of keys."""

    def reads(node: Expr) -> bool:
        match node:
            case Summary(axis=axis):
                return axis == "kv"
            case Load():
                return contains(node, lambda index: index in (Index("kv_lo"), Index("kv_hi")))
            case _:
                return False

    return contains(expr, reads)


def _ends(key_range: KeyRange) -> tuple[Expr, Expr, Expr, Expr]:
    return key_range.lo, key_range.hi, key_range.full_lo, key_range.full_hi


def _simplified(key_range: KeyRange) -> KeyRange:
    return KeyRange(*map(simplify_expr, _ends(key_range)))


# --- from regions to ranges ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Keys from the greatest of `lows` to `hi` (exclusive), of which every query keeps those in `full`."""

    lows: tuple[Expr, ...]
    hi: Expr
    full: tuple[Expr, Expr] | None

    @property
    def lo(self) -> Expr:
        return greatest(ZERO, *self.lows)

    def leads(self, other: _Stretch) -> bool:
        """Whether this one never begins after `other`."""
        return at_most(self.lo, other.lo)

    def holds(self, other: _Stretch) -> bool:
        """Whether every key of `other` is in this one."""
        return self.leads(other) and at_most(other.hi, self.hi)


def _ranges(regions: tuple[Region, ...]) -> tuple[tuple[KeyRange, ...], bool]:
    """Ascending ranges that hold the regions, and whether they say all that the regions do."""
    stretches, told = _outermost(_joined(regions))
    if not stretches:
        return (KeyRange(ZERO, ZERO, ZERO, ZERO),), True
    if len(stretches) > MOST_RANGES:
        told = False
        stretches = [*stretches[: MOST_RANGES - 1], _enclosing(stretches[MOST_RANGES - 1 :])]
    while (order := _ascending(stretches)) is None and len(stretches) > 2:
        told = False
        a, b = next(
            pair for pair in combinations(stretches, 2) if not (pair[0].leads(pair[1]) or pair[1].leads(pair[0]))
        )
        stretches = [*(stretch for stretch in stretches if stretch not in (a, b)), _enclosing([a, b])]
    if order is None:
        return _ordered(*map(_range, stretches)), told
    return tuple(map(_range, order)), told


def _outermost(stretches: list[_Stretch]) -> tuple[list[_Stretch], bool]:
    """The stretches that no other holds, and whether no full part was lost with the others."""

    def held(i: int) -> bool:
        inner = stretches[i]
        # Of two that hold each other the first stays.
        return any(
            outer.holds(inner) and (j < i or not inner.holds(outer)) for j, outer in enumerate(stretches) if j != i
        )

    outermost: list[_Stretch] = []
    told = True
    for outer in (stretch for i, stretch in enumerate(stretches) if not held(i)):
        inside = [stretch.full for stretch in (outer, *stretches) if stretch.full is not None and outer.holds(stretch)]
        full = list(dict.fromkeys(inside))
        told = told and (len(full) <= 1 or full[0] == (outer.lo, outer.hi))
        outermost.append(_Stretch(outer.lows, outer.hi, full[0] if full else None))
    return outermost, told


def _joined(regions: tuple[Region, ...]) -> list[_Stretch]:
    """One stretch for all regions that begin together."""
    together: dict[tuple[Limit, ...], list[Region]] = {}
    for region in regions:
        together.setdefault(region.lows, []).append(region)
    return [_stretch(lows, group) for lows, group in together.items()]


def _stretch(lows: tuple[Limit, ...], regions: list[Region]) -> _Stretch:
    hi = greatest(*(_end(region.possible, [limit.some for limit in region.highs]) for region in regions))
    full_lo = _all_known([limit.every for limit in lows])
    full_his = [
        _end(region.certain, highs)
        for region in regions
        if not region.residual
        and not region.hull
        and region.certain != FALSE
        and (highs := _all_known([limit.every for limit in region.highs])) is not None
    ]
    full = (greatest(ZERO, *full_lo), greatest(*full_his)) if full_lo is not None and full_his else None
    return _Stretch(tuple(limit.some for limit in lows), hi, full)


def _all_known(exprs: list[Expr | None]) -> list[Expr] | None:
    known = [expr for expr in exprs if expr is not None]
    return known if len(known) == len(exprs) else None


def _end(condition: Expr, highs: list[Expr]) -> Expr:
    return choice(condition, least(_N, *highs), ZERO)


def _enclosing(stretches: list[_Stretch]) -> _Stretch:
    lo = least(*(greatest(*stretch.lows) if stretch.lows else ZERO for stretch in stretches))
    return _Stretch((lo,), greatest(*(stretch.hi for stretch in stretches)), None)


def _range(stretch: _Stretch) -> KeyRange:
    lo = stretch.lo
    return KeyRange(lo, stretch.hi, *(stretch.full or (lo, lo)))


# --- order -----------------------------------------------------------------------------------------------------------


def _ascending(stretches: list[_Stretch]) -> tuple[_Stretch, ...] | None:
    """The stretches in an order in which they begin for every tile, if there is one."""
    for order in permutations(stretches):
        if all(a.leads(b) for a, b in pairwise(order)):
            return order
    return None


def _ordered(a: KeyRange, b: KeyRange) -> tuple[KeyRange, KeyRange]:
    """The one that begins first comes first, whichever that is for a tile."""
    swapped = below(linear(b.lo) - linear(a.lo))
    ends = list(zip(_ends(a), _ends(b), strict=True))
    return (
        KeyRange(*(choice(swapped, y, x) for x, y in ends)),
        KeyRange(*(choice(swapped, x, y) for x, y in ends)),
    )
