"""Rewriting rules, one function per operator: the arguments, simplified already, to something smaller, or None.

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

TRUE, FALSE = Constant(True), Constant(False)
_ZERO = Constant(0)
_LARGE = 2**31

# Of ints; of floats only those between `eq` and `ne`.
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def _op(name: str, *args: Expr) -> Apply:
    return Apply(name, args)


def _int(expr: Expr) -> int | None:
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
    return _int(expr) == 0


def _split(expr: Expr) -> tuple[Expr, int]:
    """An int expression as (rest, constant) that add up to it."""
    match expr:
        case Apply(op="add", args=(x, c)) if (value := _int(c)) is not None:
            return x, value
        case Apply(op="add", args=(c, x)) if (value := _int(c)) is not None:
            return x, value
        case Apply(op="sub", args=(x, c)) if (value := _int(c)) is not None:
            return x, -value
        case _:
            return expr, 0


def _plus(expr: Expr, constant: int) -> Expr:
    """`expr` + `constant`, written as a person would."""
    if constant == 0:
        return expr
    return _op("add", expr, Constant(constant)) if constant > 0 else _op("sub", expr, Constant(-constant))


# Arithmetic.


def _neg(x: Expr) -> Expr | None:
    match x:
        case Apply(op="neg", args=(inner,)):
            return inner
        case Apply(op="sub", args=(a, b)) if kind_of(x) is Kind.INT:
            return _op("sub", b, a)
        case _:
            return None


def _add(x: Expr, y: Expr) -> Expr | None:
    match x, y:
        case _, Apply(op="neg", args=(inner,)):
            return _op("sub", x, inner)
        case Apply(op="neg", args=(inner,)), _:
            return _op("sub", y, inner)
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
            return _op("add", x, inner)
        case _, Constant(value=float() as zero) if repr(zero) == "0.0":
            return x
        case _ if kind_of(y) is Kind.FLOAT:
            return None
        case _ if x == y:
            return _ZERO
        case _ if _is_zero(x):
            return _op("neg", y)
        case Apply(op="add", args=(a, b)), _ if y in (a, b):
            return b if a == y else a
        case _, Apply(op="sub", args=(a, b)) if a == x:
            return b
        case _:
            return _gather_constants(x, y, -1)


def _gather_constants(x: Expr, y: Expr, sign: int) -> Expr | None:
    """(x' + c) ± (y' + d) as (x' ± y') + (c ± d), where that saves an addition."""
    c, d = _int(x), _int(y)
    (a, inner), (b, other) = _split(x), _split(y)
    if d is not None and (inner != 0 or d <= 0):
        return _plus(a, inner + sign * d)
    if c is not None and sign > 0 and (other != 0 or c <= 0):
        return _plus(b, c + other)
    if c is not None and sign < 0 and other != 0:
        return _op("sub", Constant(c - other), b)
    if inner != 0 and other != 0:
        return _plus(_op("add" if sign > 0 else "sub", a, b), inner + sign * other)
    return None


def _mul(x: Expr, y: Expr) -> Expr | None:
    for factor, rest in ((x, y), (y, x)):
        match _int(factor), _float(factor):
            case (0, _):
                return _ZERO
            case (1, _) | (_, 1.0):
                return rest
            case (-1, _) | (_, -1.0):
                return _op("neg", rest)
            case (int() as outer, _):
                match rest:
                    case Apply(op="mul", args=(a, b)) if (inner := _int(b)) is not None:
                        return _op("mul", a, Constant(inner * outer))
                    case Apply(op="mul", args=(a, b)) if (inner := _int(a)) is not None:
                        return _op("mul", b, Constant(inner * outer))
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
    return _op("mul", x, Constant(1.0 / divisor)) if abs(mantissa) == 0.5 else None


def _pow(x: Expr, y: Expr) -> Expr | None:
    match x, y:
        case _, Constant(value=0.0):
            return Constant(1.0)
        case _, Constant(value=1.0):
            return x
        case _, Constant(value=2.0):
            return _op("mul", x, x)
        case _, Constant(value=3.0):
            return _op("mul", _op("mul", x, x), x)
        case _, Constant(value=4.0):
            return _op("pow", _op("mul", x, x), Constant(2.0))
        case _, Constant(value=-1.0):
            return _op("div", Constant(1.0), x)
        case Constant(value=2.0), _:
            return _op("exp2", y)
        case _:
            return None


def _floordiv(x: Expr, y: Expr) -> Expr | None:
    match x, _int(y):
        case _, 1:
            return x
        case _, -1:
            return _op("neg", x)
        case Apply(op="mul", args=(a, b)), int(c) if c != 0 and y in (a, b):
            return a if b == y else b
        case Apply(op="floordiv", args=(a, b)), int(c) if c > 0 and (_int(b) or 0) > 0:
            return _op("floordiv", a, Constant((_int(b) or 1) * c))
        case _ if _is_zero(x):
            return _ZERO
        case _:
            return None


def _mod(x: Expr, y: Expr) -> Expr | None:
    match x, _int(y):
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
            return _op("abs", inner)
        case Apply(op="sub", args=(Constant(value=0), inner)):
            return _op("abs", inner)
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
                return _op(name, a, _op(name, c, y))
            case Apply(op=op, args=args), _ if op == other and y in args and kind_of(y) is Kind.INT:
                return y
            case _, Apply(op=op, args=args) if op == other and x in args and kind_of(x) is Kind.INT:
                return x
            case _:
                return None

    return rule


# Bits.


def _bit_and(x: Expr, y: Expr) -> Expr | None:
    if x == y or _int(y) == -1:
        return x
    if _int(x) == -1:
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


# Logic.


def opposite(x: Expr) -> Expr:
    """What is true exactly where `x` is not."""
    match x:
        case Constant(value=value):
            return Constant(not value)
        case Apply(op="not", args=(inner,)):
            return inner
        case Apply(op=op, args=args) if op in _OPPOSITE and (op in ("eq", "ne") or kind_of(args[1]) is Kind.INT):
            return Apply(_OPPOSITE[op], args, x.span)
        case _:
            return _op("not", x)


def _not(x: Expr) -> Expr | None:
    result = opposite(x)
    return None if result == _op("not", x) else result


def terms(name: str, expr: Expr) -> list[Expr]:
    """The operands of a chain of `and` or of `or`, from left to right."""
    match expr:
        case Apply(op=op, args=(x, y)) if op == name:
            return [*terms(name, x), *terms(name, y)]
        case _:
            return [expr]


def _chain(name: str) -> Rule:
    """`and` or `or`: each operand once, none that says nothing; settled where two exclude each other."""
    neutral, settled = (TRUE, FALSE) if name == "and" else (FALSE, TRUE)
    dual = "or" if name == "and" else "and"

    def rule(x: Expr, y: Expr) -> Expr | None:
        operands = [*terms(name, x), *terms(name, y)]
        kept: list[Expr] = []
        for operand in operands:
            if operand == settled or opposite(operand) in kept:
                return settled
            # `a and (a or b)` is `a`. Only towards the right: b may be read safely just where a does not hold.
            absorbed = any(term in kept for term in terms(dual, operand))
            if operand != neutral and operand not in kept and not absorbed:
                kept.append(operand)
        if kept == operands:
            return None
        result = kept[0] if kept else neutral
        for operand in kept[1:]:
            result = _op(name, result, operand)
        return result

    return rule


def _where(condition: Expr, x: Expr, y: Expr) -> Expr | None:
    match condition, x, y:
        case Constant(value=value), _, _:
            return x if value else y
        case _ if x == y:
            return x
        case Apply(op="not", args=(inner,)), _, _:
            return _op("where", inner, y, x)
        case _, Apply(op="where", args=(inner, a, _)), _ if inner == condition:
            return _op("where", condition, a, y)
        case _, _, Apply(op="where", args=(inner, _, b)) if inner == condition:
            return _op("where", condition, x, b)
        case _, Constant(value=True), _ if kind_of(y) is Kind.BOOL:
            return _op("or", condition, y)
        case _, _, Constant(value=False) if kind_of(x) is Kind.BOOL:
            return _op("and", condition, x)
        case _, Constant(value=False), _ if kind_of(y) is Kind.BOOL:
            return _op("and", _op("not", condition), y)
        case _, _, Constant(value=True) if kind_of(x) is Kind.BOOL:
            return _op("or", _op("not", condition), x)
        case _:
            return None


# Comparisons.


def _compare(name: str) -> Rule:
    same = Constant(name in ("le", "ge", "eq"))

    def rule(x: Expr, y: Expr) -> Expr | None:
        kind = kind_of(y)
        if kind is Kind.BOOL:
            return _compare_bools(name, x, y)
        if kind is Kind.FLOAT:
            return None
        if x == y:
            return same
        (a, c), (b, d) = _split(x), _split(y)
        if c != 0 and (value := _int(y)) is not None:
            return _op(name, a, Constant(value - c))
        if d != 0 and (value := _int(x)) is not None:
            return _op(name, Constant(value - d), b)
        # x' + c against y' + d: one constant is enough.
        return _op(name, a, _plus(b, d - c)) if c != 0 and d != 0 else None

    return rule


def _compare_bools(name: str, x: Expr, y: Expr) -> Expr | None:
    equal = name == "eq"
    if x == y:
        return Constant(equal)
    if opposite(x) == y:
        return Constant(not equal)
    for known, other in ((x, y), (y, x)):
        if isinstance(known, Constant):
            return other if known.value is equal else _op("not", other)
    return None


RULES: dict[str, Rule] = {
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
    "not": _not,
    "and": _chain("and"),
    "or": _chain("or"),
    "where": _where,
    **{name: _compare(name) for name in _OPPOSITE},
}
