"""Rewriting rules for numbers, one per operator: the arguments, simplified already, to something smaller, or None.

Ints are exact, so every law of arithmetic holds of them. Of floats only what holds for every value does: NaN,
infinities and the sign of zero included; so no `x + 0.0`, no `x * 0.0`, no `x == x`, no `not (x < y)`. The exceptions
are powers with constant operands, which may differ from the library's `pow` in the last place.

A rule may drop a read (`x * 0`), never add one or make one that was not active (see `attncc.reference`) so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attncc.ir.nodes import Apply, Constant, Expr
from attncc.ir.rewrite import kind_of
from attncc.ir.types import Kind

Rule = Callable[..., Expr | None]

_ZERO = Constant(0)
_LARGE = 2**31


def apply(name: str, *args: Expr) -> Apply:
    """An operator applied."""
    return Apply(name, args)


def int_value(expr: Expr) -> int | None:
    """The value of an int constant; None where it is so large that combining two could leave 64 bits."""
    match expr:
        case Constant(value=bool()):
            return None
        case Constant(value=int() as value) if abs(value) <= _LARGE:
            return value
        case _:
            return None


def _float(expr: Expr) -> float | None:
    """The value of a float constant."""
    match expr:
        case Constant(value=float() as value):
            return value
        case _:
            return None


def _is_zero(expr: Expr) -> bool:
    return int_value(expr) == 0


def split(expr: Expr) -> tuple[Expr, int]:
    """An int expression as (rest, constant) that add up to it."""
    match expr:
        case Apply(op="add", args=(x, c)) if (value := int_value(c)) is not None:
            return x, value
        case Apply(op="add", args=(c, x)) if (value := int_value(c)) is not None:
            return x, value
        case Apply(op="sub", args=(x, c)) if (value := int_value(c)) is not None:
            return x, -value
        case _:
            return expr, 0


def plus(expr: Expr, constant: int) -> Expr:
    """`expr` + `constant`, written as a person would."""
    if constant == 0:
        return expr
    return apply("add", expr, Constant(constant)) if constant > 0 else apply("sub", expr, Constant(-constant))


# Arithmetic.


def _neg(x: Expr) -> Expr | None:
    match x:
        case Apply(op="neg", args=(inner,)):
            return inner
        case Apply(op="sub", args=(a, b)) if kind_of(x) is Kind.INT:
            return apply("sub", b, a)
        case _:
            return None


def _add(x: Expr, y: Expr) -> Expr | None:
    match x, y:
        case _, Apply(op="neg", args=(inner,)):
            return apply("sub", x, inner)
        case Apply(op="neg", args=(inner,)), _:
            return apply("sub", y, inner)
        case _ if kind_of(y) is Kind.FLOAT:
            return None
        case Apply(op="sub", args=(a, b)), _ if b == y:
            return a
        case _, Apply(op="sub", args=(a, b)) if b == x:
            return a
        case _:
            return _gather_constants(x, y, 1)


def _sub(x: Expr, y: Expr) -> Expr | None:
    match x, y:
        case _, Apply(op="neg", args=(inner,)):
            return apply("add", x, inner)
        case _, Constant(value=float() as zero) if repr(zero) == "0.0":
            return x
        case _ if kind_of(y) is Kind.FLOAT:
            return None
        case _ if x == y:
            return _ZERO
        case _ if _is_zero(x):
            return apply("neg", y)
        case Apply(op="add", args=(a, b)), _ if y in (a, b):
            return b if a == y else a
        case _, Apply(op="sub", args=(a, b)) if a == x:
            return b
        case _:
            return _gather_constants(x, y, -1)


def _gather_constants(x: Expr, y: Expr, sign: int) -> Expr | None:
    """(x' + c) ± (y' + d) as (x' ± y') + (c ± d), where that saves an addition."""
    c, d = int_value(x), int_value(y)
    (a, inner), (b, other) = split(x), split(y)
    if d is not None and (inner != 0 or d <= 0):
        return plus(a, inner + sign * d)
    if c is not None and sign > 0 and (other != 0 or c <= 0):
        return plus(b, c + other)
    if c is not None and sign < 0 and other != 0:
        return apply("sub", Constant(c - other), b)
    if inner != 0 and other != 0:
        return plus(apply("add" if sign > 0 else "sub", a, b), inner + sign * other)
    return None


def _mul(x: Expr, y: Expr) -> Expr | None:
    for factor, rest in ((x, y), (y, x)):
        match int_value(factor), _float(factor):
            case (0, _):
                return _ZERO
            case (1, _) | (_, 1.0):
                return rest
            case (-1, _) | (_, -1.0):
                return apply("neg", rest)
            case (int() as outer, _):
                match rest:
                    case Apply(op="mul", args=(a, b)) if (inner := int_value(b)) is not None:
                        return apply("mul", a, Constant(inner * outer))
                    case Apply(op="mul", args=(a, b)) if (inner := int_value(a)) is not None:
                        return apply("mul", b, Constant(inner * outer))
                    case _:
                        pass
            case _:
                pass
    return None


def _div(x: Expr, y: Expr) -> Expr | None:
    """Division by a power of two is a multiplication, exactly, as long as its reciprocal is an ordinary f32."""
    divisor = _float(y)
    if divisor is None or not 2.0**-60 <= abs(divisor) <= 2.0**60:
        return None
    mantissa, _ = math.frexp(divisor)
    return apply("mul", x, Constant(1.0 / divisor)) if abs(mantissa) == 0.5 else None


def _pow(x: Expr, y: Expr) -> Expr | None:
    match x, y:
        case _, Constant(value=0.0):
            return Constant(1.0)
        case _, Constant(value=1.0):
            return x
        case _, Constant(value=2.0):
            return apply("mul", x, x)
        case _, Constant(value=3.0):
            return apply("mul", apply("mul", x, x), x)
        case _, Constant(value=4.0):
            return apply("pow", apply("mul", x, x), Constant(2.0))
        case _, Constant(value=-1.0):
            return apply("div", Constant(1.0), x)
        case Constant(value=2.0), _:
            return apply("exp2", y)
        case _:
            return None


def _floordiv(x: Expr, y: Expr) -> Expr | None:
    match x, int_value(y):
        case _, 1:
            return x
        case _, -1:
            return apply("neg", x)
        case Apply(op="mul", args=(a, b)), int(c) if c != 0 and y in (a, b):
            return a if b == y else b
        case Apply(op="floordiv", args=(a, b)), int(c) if c > 0 and (int_value(b) or 0) > 0:
            return apply("floordiv", a, Constant((int_value(b) or 1) * c))
        case _ if _is_zero(x):
            return _ZERO
        case _:
            return None


def _mod(x: Expr, y: Expr) -> Expr | None:
    match x, int_value(y):
        case _, 1 | -1:
            return _ZERO
        case Apply(op="mul", args=(a, b)), int() if y in (a, b):
            return _ZERO
        case Apply(op="mod", args=(_, b)), _ if b == y:
            return x
        case _ if _is_zero(x):
            return _ZERO
        case _:
            return None


def _abs(x: Expr) -> Expr | None:
    match x:
        case Apply(op="abs"):
            return x
        case Apply(op="neg", args=(inner,)):
            return apply("abs", inner)
        case Apply(op="sub", args=(Constant(value=0), inner)):
            return apply("abs", inner)
        case _:
            return None


def _extreme(name: str) -> Rule:
    """`min` or `max`. Their laws hold of NaN too, which both return whichever side it is on."""
    other = "max" if name == "min" else "min"

    def rule(x: Expr, y: Expr) -> Expr | None:
        match x, y:
            case _ if x == y:
                return x
            case Apply(op=op, args=args), _ if op == name and y in args:
                return x
            case _, Apply(op=op, args=args) if op == name and x in args:
                return y
            case Apply(op=op, args=(a, Constant() as c)), Constant() if op == name:
                return apply(name, a, apply(name, c, y))
            case Apply(op=op, args=args), _ if op == other and y in args and kind_of(y) is Kind.INT:
                return y
            case _, Apply(op=op, args=args) if op == other and x in args and kind_of(x) is Kind.INT:
                return x
            case _:
                return None

    return rule


# Bits.


def _bit_and(x: Expr, y: Expr) -> Expr | None:
    if x == y or int_value(y) == -1:
        return x
    if int_value(x) == -1:
        return y
    return _ZERO if _is_zero(x) or _is_zero(y) else None


def _bit_or(x: Expr, y: Expr) -> Expr | None:
    if x == y or _is_zero(y):
        return x
    return y if _is_zero(x) else None


def _bit_xor(x: Expr, y: Expr) -> Expr | None:
    if x == y:
        return _ZERO
    if _is_zero(y):
        return x
    return y if _is_zero(x) else None


def _bit_not(x: Expr) -> Expr | None:
    match x:
        case Apply(op="bit_not", args=(inner,)):
            return inner
        case _:
            return None


def _shift(x: Expr, count: Expr) -> Expr | None:
    return x if _is_zero(count) or _is_zero(x) else None


ARITHMETIC: dict[str, Rule] = {
    "neg": _neg,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "floordiv": _floordiv,
    "mod": _mod,
    "abs": _abs,
    "min": _extreme("min"),
    "max": _extreme("max"),
    "bit_and": _bit_and,
    "bit_or": _bit_or,
    "bit_xor": _bit_xor,
    "bit_not": _bit_not,
    "shl": _shift,
    "shr": _shift,
}
