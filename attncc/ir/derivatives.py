"""Derivatives of the builtins: a column of the operator table.

A rule has the arguments, the result and the partial derivatives that are not 0 everywhere, one per argument: an
expression over the arguments and the result, so that what the forward pass has computed is not computed again
(1 - y * y for y = tanh(x)). Where a function has a corner the rule gives what PyTorch gives: half to each of two equal
arguments of `min`, 0 for `abs` and `relu` at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from attncc.ir.nodes import Apply, Constant, Expr

# (arguments, result) -> partial derivative by each argument; None where it is 0 everywhere.
Derivative: TypeAlias = Callable[[tuple[Expr, ...], Expr], tuple[Expr | None, ...]]

ONE, HALF, ZERO = Constant(1.0), Constant(0.5), Constant(0.0)


def mul(x: Expr, y: Expr) -> Expr:
    return Apply("mul", (x, y))


def div(x: Expr, y: Expr) -> Expr:
    return Apply("div", (x, y))


def sub(x: Expr, y: Expr) -> Expr:
    return Apply("sub", (x, y))


def add(x: Expr, y: Expr) -> Expr:
    return Apply("add", (x, y))


def neg(x: Expr) -> Expr:
    return Apply("neg", (x,))


def where(condition: Expr, x: Expr, y: Expr) -> Expr:
    return Apply("where", (condition, x, y))


def of_one(rule: Callable[[Expr, Expr], Expr]) -> Derivative:
    """The rule of a function of one argument, whose result at x is y."""
    return lambda args, y: (rule(args[0], y),)


def flat(args: tuple[Expr, ...], result: Expr) -> tuple[None, ...]:
    """0 wherever there is a derivative."""
    del result
    return (None,) * len(args)


def linear(*factors: float) -> Derivative:
    """Constant partial derivatives."""
    return lambda _args, _result: tuple(Constant(factor) for factor in factors)


def product(args: tuple[Expr, ...], result: Expr) -> tuple[Expr, Expr]:
    del result
    return args[1], args[0]


def quotient(args: tuple[Expr, ...], result: Expr) -> tuple[Expr, Expr]:
    return div(ONE, args[1]), neg(div(result, args[1]))


def power(args: tuple[Expr, ...], result: Expr) -> tuple[Expr, Expr]:
    """x ** y: y x ** (y - 1), 0 for y = 0; and x ** y log x, 0 for x = 0 where y is not negative."""
    x, y = args
    by_x = mul(y, Apply("pow", (x, sub(y, ONE))))
    if not _is_nonzero(y):
        by_x = where(Apply("eq", (y, ZERO)), ZERO, by_x)
    by_y = mul(result, Apply("log", (x,)))
    if not _is_nonzero(x):
        at_zero = Apply("and", (Apply("eq", (x, ZERO)), Apply("ge", (y, ZERO))))
        by_y = where(at_zero, ZERO, by_y)
    return by_x, by_y


def _is_nonzero(expr: Expr) -> bool:
    return isinstance(expr, Constant) and expr.value != 0


def extreme(comparison: str) -> Derivative:
    """`min` (lt) or `max` (gt): all to the one that it returns, half to each where they are equal."""

    def rule(args: tuple[Expr, ...], result: Expr) -> tuple[Expr, Expr]:
        del result
        x, y = args
        of_x = where(Apply("eq", (x, y)), HALF, where(Apply(comparison, (x, y)), ONE, ZERO))
        return of_x, sub(ONE, of_x)

    return rule


absolute = of_one(lambda x, _: Apply("sign", (x,)))
exp = of_one(lambda _, y: y)
exp2 = of_one(lambda _, y: mul(Constant(math.log(2)), y))
log = of_one(lambda x, _: div(ONE, x))
log2 = of_one(lambda x, _: div(Constant(1 / math.log(2)), x))
log1p = of_one(lambda x, _: div(ONE, add(ONE, x)))
sqrt = of_one(lambda _, y: div(HALF, y))
rsqrt = of_one(lambda _, y: mul(Constant(-0.5), mul(y, mul(y, y))))
tanh = of_one(lambda _, y: sub(ONE, mul(y, y)))
sigmoid = of_one(lambda _, y: mul(y, sub(ONE, y)))
relu = of_one(lambda x, _: where(Apply("gt", (x, ZERO)), ONE, ZERO))
# exp(x) is y + 1 where x < 0.
elu = of_one(lambda x, y: where(Apply("gt", (x, ZERO)), ONE, add(y, ONE)))
softplus = of_one(lambda x, _: Apply("sigmoid", (x,)))
sin = of_one(lambda x, _: Apply("cos", (x,)))
cos = of_one(lambda x, _: neg(Apply("sin", (x,))))
erf = of_one(lambda x, _: mul(Constant(2 / math.sqrt(math.pi)), Apply("exp", (neg(mul(x, x)),))))


@of_one
def gelu(x: Expr, y: Expr) -> Expr:
    """Φ(x) + x φ(x)."""
    del y
    cdf = mul(HALF, add(ONE, Apply("erf", (mul(x, Constant(math.sqrt(0.5))),))))
    density = mul(Constant(1 / math.sqrt(2 * math.pi)), Apply("exp", (mul(Constant(-0.5), mul(x, x)),)))
    return add(cdf, mul(x, density))


@of_one
def silu(x: Expr, y: Expr) -> Expr:
    """s + y (1 - s) with s = sigmoid(x)."""
    s = Apply("sigmoid", (x,))
    return add(s, mul(y, sub(ONE, s)))
