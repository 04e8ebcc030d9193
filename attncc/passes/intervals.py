"""Bounds of an expression over a tile of queries and keys, as expressions over the tile's corners.

Before: an expression over coordinates, loads and parameters.
After:  its least and greatest value (for a bool: whether it holds for certain, and whether it is possible) over every
        q_idx in [q_lo, q_hi] and kv_idx in [kv_lo, kv_hi], over the corners, what is uniform in the tile, and
        `Summary` leaves.

The rules are those of the operator table. Three things are done here, because they look at more than the bounds of an
operator's arguments:
  * int expressions are bounded as linear forms and ints are compared by their difference, so that a coordinate that
    occurs twice is still one coordinate;
  * `x % s == r` asks whether the interval holds a number of that residue;
  * loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import assert_never

from attncc.ir.nodes import (
    Apply,
    Constant,
    Element,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    Size,
    Summary,
    Variable,
)
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import children, kind_of
from attncc.ir.types import Kind
from attncc.passes.algebra import (
    FALSE,
    TRUE,
    Linear,
    below,
    canonical,
    conjunction,
    disjunction,
    expr_of,
    greatest,
    least,
    linear,
    negation,
)
from attncc.passes.variance import variance

# Most cells of a table of blocks that a tile's bounds read along an axis that varies with keys alone (tiles of keys are
# long), along any other, and in all.
_CELLS_ALONG_KEYS, _CELLS_ELSEWHERE, _CELLS = 4, 3, 8


@dataclass(frozen=True, slots=True)
class Truth:
    """A tile's answer to a predicate: `certain` if it holds for every pair, not `possible` if for none."""

    certain: Expr
    possible: Expr


@dataclass(frozen=True, slots=True)
class Interval:
    """lo <= value <= hi at every pair of the tile, wherever `valid` holds; where not, nothing is known."""

    lo: Expr
    hi: Expr
    valid: Expr = TRUE

    @property
    def is_point(self) -> bool:
        return self.lo == self.hi and self.valid == TRUE


UNKNOWN_TRUTH = Interval(FALSE, TRUE)


def truth(predicate: Expr) -> Truth:
    """When a bool expression holds for all of a tile and when it may hold for some of it."""
    bounds = _bounds(canonical(predicate))
    assert bounds is not None, "a bool always has bounds"
    return Truth(bounds.lo, bounds.hi)


def interval(expr: Expr) -> Interval | None:
    """Bounds of an int or float expression; None where nothing is known of it."""
    return _bounds(canonical(expr))


def varies_in_tile(expr: Expr) -> bool:
    """Whether `expr` may differ between two pairs of a tile."""
    return not variance(expr).isdisjoint({"q", "kv"})


def _bounds(expr: Expr) -> Interval | None:
    """`interval` of a canonical expression."""
    if not varies_in_tile(expr):
        return Interval(expr, expr)
    if kind_of(expr) is Kind.INT:
        form = linear(expr)
        if form != Linear(((expr, 1),)):
            return _bounds_of_sum(form)
    match expr:
        case Index(name="q_idx"):
            return Interval(Index("q_lo"), Index("q_hi"))
        case Index(name="kv_idx"):
            return Interval(Index("kv_lo"), Index("kv_hi"))
        case Load():
            return _bounds_of_load(expr)
        case Apply():
            return _bounds_of_operation(expr)
        case Element() | Reduce() | Hole() | Summary() | Variable():
            return UNKNOWN_TRUTH if kind_of(expr) is Kind.BOOL else None
        case Index() | Constant() | Size() | Parameter():
            raise AssertionError(f"uniform within a tile: {expr}")
        case _:
            assert_never(expr)


def bounds_of_form(form: Linear) -> tuple[Linear, Linear, Expr] | None:
    """Least and greatest value of a canonical linear form as linear forms, and where they are valid."""
    lo = hi = Linear((), form.constant)
    valid: list[Expr] = []
    for atom, coefficient in form.terms:
        bounds = _bounds(atom)
        if bounds is None:
            return None
        ends = linear(bounds.lo).times(coefficient), linear(bounds.hi).times(coefficient)
        lo += ends[0] if coefficient > 0 else ends[1]
        hi += ends[1] if coefficient > 0 else ends[0]
        valid.append(bounds.valid)
    return lo, hi, conjunction(*valid)


def _bounds_of_sum(form: Linear) -> Interval | None:
    bounds = bounds_of_form(form)
    if bounds is None:
        return None
    lo, hi, valid = bounds
    return Interval(expr_of(lo), expr_of(hi), valid)


# --- operations ------------------------------------------------------------------------------------------------------


