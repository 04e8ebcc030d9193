"""Which keys a mask allows, in closed form: its comparisons of ints solved for kv_idx.

Before: a predicate over coordinates, loads and parameters.
After:  a union of `Region`s, each an intersection of limits on kv_idx. A limit comes twice, because a tile has several
        queries: the keys that some query of the tile allows, and the keys that every query allows.

Solved are comparisons in which kv_idx occurs once, linearly or within floor divisions by something uniform; `min`,
`max`, `abs` and `where` of keys are taken apart into conjunctions and disjunctions of such. Conditions without kv_idx
decide about a region as a whole. Anything else stays behind as the region's residual.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

from attncc.ir.nodes import Apply, Constant, Expr, Index, Size
from attncc.ir.rewrite import kind_of, map_children
from attncc.ir.types import Kind
from attncc.passes.algebra import (
    FALSE,
    TRUE,
    ZERO,
    Linear,
    below,
    canonical,
    choice,
    conjunction,
    expr_of,
    greatest,
    least,
    linear,
    never_positive,
)
from attncc.passes.intervals import ORDERS, bounds_of_form, chosen_cell, truth, varies_in_tile
from attncc.passes.variance import variance

# A disjunction with more alternatives than this becomes one region that holds them all.
MOST_ALTERNATIVES = 12


@dataclass(frozen=True, slots=True)
class Limit:
    """An end of the keys: `some` for the tile's most generous query, `every` for its strictest (None: not known)."""

    some: Expr
    every: Expr | None


_FROM_START = Limit(ZERO, ZERO)


