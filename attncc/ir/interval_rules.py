"""Interval rules: bounds of an operator's result from bounds of its arguments, as expressions.

A bound pair is (least, greatest) for ints and floats and (certain, possible) for bools; a pair of equal expressions
is a point. Rules see arguments that all have bounds; `None` means that nothing is known of the result. Points need
no rule (`Operator.bounds`).

Soundness in floating point. Bounds are computed at run time with the rounding of the elements themselves, so a rule
may use only operations whose rounding is monotone: add, subtract, multiply, negate, convert, floor, ceil, round. Every
target approximates exp, division and the like as it sees fit; such operators have no rule. NaN must not slip through:
  * a NaN in a bound makes comparisons uncertain: `certain` compares, `possible` denies the opposite comparison;
  * an element may be NaN where its bounds are (-inf, inf), as 0 * inf is within [-1, 1] * inf. Rules that would give
    such an interval a finite end (min, max, abs, relu, sign) hold for ints alone, and `certain` of a float `<=`
    compares strictly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from attncc.ir.nodes import Apply, Constant, Expr
from attncc.ir.torch_meaning import INT_LIMIT

Bounds: TypeAlias = tuple[Expr, Expr]
IntervalRule: TypeAlias = Callable[..., Bounds | None]

_ZERO = Constant(0)


def _op(name: str, *args: Expr) -> Expr:
    return Apply(name, args)


def _not(a: Expr) -> Expr:
    return _op("not", a)


def _both(a: Expr, b: Expr) -> Expr:
    return _op("and", a, b)


def _either(a: Expr, b: Expr) -> Expr:
    return _op("or", a, b)


def is_point(bounds: Bounds) -> bool:
    """Whether the value is known exactly: the same everywhere in the tile."""
    return bounds[0] == bounds[1]


def increasing(name: str) -> IntervalRule:
    """A function that rises, or stays, with each of its arguments."""

    def rule(*arguments: Bounds) -> Bounds:
        return _op(name, *(low for low, _ in arguments)), _op(name, *(high for _, high in arguments))

    return rule


def falling(name: str) -> IntervalRule:
    """A function of one argument that falls, or stays, as it grows."""

    def rule(a: Bounds) -> Bounds:
        return _op(name, a[1]), _op(name, a[0])

    return rule


# Arithmetic.


def sub(a: Bounds, b: Bounds) -> Bounds:
    return _op("sub", a[0], b[1]), _op("sub", a[1], b[0])


def int_mul(a: Bounds, b: Bounds) -> Bounds:
    """The least and the greatest of the four products of ends; of two where one factor is a point."""
    if is_point(a) or is_point(b):
        p, q = _op("mul", a[0], b[0]), _op("mul", a[1], b[1])
        return _op("min", p, q), _op("max", p, q)
    p, q = _op("mul", a[0], b[0]), _op("mul", a[0], b[1])
    r, s = _op("mul", a[1], b[0]), _op("mul", a[1], b[1])
    return _op("min", _op("min", p, q), _op("min", r, s)), _op("max", _op("max", p, q), _op("max", r, s))


def float_mul(a: Bounds, b: Bounds) -> Bounds | None:
    """By a point, whose sign picks the end. (`min` of products would lose a NaN on some targets.)"""
    if is_point(a):
        a, b = b, a
    if not is_point(b):
        return None
    factor = b[0]
    low, high = _op("mul", a[0], factor), _op("mul", a[1], factor)
    if isinstance(factor, Constant) and factor.value != 0:
        return (low, high) if factor.value > 0 else (high, low)
    # 0 * inf: a NaN at one end only would go unseen at the other.
    flat = _op("add", low, high)
    rising, falls = _op("gt", factor, Constant(0.0)), _op("lt", factor, Constant(0.0))
    return (
        _op("where", rising, low, _op("where", falls, high, flat)),
        _op("where", rising, high, _op("where", falls, low, flat)),
    )


def floordiv(a: Bounds, b: Bounds) -> Bounds | None:
    """By a point: monotone in the dividend, rising or falling with the divisor's sign."""
    if not is_point(b):
        return None
    p, q = _op("floordiv", a[0], b[0]), _op("floordiv", a[1], b[0])
    if isinstance(b[0], Constant):
        return (p, q) if b[0].value > 0 else (q, p)
    return _op("min", p, q), _op("max", p, q)