def _bounds_of_operation(expr: Apply) -> Interval | None:
    if expr.op in _COMPARISONS and kind_of(expr.args[0]) is Kind.INT:
        return _bounds_of_comparison(expr)
    arguments = [_bounds(arg) for arg in expr.args]
    is_bool = kind_of(expr) is Kind.BOOL
    nothing = UNKNOWN_TRUTH if is_bool else None
    if any(argument is None for argument in arguments):
        return nothing
    known = [argument for argument in arguments if argument is not None]
    pairs = tuple((argument.lo, argument.hi) for argument in known)
    bounds = OPERATORS[expr.op].bounds(kind_of(expr.args[-1]), pairs)
    if bounds is None:
        return nothing
    lo, hi = bounds
    valid = conjunction(*(argument.valid for argument in known))
    return _where_valid(_tidy(lo), _tidy(hi), valid) if is_bool else Interval(_tidy(lo), _tidy(hi), valid)


def _where_valid(certain: Expr, possible: Expr, valid: Expr) -> Interval:
    """The truth of a predicate whose bounds hold only where `valid`."""
    return Interval(conjunction(valid, certain), disjunction(negation(valid), possible))


def _tidy(expr: Expr) -> Expr:
    """`expr` rebuilt by constructors that fold, as the rules of the table do not."""
    match expr:
        case Apply(op="and", args=args):
            return conjunction(*map(_tidy, args))
        case Apply(op="or", args=args):
            return disjunction(*map(_tidy, args))
        case Apply(op="not", args=(a,)):
            return negation(_tidy(a))
        case Apply(op="min", args=args) if kind_of(expr) is Kind.INT:
            return least(*map(_tidy, args))
        case Apply(op="max", args=args) if kind_of(expr) is Kind.INT:
            return greatest(*map(_tidy, args))
        case Apply(op=op, args=args) if op in _COMPARISONS and kind_of(args[0]) is Kind.INT:
            return _compared(op, args[0], args[1])
        case _:
            return canonical(expr)


# How an order of two ints follows from their difference d: sign * d + offset < 0.
ORDERS = {"lt": (1, 0), "le": (1, -1), "gt": (-1, 0), "ge": (-1, -1)}
_COMPARISONS = {*ORDERS, "eq", "ne"}


def _compared(op: str, a: Expr, b: Expr) -> Expr:
    """A comparison of two ints, tidied."""
    difference = linear(a) - linear(b)
    if op in ORDERS:
        sign, offset = ORDERS[op]
        return below(difference.times(sign).plus(offset))
    equal = _equal_to_zero(difference)
    return equal if op == "eq" else negation(equal)


def _equal_to_zero(form: Linear) -> Expr:
    if not form.terms:
        return Constant(form.constant == 0)
    added = Linear(tuple(term for term in form.terms if term[1] > 0), max(form.constant, 0))
    taken = Linear(tuple((atom, -c) for atom, c in form.terms if c < 0), max(-form.constant, 0))
    return Apply("eq", (expr_of(added), expr_of(taken)))


def _bounds_of_comparison(expr: Apply) -> Interval:
    """Two ints compared by the bounds of their difference."""
    a, b = expr.args
    difference = linear(a) - linear(b)
    if expr.op in ORDERS:
        sign, offset = ORDERS[expr.op]
        return _bounds_of_below(difference.times(sign).plus(offset))
    equal = _bounds_of_residue(difference) or _bounds_of_equality(difference)
    return equal if expr.op == "eq" else Interval(negation(equal.hi), negation(equal.lo))


def _bounds_of_below(form: Linear) -> Interval:
    bounds = bounds_of_form(form)
    if bounds is None:
        return UNKNOWN_TRUTH
    lo, hi, valid = bounds
    return _where_valid(below(hi), below(lo), valid)


def _bounds_of_equality(form: Linear) -> Interval:
    chosen = chosen_cell(form)
    if chosen is not None and (found := _cells_of(chosen)) is not None:
        # One of a few values is not the same as one between the least and the greatest.
        cells, valid = found
        answers = [_bounds_of_equality(form.replaced(chosen, linear(cell))) for cell in cells]
        return _where_valid(conjunction(*(a.lo for a in answers)), disjunction(*(a.hi for a in answers)), valid)
    bounds = bounds_of_form(form)
    if bounds is None:
        return UNKNOWN_TRUTH
    lo, hi, valid = bounds
    certain = _equal_to_zero(lo) if lo == hi else conjunction(_not_above(hi), _not_above(lo.times(-1)))
    possible = conjunction(_not_above(lo), _not_above(hi.times(-1)))
    return _where_valid(certain, possible, valid)


def _not_above(form: Linear) -> Expr:
    """`form <= 0`"""
    return below(form.plus(-1))


