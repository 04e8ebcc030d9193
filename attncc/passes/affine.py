"""What the statements of a recurrence make of the state that a token finds: an affine map, where it is one.

Every value is a constant plus terms, each a coefficient without the state times one of

    S[d, e]    Σ_d x[d] S[d, e]    Σ_e S[d, e] y[e]    Σ_d Σ_e x[d] S[d, e] y[e]

where S is the state before the token. Sums, products with what does not depend on the state and contractions of such
values are such values again; anything else is no linear update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attncc.ir.nodes import Apply, Constant, Expr, Load, Reduce
from attncc.ir.rewrite import contains
from attncc.passes.separable import Factors, Monomial, Polynomial, chosen, plus, polynomial, times
from attncc.source import Span


@dataclass(frozen=True, slots=True)
class Read:
    """A linear function of the state: summed over d with weights `keys`, over e with weights `values`; None: not."""

    keys: Factors | None = None
    values: Factors | None = None


ELEMENT = Read()


@dataclass(frozen=True, slots=True)
class Affine:
    """constant + the sum of coefficient · read."""

    constant: Polynomial = ()
    terms: Mapping[Read, Polynomial] = field(default_factory=dict[Read, Polynomial])

    def plus(self, other: Affine) -> Affine:
        reads = [*self.terms, *(read for read in other.terms if read not in self.terms)]
        terms = {read: plus(self.terms.get(read, ()), other.terms.get(read, ())) for read in reads}
        return Affine(plus(self.constant, other.constant), {read: c for read, c in terms.items() if c})

    def times(self, factor: Polynomial) -> Affine:
        terms = {read: times(factor, coefficient) for read, coefficient in self.terms.items()}
        return Affine(times(factor, self.constant), {read: c for read, c in terms.items() if c})


STATE_BEFORE = Affine(terms={ELEMENT: (Monomial(),)})


class NotAffine(Exception):
    """The state enters in a way that no linear map has; `why` in words, `span` where."""

    def __init__(self, why: str, span: Span | None) -> None:
        super().__init__(why)
        self.why, self.span = why, span


def affine(expr: Expr, known: Mapping[str, Affine]) -> Affine:
    """The value of `expr`, where `known` says what the state and bound names stand for."""
    if not contains(expr, lambda node: isinstance(node, Load) and node.tensor in known):
        return Affine(polynomial(expr))
    match expr:
        case Load(tensor=name):
            return known[name]
        case Apply(op="add", args=(a, b)):
            return affine(a, known).plus(affine(b, known))
        case Apply(op="sub", args=(a, b)):
            return affine(a, known).plus(affine(b, known).times((Monomial(-1.0),)))
        case Apply(op="neg", args=(a,)):
            return affine(a, known).times((Monomial(-1.0),))
        case Apply(op="mul", args=(a, b)):
            return _product(affine(a, known), affine(b, known), expr)
        case Apply(op="div", args=(a, b)):
            below = affine(b, known)
            if below.terms:
                raise NotAffine("something is divided by what depends on the state", expr.span)
            return affine(a, known).times(polynomial(Apply("div", (Constant(1.0), b))))
        case Apply(op="where", args=(condition, a, b)):
            if affine(condition, known).terms:
                raise NotAffine("a choice depends on the state", expr.span)
            otherwise = Apply("not", (condition,))
            return _where(condition, affine(a, known)).plus(_where(otherwise, affine(b, known)))
        case Reduce(op="sum", body=body):
            return _sum(affine(body, known), expr)
        case Reduce():
            raise NotAffine("the greatest of what depends on the state is no linear function of it", expr.span)
        case Apply(op=op):
            raise NotAffine(f"`{op}` of what depends on the state is no linear function of it", expr.span)
        case _:
            raise AssertionError(f"nothing in it reads the state: {expr}")


def _product(a: Affine, b: Affine, expr: Expr) -> Affine:
    if a.terms and b.terms:
        raise NotAffine("two values that depend on the state are multiplied", expr.span)
    return a.times(b.constant) if a.terms else b.times(a.constant)


def _where(condition: Expr, value: Affine) -> Affine:
    """The value where the condition holds, 0 elsewhere."""
    terms = {read: chosen(condition, coefficient) for read, coefficient in value.terms.items()}
    return Affine(chosen(condition, value.constant), terms)


def _sum(value: Affine, expr: Reduce) -> Affine:
    """The sum over all d, or all e."""
    coefficients = (value.constant, *value.terms.values())
    if any(monomial.mixed for coefficient in coefficients for monomial in coefficient):
        raise NotAffine("a sum over channels has a factor that varies with key and value channel at once", expr.span)
    result = Affine(plus((), tuple(monomial.reduced(expr.over, expr.size) for monomial in value.constant)))
    for read, coefficient in value.terms.items():
        for monomial in coefficient:
            result = result.plus(_summed(read, monomial, expr))
    return result


def _summed(read: Read, monomial: Monomial, expr: Reduce) -> Affine:
    if expr.over == "d":
        if read.keys is not None:  # summed over d already: the rest is a factor
            return Affine(terms={read: (monomial.reduced("d", expr.size),)})
        rest = Monomial(monomial.number, monomial.scalar, (), monomial.value)
        return Affine(terms={Read(monomial.key, read.values): (rest,)})
    if read.values is not None:
        return Affine(terms={read: (monomial.reduced("e", expr.size),)})
    rest = Monomial(monomial.number, monomial.scalar, monomial.key)
    return Affine(terms={Read(read.keys, monomial.value): (rest,)})