def mod(a: Bounds, b: Bounds) -> Bounds | None:
    """By a point n: within one run of quotients a line, else anything from 0 to n (exclusive)."""
    if not is_point(b):
        return None
    n = b[0]
    low = _op("min", _ZERO, _op("add", n, Constant(1)))
    high = _op("max", _ZERO, _op("sub", n, Constant(1)))
    one_run = _op("eq", _op("floordiv", a[0], n), _op("floordiv", a[1], n))
    return _op("where", one_run, _op("mod", a[0], n), low), _op("where", one_run, _op("mod", a[1], n), high)


def absolute(a: Bounds) -> Bounds:
    low = _op("max", _ZERO, _op("max", a[0], _op("neg", a[1])))
    return low, _op("max", a[1], _op("neg", a[0]))


def shift(name: str) -> IntervalRule:
    """By a point: multiplication or floor division by a power of two."""

    def rule(a: Bounds, count: Bounds) -> Bounds | None:
        return (_op(name, a[0], count[0]), _op(name, a[1], count[0])) if is_point(count) else None

    return rule


def bit_and(a: Bounds, b: Bounds) -> Bounds | None:
    """With a constant mask m >= 0: from 0 to m."""
    for bounds in (a, b):
        match bounds[0]:
            case Constant(value=int() as mask) if is_point(bounds) and mask >= 0:
                return _ZERO, Constant(mask)
            case _:
                pass
    return None


def float_to_int(a: Bounds) -> Bounds:
    """Rises with the number. A NaN becomes 0, so bounds that do not compare say nothing."""
    ordered = _op("le", a[0], a[1])
    low = _op("where", ordered, _op("to_int", a[0]), Constant(-INT_LIMIT))
    high = _op("where", ordered, _op("to_int", a[1]), Constant(INT_LIMIT))
    return low, high


# Comparisons.


def int_lt(a: Bounds, b: Bounds) -> Bounds:
    return _op("lt", a[1], b[0]), _op("lt", a[0], b[1])


def int_le(a: Bounds, b: Bounds) -> Bounds:
    return _op("le", a[1], b[0]), _op("le", a[0], b[1])


def float_lt(a: Bounds, b: Bounds) -> Bounds:
    return _op("lt", a[1], b[0]), _not(_op("ge", a[0], b[1]))


def float_le(a: Bounds, b: Bounds) -> Bounds:
    return _op("lt", a[1], b[0]), _not(_op("gt", a[0], b[1]))


def flipped(rule: IntervalRule) -> IntervalRule:
    """The rule of a comparison read from right to left."""
    return lambda a, b: rule(b, a)


def number_eq(a: Bounds, b: Bounds) -> Bounds:
    """Equal for certain only as two equal points; apart for certain where one interval ends before the other begins."""
    certain = _both(_op("eq", a[0], b[1]), _op("eq", a[1], b[0]))
    apart = _either(_op("lt", a[1], b[0]), _op("lt", b[1], a[0]))
    return certain, _not(apart)


def bool_eq(a: Bounds, b: Bounds) -> Bounds:
    certain = _either(_both(a[0], b[0]), _both(_not(a[1]), _not(b[1])))
    possible = _either(_both(a[1], b[1]), _both(_not(a[0]), _not(b[0])))
    return certain, possible


def negated(rule: IntervalRule) -> IntervalRule:
    """The rule of the opposite predicate."""

    def opposite(*arguments: Bounds) -> Bounds | None:
        bounds = rule(*arguments)
        return None if bounds is None else (_not(bounds[1]), _not(bounds[0]))

    return opposite


def not_(a: Bounds) -> Bounds:
    return _not(a[1]), _not(a[0])


# Choice.


def bool_where(c: Bounds, x: Bounds, y: Bounds) -> Bounds:
    certain = _either(_both(x[0], y[0]), _either(_both(c[0], x[0]), _both(_not(c[1]), y[0])))
    possible = _either(_both(c[1], x[1]), _both(_not(c[0]), y[1]))
    return certain, possible


def int_where(c: Bounds, x: Bounds, y: Bounds) -> Bounds:
    if is_point(c):
        return _op("where", c[0], x[0], y[0]), _op("where", c[0], x[1], y[1])
    certain, possible = c
    low = _op("where", certain, x[0], _op("where", possible, _op("min", x[0], y[0]), y[0]))
    high = _op("where", certain, x[1], _op("where", possible, _op("max", x[1], y[1]), y[1]))
    return low, high


def float_where(c: Bounds, x: Bounds, y: Bounds) -> Bounds | None:
    """Where the condition is a point. (`min` of the branches would lose a NaN on some targets.)"""
    return int_where(c, x, y) if is_point(c) else None
