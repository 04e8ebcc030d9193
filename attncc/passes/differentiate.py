"""Symbolic differentiation, forward from a leaf: how an expression changes with one of its parts.

Before: cap * tanh(scale * dot / cap)        by dot
After:  scale * (1 - t * t)                  with t = tanh(scale * dot / cap), which the value has computed already

A derivative is kept as a product while it passes through the chain rule, so that what cancels does: here `cap`. That
is exact but for rounding, except where a factor is 0 or infinite. `where` chooses between the derivatives of its
branches rather than multiplying one of them by 0: what is not chosen may be infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from attncc.ir.errors import IRError
from attncc.ir.nodes import Apply, Constant, Expr, Reduce, Variable
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import contains, kind_of, substitute
from attncc.ir.types import Kind
from attncc.passes.simplify import simplify_expr

_ZERO = Constant(0.0)


@dataclass(frozen=True, slots=True)
class Product:
    """coefficient * (the product of `factors`) / (the product of `divisors`)."""

    coefficient: float = 1.0
    factors: tuple[Expr, ...] = ()
    divisors: tuple[Expr, ...] = ()

    def times(self, other: Product) -> Product:
        factors, divisors = list(self.factors), list(self.divisors)
        for factor in other.factors:
            if factor in divisors:
                divisors.remove(factor)
            else:
                factors.append(factor)
        for divisor in other.divisors:
            if divisor in factors:
                factors.remove(divisor)
            else:
                divisors.append(divisor)
        return Product(self.coefficient * other.coefficient, tuple(factors), tuple(divisors))

    def plus(self, other: Product) -> Product:
        if (self.factors, self.divisors) == (other.factors, other.divisors):
            return replace(self, coefficient=self.coefficient + other.coefficient)
        if other.coefficient < 0:
            return Product(factors=(Apply("sub", (self.expr(), other.negated().expr())),))
        return Product(factors=(Apply("add", (self.expr(), other.expr())),))

    def negated(self) -> Product:
        return replace(self, coefficient=-self.coefficient)

    def expr(self) -> Expr:
        """The product as an expression, constant factor first."""
        factors = list(self.factors)
        negative = self.coefficient == -1.0 and bool(factors)
        if not factors or self.coefficient not in (1.0, -1.0):
            factors.insert(0, Constant(self.coefficient))
        above = reduce(lambda a, b: Apply("mul", (a, b)), factors)
        if self.divisors:
            above = Apply("div", (above, reduce(lambda a, b: Apply("mul", (a, b)), self.divisors)))
        return simplify_expr(Apply("neg", (above,)) if negative else above)


def product_of(expr: Expr) -> Product:
    """`expr`, taken apart where it is a product, a quotient or a negation."""
    match expr:
        case Constant(value=float(value)):
            return Product(value)
        case Apply(op="mul", args=(a, b)) if kind_of(b) is Kind.FLOAT:
            return product_of(a).times(product_of(b))
        case Apply(op="div", args=(a, b)):
            below = product_of(b)
            if below.coefficient == 0.0:
                return Product(factors=(expr,))
            return product_of(a).times(Product(1 / below.coefficient, below.divisors, below.factors))
        case Apply(op="neg", args=(a,)) if kind_of(a) is Kind.FLOAT:
            return product_of(a).negated()
        case _:
            return Product(factors=(expr,))


def derivative(expr: Expr, part: Expr) -> Expr | None:
    """The derivative of `expr` by `part`, each occurrence of which counts as one variable; None where it is 0
    everywhere. Of a float expression without `Reduce` above the part."""
    tangent = tangent_of(expr, part)
    return None if tangent is None else tangent.expr()


def tangents_of(expr: Expr, parts: Sequence[Expr]) -> tuple[Product, ...]:
    """The derivative by each of `parts`, all of them variables: what stands within one is not seen by the others."""
    variables = {part: Variable(f"part_{i}", Kind.FLOAT) for i, part in enumerate(parts)}
    back: dict[Expr, Expr] = {variable: part for part, variable in variables.items()}
    opaque = substitute(expr, variables)

    def tangent(variable: Variable) -> Product:
        found = tangent_of(opaque, variable) or Product(0.0)
        factors, divisors = (tuple(substitute(e, back) for e in side) for side in (found.factors, found.divisors))
        return Product(found.coefficient, factors, divisors)

    return tuple(map(tangent, variables.values()))


def tangent_of(expr: Expr, part: Expr) -> Product | None:
    """As `derivative`, as a product."""
    known: dict[Expr, Product | None] = {}

    def tangent(node: Expr) -> Product | None:
        if node == part:
            return Product()
        if not isinstance(node, Apply) or kind_of(node) is not Kind.FLOAT:
            if isinstance(node, Reduce) and contains(node, lambda inner: inner == part):
                raise IRError(f"no derivative through the reduction {node}")
            return None
        if node not in known:
            known[node] = through(node)
        return known[node]

    def through(node: Apply) -> Product | None:
        if node.op == "where":
            condition, *branches = node.args
            inner = [tangent(branch) for branch in branches]
            if inner[0] == inner[1]:
                return inner[0]
            chosen = (_ZERO if branch is None else branch.expr() for branch in inner)
            return Product(factors=(simplify_expr(Apply("where", (condition, *chosen))),))
        tangents = [tangent(a) if kind_of(a) is Kind.FLOAT else None for a in node.args]
        if all(t is None for t in tangents):
            return None
        rule = OPERATORS[node.op].derivative
        if rule is None:
            raise IRError(f"`{node.op}` has no derivative")
        total: Product | None = None
        for partial, inner_tangent in zip(rule(node.args, node), tangents, strict=True):
            if partial is None or inner_tangent is None:
                continue
            term = product_of(partial).times(inner_tangent)
            if term.coefficient != 0.0:
                total = term if total is None else total.plus(term)
        return total

    return tangent(expr)
