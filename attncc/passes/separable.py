"""Sums of products whose factors vary with key channels, with value channels, or with neither.

    (a + k[d]) * v[e] * exp(g[d] + s)   is   a · exp(s) · exp(g[d]) · v[e]  +  exp(s) · k[d] exp(g[d]) · v[e]

Parts that vary with one sort of channel at most stay whole, whatever they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, TypeAlias

from attncc.ir.nodes import Apply, Constant, Expr, Reduce
from attncc.ir.rewrite import has_free
from attncc.ir.text import to_text
from attncc.passes.simplify import simplify_expr

Factors: TypeAlias = tuple[Expr, ...]

ONE = Constant(1.0)


@dataclass(frozen=True, slots=True)
class Monomial:
    """number · scalar · key · value · mixed: factors over no channel, over d, over e, and over both inseparably."""

    number: float = 1.0
    scalar: Factors = ()
    key: Factors = ()
    value: Factors = ()
    mixed: Factors = ()

    def times(self, other: Monomial) -> Monomial:
        sides = zip(self.sides, other.sides, strict=True)
        return Monomial(self.number * other.number, *(_ordered((*a, *b)) for a, b in sides))

    @property
    def sides(self) -> tuple[Factors, Factors, Factors, Factors]:
        return self.scalar, self.key, self.value, self.mixed

    @property
    def weight(self) -> Monomial:
        """What varies with no channel."""
        return Monomial(self.number, self.scalar)

    def expr(self) -> Expr:
        return product(self.scalar + self.key + self.value + self.mixed, self.number)

    def reduced(self, index: Literal["d", "e"], size: Expr) -> Monomial:
        """The sum over d (or e) in [0, size) of what varies with it, as one more scalar factor. Nothing is mixed."""
        body = product(self.key if index == "d" else self.value)
        total = Reduce("sum", body, size, over=index)
        kept = replace(self, key=()) if index == "d" else replace(self, value=())
        return kept.times(Monomial(scalar=(total,)))


Polynomial: TypeAlias = tuple[Monomial, ...]


def product(factors: Iterable[Expr], number: float = 1.0) -> Expr:
    """The factors multiplied, the number first."""
    terms = [*([] if number == 1.0 else [Constant(number)]), *factors]
    return simplify_expr(reduce(lambda a, b: Apply("mul", (a, b)), terms)) if terms else ONE


def total(terms: Iterable[Expr]) -> Expr:
    """The terms added up; 0 of none."""
    found = list(terms)
    return simplify_expr(reduce(lambda a, b: Apply("add", (a, b)), found)) if found else Constant(0.0)


def expr_of(polynomial: Polynomial) -> Expr:
    return total(monomial.expr() for monomial in polynomial)


def plus(a: Polynomial, b: Polynomial) -> Polynomial:
    """The sum, with like terms together and those that cancel gone."""
    numbers: dict[Monomial, float] = {}
    for monomial in (*a, *b):
        like = replace(monomial, number=1.0)
        numbers[like] = numbers.get(like, 0.0) + monomial.number
    return tuple(replace(like, number=number) for like, number in numbers.items() if number != 0.0)


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    return plus((), tuple(x.times(y) for x in a for y in b))


def polynomial(expr: Expr) -> Polynomial:
    """`expr` as a sum of products. Only where something varies with both channels is it multiplied out."""
    if not (has_free(expr, "d") and has_free(expr, "e")):
        return plus((), (_factored(expr),))
    match expr:
        case Apply(op="add", args=(a, b)):
            return plus(polynomial(a), polynomial(b))
        case Apply(op="sub", args=(a, b)):
            return plus(polynomial(a), times((Monomial(-1.0),), polynomial(b)))
        case Apply(op="neg", args=(a,)):
            return times((Monomial(-1.0),), polynomial(a))
        case Apply(op="mul", args=(a, b)):
            return times(polynomial(a), polynomial(b))
        case Apply(op="div", args=(a, b)):
            return times(polynomial(a), polynomial(_reciprocal(b)))
        case Apply(op="where", args=(condition, a, b)) if not _varies(condition):
            otherwise = Apply("not", (condition,))
            return plus(chosen(condition, polynomial(a)), chosen(otherwise, polynomial(b)))
        case Apply(op="exp" | "exp2"):
            first, second = _exponentials(expr)
            if second != ONE:
                return times(polynomial(first), polynomial(second))
        case _:
            pass
    return (Monomial(mixed=(expr,)),)


def chosen(condition: Expr, terms: Polynomial) -> Polynomial:
    """The sum where the condition holds, 0 elsewhere: each factor is, so that none is infinite times 0 there."""
    return plus((), tuple(_guarded(condition, term) for term in terms))


def _guarded(condition: Expr, term: Monomial) -> Monomial:
    def guard(value: Expr) -> Expr:
        return Apply("where", (condition, value, Constant(0.0)))

    if _varies(condition):
        (guarded,) = polynomial(guard(term.expr()))
        return guarded
    if not any(term.sides):
        return Monomial(scalar=(guard(Constant(term.number)),))
    return Monomial(term.number, *((guard(product(side)),) if side else () for side in term.sides))


def _varies(expr: Expr) -> bool:
    return has_free(expr, "d") or has_free(expr, "e")


def _reciprocal(expr: Expr) -> Expr:
    match expr:
        case Apply(op="mul", args=(a, b)):
            return Apply("mul", (_reciprocal(a), _reciprocal(b)))
        case Apply(op="exp" | "exp2" as op, args=(a,)):
            return Apply(op, (simplify_expr(Apply("neg", (a,))),))
        case _:
            return Apply("div", (ONE, expr))


def _exponentials(expr: Apply) -> tuple[Expr, Expr]:
    """exp(a + b) as two factors."""
    op = expr.op
    match expr.args[0]:
        case Apply(op="add", args=(a, b)):
            return Apply(op, (a,)), Apply(op, (b,))
        case Apply(op="sub", args=(a, b)):
            return Apply(op, (a,)), Apply(op, (Apply("neg", (b,)),))
        case Apply(op="neg", args=(Apply(op="add" | "sub" as inner, args=(a, b)),)):
            second = b if inner == "sub" else Apply("neg", (b,))
            return Apply(op, (Apply("neg", (a,)),)), Apply(op, (second,))
        case _:
            return expr, ONE


def _factored(expr: Expr) -> Monomial:
    """An expression that varies with one sort of channel at most, as factors."""
    expr = simplify_expr(expr)
    match expr:
        case Constant(value=float(value)):
            return Monomial(value)
        case Apply(op="neg", args=(a,)):
            return Monomial(-1.0).times(_factored(a))
        case Apply(op="mul", args=(a, b)):
            return _factored(a).times(_factored(b))
        case Apply(op="div", args=(a, b)) if a != ONE:
            return _factored(a).times(_factored(_reciprocal(b)))
        case Apply(op="exp" | "exp2"):
            first, second = _exponentials(expr)
            if second != ONE:
                return _factored(first).times(_factored(second))
        case _:
            pass
    if has_free(expr, "d"):
        return Monomial(key=(expr,))
    return Monomial(value=(expr,)) if has_free(expr, "e") else Monomial(scalar=(expr,))


def _ordered(factors: Factors) -> Factors:
    return tuple(sorted(factors, key=to_text))