def _bounds_of_residue(form: Linear) -> Interval | None:
    """`form == 0` where form is x % s - r, with s uniform, and r = 0 or 0 <= r < s constants; None for any other.

    Possible: the greatest number up to the upper bound of x that is r modulo s is not below the lower bound. (A
    remainder by s <= 0 is never positive and makes that true.) Certain: x is one number, or s is 1.
    """
    match [(atom, c) for atom, c in form.terms if varies_in_tile(atom)]:
        case [(Apply(op="mod", args=(x, s)) as atom, (1 | -1) as sign)] if not varies_in_tile(s):
            rest = form.without(atom).times(-sign)
        case _:
            return None
    bounds = bounds_of_form(linear(x))
    is_residue = isinstance(s, Constant) and 0 <= rest.constant < s.value
    if bounds is None or rest.terms or not (rest.constant == 0 or is_residue):
        return None
    lo, hi, valid = bounds
    beyond = linear(Apply("mod", (expr_of(hi - rest), s)))
    possible = _not_above(beyond - (hi - lo))
    one_number = disjunction(_equal_to_zero(hi - lo), _compared("eq", s, Constant(1)))
    certain = conjunction(one_number, _equal_to_zero(linear(Apply("mod", (expr_of(lo), s))) - rest))
    return _where_valid(certain, possible, valid)


# --- loads -----------------------------------------------------------------------------------------------------------


def _bounds_of_load(load: Load) -> Interval | None:
    varies = variance(load)
    if "q" not in varies:
        return Interval(Summary("min", load, "kv"), Summary("max", load, "kv"))
    if "kv" not in varies:
        return Interval(Summary("min", load, "q"), Summary("max", load, "q"))
    bounds = _bounds_of_cells(load)
    if bounds is None or load.kind is not Kind.BOOL:
        return UNKNOWN_TRUTH if load.kind is Kind.BOOL else bounds
    return _where_valid(bounds.lo, bounds.hi, bounds.valid)


def _bounds_of_cells(load: Load) -> Interval | None:
    """Of a load from a table of blocks: the extremes of the few cells that the tile touches.

    None for floats: the smaller of two would lose a NaN on some targets.
    """
    found = None if load.kind is Kind.FLOAT else _cells_of(load)
    if found is None:
        return None
    cells, valid = found
    if load.kind is Kind.BOOL:
        return Interval(conjunction(*cells), disjunction(*cells), valid)
    return Interval(least(*cells), greatest(*cells), valid)


def _cells_of(load: Load) -> tuple[list[Load], Expr] | None:
    """All that a load from a table of blocks may read in a tile, and whether the tile touches no more than that.

    None for a table that is finer than tiles are.
    """
    spans = [_bounds(index) for index in load.indices]
    counts = [_cells_along(index) for index in load.indices]
    if any(span is None for span in spans) or 0 in counts:
        return None
    while prod(counts) > _CELLS:
        # Two cells of queries before four of keys: tiles are shorter than they are long.
        counts[counts.index(_CELLS_ELSEWHERE if _CELLS_ELSEWHERE in counts else max(counts))] -= 1
    known = [span for span in spans if span is not None]
    choices: list[list[Expr]] = []
    valid: list[Expr] = []
    for span, count in zip(known, counts, strict=True):
        if span.is_point:
            choices.append([span.lo])
            continue
        # The last cell repeats where the tile touches fewer.
        following = [least(expr_of(linear(span.lo).plus(i)), span.hi) for i in range(1, count)]
        choices.append([span.lo, *following])
        valid += [span.valid, below(linear(span.hi) - linear(span.lo).plus(count))]
    return [Load(load.tensor, indices, load.kind) for indices in product(*choices)], conjunction(*valid)


def chosen_cell(form: Linear) -> Load | None:
    """The first int that `form` reads from a table with one entry per block of queries."""
    for atom, _ in form.terms:
        match atom:
            case Load(indices=indices, kind=Kind.INT) if variance(atom) >= {"q"} and "kv" not in variance(atom):
                if all(map(_cells_along, indices)):
                    return atom
            case _:
                pass
    return None


def _cells_along(index: Expr) -> int:
    """How many cells to read along an axis; 0 for an index that changes from one query or key to the next."""
    varies = variance(index) & {"q", "kv"}
    if not varies:
        return 1
    if not _is_coarse(index):
        return 0
    return _CELLS_ALONG_KEYS if varies == frozenset({"kv"}) else _CELLS_ELSEWHERE


def _is_coarse(index: Expr) -> bool:
    """Whether an index varies with positions by way of a division only."""
    match index:
        case Index():
            return not varies_in_tile(index)
        case Apply(op="floordiv" | "shr", args=(_, divisor)):
            return not varies_in_tile(divisor)
        case _:
            return all(map(_is_coarse, children(index)))