@dataclass(frozen=True, slots=True)
class Region:
    """The keys with kv_idx >= each of `lows` and < each of `highs`, where the conditions without kv_idx hold.

    possible, certain   of those conditions, over the queries of the tile
    residual            conditions that were not solved: they may keep less than the region
    hull                whether the region stands for several, and may keep less for that
    """

    lows: tuple[Limit, ...] = ()
    highs: tuple[Limit, ...] = ()
    possible: Expr = TRUE
    certain: Expr = TRUE
    residual: tuple[Expr, ...] = ()
    hull: bool = False

    def __and__(self, other: Region) -> Region:
        return Region(
            tuple(dict.fromkeys(self.lows + other.lows)),
            tuple(dict.fromkeys(self.highs + other.highs)),
            conjunction(self.possible, other.possible),
            conjunction(self.certain, other.certain),
            tuple(dict.fromkeys(self.residual + other.residual)),
            self.hull or other.hull,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no tile has a key in the region, as far as its form tells."""
        gaps = (linear(high.some) - linear(low.some) for low in self.lows for high in self.highs)
        return self.possible == FALSE or any(map(never_positive, gaps))


Union = tuple[Region, ...]


def solve(predicate: Expr) -> Union:
    """The regions whose union holds every pair that a canonical predicate keeps."""
    return _solve(predicate, positive=True)


def _solve(predicate: Expr, *, positive: bool) -> Union:
    """As `solve`; of the negated predicate where not `positive`."""
    if "kv" not in variance(predicate):
        held = truth(predicate if positive else Apply("not", (predicate,)))
        return _tidied((Region(possible=held.possible, certain=held.certain),))
    match predicate:
        case Apply(op="not", args=(inner,)):
            return _solve(inner, positive=not positive)
        case Apply(op="and" | "or" as op, args=(a, b)):
            combine = _all_of if (op == "and") == positive else _any_of
            return combine(_solve(a, positive=positive), _solve(b, positive=positive))
        case Apply(op="where", args=(condition, a, b)):
            return _any_of(
                _all_of(_solve(condition, positive=True), _solve(a, positive=positive)),
                _all_of(_solve(condition, positive=False), _solve(b, positive=positive)),
            )
        case Apply(op="eq" | "ne" as op, args=(a, b)) if kind_of(a) is Kind.BOOL:
            same = (op == "eq") == positive
            return _any_of(
                _all_of(_solve(a, positive=True), _solve(b, positive=same)),
                _all_of(_solve(a, positive=False), _solve(b, positive=not same)),
            )
        case Apply(op=op, args=(a, b)) if op in _OPPOSITE and kind_of(a) is Kind.INT:
            return _solve_comparison(op if positive else _OPPOSITE[op], linear(a) - linear(b))
        case _:
            return (Region(residual=(predicate if positive else Apply("not", (predicate,)),)),)


_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def _all_of(a: Union, b: Union) -> Union:
    if len(a) * len(b) > MOST_ALTERNATIVES:
        a, b = (hull(a),), (hull(b),)
    return _tidied(tuple(x & y for x, y in product(a, b)))


def _any_of(a: Union, b: Union) -> Union:
    union = _tidied(a + b)
    return union if len(union) <= MOST_ALTERNATIVES else (hull(union),)


def _tidied(union: Union) -> Union:
    needed = (replace(region, lows=tuple(low for low in region.lows if low != _FROM_START)) for region in union)
    return tuple(region for region in dict.fromkeys(needed) if not region.is_empty)


def hull(union: Union) -> Region:
    """One region that holds all of `union`; without an end where that would take long to compute."""
    if not union:
        return Region(possible=FALSE, certain=FALSE)
    if len(union) == 1:
        return union[0]
    lows = dict.fromkeys(region.lows for region in union)
    highs = dict.fromkeys(region.highs for region in union)
    lo = least(*(greatest(*(low.some for low in ends)) for ends in lows)) if _is_short(lows) else None
    hi = greatest(*(least(*(high.some for high in ends)) for ends in highs)) if _is_short(highs) else None
    return Region(
        () if lo is None else (Limit(lo, None),),
        () if hi is None else (Limit(hi, None),),
        residual=tuple(dict.fromkeys(condition for region in union for condition in region.residual)),
        hull=True,
    )


def _is_short(ends: Collection[tuple[Limit, ...]]) -> bool:
    """Whether every region ends somewhere and there are few enough of those ends."""
    return all(ends) and sum(map(len, ends)) <= MOST_ALTERNATIVES


# --- comparisons -----------------------------------------------------------------------------------------------------


def _solve_comparison(op: str, difference: Linear) -> Union:
    """`difference` compared with 0 by `op`."""
    match op:
        case "eq" | "ne" if chosen_cell(difference) is not None:
            # Blocks that a table names may lie anywhere: a range that holds them all would say little.
            return (Region(residual=(Apply(op, (expr_of(difference), ZERO)),)),)
        case "eq":
            return _all_of(_solve_comparison("le", difference), _solve_comparison("ge", difference))
        case "ne":
            return _any_of(_solve_comparison("lt", difference), _solve_comparison("gt", difference))
        case _:
            sign, offset = ORDERS[op]
            return _solve_below(difference.times(sign).plus(offset))


def _solve_below(form: Linear) -> Union:
    """`form < 0`"""
    keyed = [(atom, c) for atom, c in form.terms if "kv" in variance(atom)]
    for atom, coefficient in keyed:
        match atom:
            case Apply(op="min" | "max" as op, args=(a, b)):
                # The greater of two lies below something if both do.
                combine = _all_of if (op == "max") == (coefficient > 0) else _any_of
                return combine(
                    _solve_below(form.replaced(atom, linear(a))),
                    _solve_below(form.replaced(atom, linear(b))),
                )
            case Apply(op="abs", args=(a,)):
                combine = _all_of if coefficient > 0 else _any_of
                return combine(
                    _solve_below(form.replaced(atom, linear(a))),
                    _solve_below(form.replaced(atom, linear(a).times(-1))),
                )
            case Apply(op="where", args=(condition, a, b)):
                return _any_of(
                    _all_of(
                        _solve(condition, positive=True),
                        _solve_below(form.replaced(atom, linear(a))),
                    ),
                    _all_of(
                        _solve(condition, positive=False),
                        _solve_below(form.replaced(atom, linear(b))),
                    ),
                )
            case _:
                pass
    if not keyed:
        return _solve(below(form), positive=True)
    region = _below(form, Limit(ZERO, ZERO))
    return (Region(residual=(below(form),)),) if region is None else _tidied((region,))


def _below(form: Linear, limit: Limit) -> Region | None:
    """`form < limit`, where kv_idx occurs in one atom of `form`; None where that cannot be solved."""
    split = _isolated(form)
    if split is None:
        return None
    atom, coefficient, lo, hi = split
    if coefficient > 0:
        # c * atom < limit - rest: atom < ceil((limit - rest) / c)
        return _atom_below(atom, _map(limit, lo, hi, lambda t, r: _ceiling(t - r, coefficient)))
    # -c * atom > rest - limit: atom >= floor((rest - limit) / -c) + 1
    return _atom_from(atom, _map(limit, lo, hi, lambda t, r: _floor(r - t, -coefficient).plus(1)))


def _from(form: Linear, limit: Limit) -> Region | None:
    """`form >= limit`, as `_below`."""
    split = _isolated(form)
    if split is None:
        return None
    atom, coefficient, lo, hi = split
    if coefficient > 0:
        return _atom_from(atom, _map(limit, hi, lo, lambda t, r: _ceiling(t - r, coefficient)))
    return _atom_below(atom, _map(limit, hi, lo, lambda t, r: _floor(r - t, -coefficient).plus(1)))


def _isolated(form: Linear) -> tuple[Expr, int, Linear, Linear] | None:
    """The one atom with kv_idx, its coefficient, and the bounds of all else over the queries of the tile."""
    keyed = [(atom, c) for atom, c in form.terms if "kv" in variance(atom)]
    if len(keyed) != 1:
        return None
    atom, coefficient = keyed[0]
    bounds = bounds_of_form(form.without(atom))
    if bounds is None or bounds[2] != TRUE:
        return None
    return atom, coefficient, bounds[0], bounds[1]


def _map(limit: Limit, for_some: Linear, for_every: Linear, f: Callable[[Linear, Linear], Linear]) -> Limit:
    every = None if limit.every is None else expr_of(f(linear(limit.every), for_every))
    return Limit(expr_of(f(linear(limit.some), for_some)), every)


_Relation: TypeAlias = Callable[[Linear, Limit], Region | None]


def _floor(form: Linear, divisor: int) -> Linear:
    return form if divisor == 1 else linear(Apply("floordiv", (expr_of(form), Constant(divisor))))


def _ceiling(form: Linear, divisor: int) -> Linear:
    return _floor(form.plus(divisor - 1), divisor)


def _atom_below(atom: Expr, limit: Limit) -> Region | None:
    """`atom < limit`"""
    match atom:
        case Index(name="kv_idx"):
            return Region(highs=(limit,))
        case Apply(op="floordiv", args=(dividend, divisor)):
            return _through_division(_below, dividend, divisor, limit)
        case _:
            return None


def _atom_from(atom: Expr, limit: Limit) -> Region | None:
    """`atom >= limit`"""
    match atom:
        case Index(name="kv_idx"):
            return Region(lows=(limit,))
        case Apply(op="floordiv", args=(dividend, divisor)):
            return _through_division(_from, dividend, divisor, limit)
        case _:
            return None


def _through_division(relation: _Relation, dividend: Expr, divisor: Expr, limit: Limit) -> Region | None:
    """`dividend // divisor` below (from) a limit is `dividend` below (from) limit * divisor, for a divisor above 0.

    Where a divisor of the call is not above 0, the region is all keys, and none for certain.
    """
    if varies_in_tile(divisor) or (isinstance(divisor, Constant) and divisor.value <= 0):
        return None
    region = relation(
        linear(dividend), Limit(_times(limit.some, divisor), limit.every and _times(limit.every, divisor))
    )
    if region is None or isinstance(divisor, Constant):
        return region
    forward = below(linear(divisor).times(-1))
    region = replace(
        region,
        lows=tuple(_mapped(low, lambda end: _given_positive(end, divisor)) for low in region.lows),
        highs=tuple(_mapped(high, lambda end: _given_positive(end, divisor)) for high in region.highs),
    )
    return replace(
        region,
        lows=tuple(_where(forward, low, Limit(ZERO, Size("N"))) for low in region.lows),
        highs=tuple(_where(forward, high, Limit(Size("N"), ZERO)) for high in region.highs),
    )


def _mapped(limit: Limit, f: Callable[[Expr], Expr]) -> Limit:
    return Limit(f(limit.some), None if limit.every is None else f(limit.every))


def _given_positive(expr: Expr, divisor: Expr) -> Expr:
    """`expr` where it is known that divisor > 0: quotients by it are in the order of their dividends."""
    expr = map_children(expr, lambda child: _given_positive(child, divisor))
    match expr:
        case Apply(op="min" | "max" as op, args=(Apply(op="floordiv") as x, Apply(op="floordiv") as y)):
            if not (x.args[1] == y.args[1] == divisor):
                return expr
            smaller, greater = (x, y) if never_positive(linear(x.args[0]) - linear(y.args[0])) else (y, x)
            if not never_positive(linear(smaller.args[0]) - linear(greater.args[0])):
                return expr
            return smaller if op == "min" else greater
        case _:
            return expr


def _where(condition: Expr, limit: Limit, otherwise: Limit) -> Limit:
    every = None if limit.every is None or otherwise.every is None else choice(condition, limit.every, otherwise.every)
    return Limit(choice(condition, limit.some, otherwise.some), every)


def _times(a: Expr, b: Expr) -> Expr:
    return canonical(Apply("mul", (a, b)))
