"""Numeric ranges of int expressions: which of them a kernel may compute in 32 bits.

The bounds are those that every call keeps: positions and sizes within 2**30, run-time scalars within 32 bits, loads
within their element type. All arithmetic is Python's, on exact integers; what may leave 64 bits has the range `ANY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple, assert_never

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
from attncc.ir.rewrite import kind_of, walk
from attncc.ir.torch_meaning import INT_LIMIT
from attncc.ir.types import DType, Kind


class Range(NamedTuple):
    """All integers from `lo` to `hi`, both included."""

    lo: int
    hi: int

    def within(self, other: Range) -> bool:
        return other.lo <= self.lo and self.hi <= other.hi


INT32 = Range(-(2**31), 2**31 - 1)
ANY = Range(-(2**63), 2**63 - 1)
BIT = Range(0, 1)

POSITION_LIMIT = 2**30
_COUNT = Range(0, POSITION_LIMIT - 1)
_POSITION = Range(-POSITION_LIMIT, POSITION_LIMIT - 1)

# Queries may stand before key 0 (M > N); differences of two positions still fit in 32 bits.
_INDEX: dict[IndexName, Range] = {
    "b": _COUNT,
    "h": _COUNT,
    "hkv": _COUNT,
    "q_row": _COUNT,
    "q_idx": _POSITION,
    "kv_idx": _COUNT,
    "d": _COUNT,
    "q_lo": _POSITION,
    "q_hi": _POSITION,
    "kv_lo": _COUNT,
    "kv_hi": _COUNT,
}

_ELEMENT: dict[DType, Range] = {DType.BOOL: BIT, DType.I32: INT32, DType.I64: ANY}

# Floats convert to ints within these bounds (`torch_meaning`).
_FROM_FLOAT = Range(-INT_LIMIT, INT_LIMIT)

_NO_DTYPES: Mapping[str, DType] = {}
_NO_VARIABLES: Mapping[str, Range] = {}


def int_range(
    expr: Expr, dtypes: Mapping[str, DType] = _NO_DTYPES, variables: Mapping[str, Range] = _NO_VARIABLES
) -> Range:
    """A range that holds every value of an int expression; 0 and 1 for a bool one.

    dtypes: element types of the captured tensors (64 bits for one that is absent); variables: ranges of the values
    that a plan has bound (`ANY` for one that is absent).
    """
    match expr:
        case Constant(value=value):
            return Range(int(value), int(value)) if isinstance(value, int) else ANY
        case Index(name=name):
            return _INDEX[name]
        case Size(name=name):
            return _POSITION if name == "q_offset" else Range(0, POSITION_LIMIT)
        case Parameter(kind=kind):
            return BIT if kind is Kind.BOOL else INT32
        case Load(tensor=tensor, kind=kind) | Summary(load=Load(tensor=tensor, kind=kind)):
            return BIT if kind is Kind.BOOL else _ELEMENT.get(dtypes.get(tensor, DType.I64), ANY)
        case Variable(name=name, kind=kind):
            return BIT if kind is Kind.BOOL else variables.get(name, ANY)
        case Apply(op="where", args=(condition, a, b)) if kind_of(expr) is Kind.INT:
            return _of_choice(condition, a, b, lambda arg: int_range(arg, dtypes, variables))
        case Apply(op=op, args=args):
            if kind_of(expr) is not Kind.INT:
                return BIT if kind_of(expr) is Kind.BOOL else ANY
            if op == "to_int" and kind_of(args[0]) is Kind.FLOAT:
                return _FROM_FLOAT
            rule = _RULES.get(op)
            if rule is None:
                return ANY
            result = rule(*(int_range(arg, dtypes, variables) for arg in args))
            return result if result.within(ANY) else ANY
        case Element() | Reduce() | Hole():
            return ANY
        case _:
            assert_never(expr)


def fits_int32(
    expr: Expr, dtypes: Mapping[str, DType] = _NO_DTYPES, variables: Mapping[str, Range] = _NO_VARIABLES
) -> bool:
    """Whether every int value computed on the way to `expr` lies within 32 bits. See `int_range` for the arguments."""
    return all(int_range(node, dtypes, variables).within(INT32) for node in walk(expr) if kind_of(node) is Kind.INT)


# --- choices ---------------------------------------------------------------------------------------------------------


def _of_choice(condition: Expr, a: Expr, b: Expr, range_of: Callable[[Expr], Range]) -> Range:
    """The range of `a if condition else b`, each within what the condition says of it."""
    ranges = (
        _narrowed(range_of(a), a, condition, True, range_of),
        _narrowed(range_of(b), b, condition, False, range_of),
    )
    possible = [r for r in ranges if r.lo <= r.hi]
    return _hull(*(end for r in possible or ranges for end in r))


def _narrowed(within: Range, expr: Expr, condition: Expr, holds: bool, range_of: Callable[[Expr], Range]) -> Range:
    """The values in `within` that `expr` may have where `condition` holds, or where it does not; none where lo > hi."""
    match condition:
        case Apply(op="not", args=(a,)):
            return _narrowed(within, expr, a, not holds, range_of)
        case Apply(op="and" | "or" as op, args=(a, b)) if (op == "and") is holds:
            return _narrowed(_narrowed(within, expr, a, holds, range_of), expr, b, holds, range_of)
        case Apply(op=op, args=(a, b)) if op in _OPPOSITE and kind_of(a) is Kind.INT and expr in (a, b):
            op = op if holds else _OPPOSITE[op]
            if expr == a:
                within = _beside(within, op, range_of(b))
            return _beside(within, _MIRRORED[op], range_of(a)) if expr == b else within
        case _:
            return within


_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


def _beside(x: Range, op: str, y: Range) -> Range:
    """The values x for which `x op y` may hold."""
    match op:
        case "lt" | "le":
            return Range(x.lo, min(x.hi, y.hi - (op == "lt")))
        case "gt" | "ge":
            return Range(max(x.lo, y.lo + (op == "gt")), x.hi)
        case "eq":
            return Range(max(x.lo, y.lo), min(x.hi, y.hi))
        case _:
            return x


# --- one rule per int operator ---------------------------------------------------------------------------------------


def _hull(*values: int) -> Range:
    return Range(min(values), max(values))


def _of_corners(f: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    """The rule of a function that is monotone in each argument: its extremes lie at corners."""

    def rule(a: Range, b: Range) -> Range:
        return _hull(*(f(x, y) for x, y in product(a, b)))

    return rule


def _divisors(b: Range) -> tuple[int, ...]:
    """The divisors in `b`, 0 apart, at which a quotient can be extreme."""
    return tuple(y for y in {b.lo, b.hi, -1, 1} if y != 0 and b.lo <= y <= b.hi)


def _floordiv(a: Range, b: Range) -> Range:
    by_zero = [0] if _holds_zero(b) else []
    return _hull(*(x // y for x in a for y in _divisors(b)), *by_zero)


def _mod(a: Range, b: Range) -> Range:
    if b.lo == b.hi != 0 and a.lo // b.lo == a.hi // b.lo:
        return _hull(a.lo % b.lo, a.hi % b.lo)
    return Range(min(0, b.lo + 1), max(0, b.hi - 1))


def _holds_zero(r: Range) -> bool:
    return r.lo <= 0 <= r.hi


def _pow(a: Range, b: Range) -> Range:
    if b.lo < 0 or b.hi > 64:
        return ANY
    largest = max(abs(a.lo), abs(a.hi)) ** b.hi
    return Range(0 if a.lo >= 0 else -largest, max(1, largest))


def _abs(a: Range) -> Range:
    return Range(0 if _holds_zero(a) else min(abs(a.lo), abs(a.hi)), max(abs(a.lo), abs(a.hi)))


def _sign(a: Range) -> Range:
    return Range((a.lo > 0) - (a.lo < 0), (a.hi > 0) - (a.hi < 0))


def _bits(a: Range, b: Range) -> Range:
    """Any bitwise operation stays within the signed width that holds both arguments."""
    width = max(x.bit_length() for x in (*a, *b))
    return Range(0 if a.lo >= 0 and b.lo >= 0 else -(2**width), 2**width - 1)


def _bit_and(a: Range, b: Range) -> Range:
    # A non-negative argument bounds the result from both sides.
    tops = [r.hi for r in (a, b) if r.lo >= 0]
    return Range(0, min(tops)) if tops else _bits(a, b)


def _clamp_count(count: int) -> int:
    return min(max(count, 0), 63)


def _shift(f: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    inner = _of_corners(f)

    def rule(a: Range, b: Range) -> Range:
        return inner(a, Range(_clamp_count(b.lo), _clamp_count(b.hi)))

    return rule


_RULES: dict[str, Callable[..., Range]] = {
    "neg": lambda a: Range(-a.hi, -a.lo),
    "add": _of_corners(lambda x, y: x + y),
    "sub": _of_corners(lambda x, y: x - y),
    "mul": _of_corners(lambda x, y: x * y),
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _pow,
    "min": _of_corners(min),
    "max": _of_corners(max),
    "abs": _abs,
    "sign": _sign,
    "relu": lambda a: Range(max(a.lo, 0), max(a.hi, 0)),
    "bit_and": _bit_and,
    "bit_or": _bits,
    "bit_xor": _bits,
    "bit_not": lambda a: Range(~a.hi, ~a.lo),
    "shl": _shift(lambda x, y: x << y),
    "shr": _shift(lambda x, y: x >> y),
    "popcount": lambda a: Range(0, max(x.bit_length() for x in a)),
    "bit_length": lambda a: Range(0, max(x.bit_length() for x in a)),
    "to_int": lambda a: a,  # of a bool
    "random_key": lambda _, __: Range(0, INT32.hi),
}
