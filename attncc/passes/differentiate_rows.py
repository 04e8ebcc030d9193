"""The transpose of a row transform: the gradient of a row from that of its transform.

Before: y[d] = x[d] * cos(...) + x[partner(d)] * sin(...)                          and dL/dy[d], written dx[d] below
After:  dL/dx[d] = dx[d] * cos(...) + dx[partner(d)] * sin(... at partner(d))

A kernel writes one element at a time, so what a transform reads at `partner(d)` is gathered from there: the index must
be its own inverse, which is checked on every element of a row. A reduction over the row becomes one over its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch

from attncc.ir.errors import IRError
from attncc.ir.nodes import (
    Apply,
    Constant,
    Element,
    Expr,
    Index,
    Load,
    Parameter,
    Reduce,
    RowName,
    Size,
    Variable,
)
from attncc.ir.rewrite import children, contains, has_free_d, substitute
from attncc.ir.text import to_text
from attncc.ir.types import Kind
from attncc.passes.differentiate import Product, derivative, product_of
from attncc.passes.evaluate import Scene, evaluate
from attncc.passes.simplify import simplify_expr
from attncc.passes.variance import variance

_D = Index("d")


class NotItsOwnInverse(IRError):
    """A transform reads its row at an index that does not lead back."""


def transposed_row(transform: Expr, row: RowName, width: int) -> Expr:
    """The gradient by element d of the row, over the row and the gradient of the transform (`Element.upstream`).

    Raises `NotItsOwnInverse` where the transform reads an element at an index that does not lead back to it.
    """
    return _sum(_element_terms(transform, Element(row, _D, upstream=True), width))


def part_gradient(transform: Expr, part: Expr, row: RowName, width: int) -> Expr:
    """What element d adds to the gradient of `part`, which reads no element of the row."""
    return _sum(_part_terms(transform, part, Element(row, _D, upstream=True), width))


def _sum(terms: Iterator[Expr]) -> Expr:
    found = list(terms)
    return simplify_expr(reduce(lambda a, b: Apply("add", (a, b)), found)) if found else Constant(0.0)


def _element_terms(expr: Expr, above: Expr, width: int) -> Iterator[Expr]:
    """`above` is the gradient of `expr`, which is one value per d."""
    for element in _outermost(expr, Element):
        assert isinstance(element, Element)
        partial = _derivative(expr, element)
        if partial is not None:
            yield _gathered(_times(above, partial), element.index, width)
    for body, above_body in _through_reductions(expr, above, width):
        yield from _element_terms(body, above_body, width)


def _part_terms(expr: Expr, part: Expr, above: Expr, width: int) -> Iterator[Expr]:
    partial = _derivative(expr, part)
    if partial is not None:
        yield _times(above, partial)
    for body, above_body in _through_reductions(expr, above, width):
        yield from _part_terms(body, part, above_body, width)


def _through_reductions(expr: Expr, above: Expr, width: int) -> Iterator[tuple[Expr, Expr]]:
    """The body of each reduction in `expr`, with its gradient at the body's own d."""
    for reduction in _outermost(expr, Reduce):
        assert isinstance(reduction, Reduce)
        partial = _derivative(expr, reduction)
        if partial is None:
            continue
        total = _summed(_times(above, partial), width)
        if reduction.op == "max":
            # Shared out among the elements that are the greatest, as PyTorch does.
            is_greatest = Apply("where", (Apply("eq", (reduction.body, reduction)), Constant(1.0), Constant(0.0)))
            share = Apply("div", (total, Reduce("sum", is_greatest, reduction.size)))
            total = Apply("where", (Apply("eq", (reduction.body, reduction)), share, Constant(0.0)))
        yield reduction.body, total


def _summed(term: Expr, width: int) -> Expr:
    """The sum of `term` over d; what does not vary with d is multiplied once."""
    product = product_of(term)
    inner = Product(1.0, tuple(filter(has_free_d, product.factors)), tuple(filter(has_free_d, product.divisors)))
    outer = Product(
        product.coefficient,
        tuple(factor for factor in product.factors if not has_free_d(factor)),
        tuple(divisor for divisor in product.divisors if not has_free_d(divisor)),
    )
    return _times(outer.expr(), Reduce("sum", inner.expr(), Constant(width)))


def _derivative(expr: Expr, part: Expr) -> Expr | None:
    """The derivative where reductions are values like any other: what is in them is another matter."""
    opaque: dict[Expr, Expr] = {
        reduction: Variable(f"reduction_{i}", Kind.FLOAT) for i, reduction in enumerate(_outermost(expr, Reduce))
    }
    found = derivative(substitute(expr, opaque), opaque.get(part, part))
    return None if found is None else substitute(found, {variable: value for value, variable in opaque.items()})


def _times(a: Expr, b: Expr) -> Expr:
    return simplify_expr(Apply("mul", (a, b)))


def _outermost(expr: Expr, kind: type[Element | Reduce]) -> tuple[Expr, ...]:
    """The elements, or the reductions, of `expr` that stand in no reduction; each once, in reading order."""

    def found(node: Expr) -> Iterator[Expr]:
        if isinstance(node, kind):
            yield node
        elif not isinstance(node, Reduce):
            for child in children(node):
                yield from found(child)

    return tuple(dict.fromkeys(found(expr)))


def _gathered(term: Expr, index: Expr, width: int) -> Expr:
    """What element d gets of `term`, which belongs to element `index` where d is the index of the output."""
    if index == _D:
        return term
    places = _places(index, width)
    if places is None or [places[place] for place in places] != list(range(width)):
        raise NotItsOwnInverse(to_text(index))
    return simplify_expr(substitute(term, {_D: index}))


def _places(index: Expr, width: int) -> list[int] | None:
    """The value of `index` for each d; None where it depends on more than d, or leaves the row."""
    if variance(index) - {"d"} or contains(index, lambda node: isinstance(node, Parameter | Size | Load)):
        return None
    scene = Scene(sizes={}, inputs={}, head={})
    places = evaluate(index, scene, {"d": torch.arange(width)}).broadcast_to(width).tolist()
    return places if all(0 <= place < width for place in places) else None
