"""The transpose of a row transform: the gradient of a row from that of its transform.

Before: y[d] = x[d] * cos(...) + x[partner(d)] * sin(...)                          and dL/dy[d], written dx[d] below
After:  dL/dx[d] = dx[d] * cos(...) + dx[partner(d)] * sin(... at partner(d))

A kernel writes one element at a time, so what a transform reads at `partner(d)` is gathered from there. An index that
is its own inverse, as that of a rotation, says itself where from; any other is taken apart by the distances from d that
it leads over. A reduction over the row becomes one over its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
)
from attncc.ir.rewrite import children, contains, has_free_d, substitute
from attncc.passes.differentiate import Product, product_of, tangents_of
from attncc.passes.evaluate import Scene, evaluate
from attncc.passes.parts import reads_row
from attncc.passes.simplify import simplify_expr
from attncc.passes.variance import variance

_D = Index("d")


def transposed_row(transform: Expr, row: RowName, width: int) -> Expr:
    """The gradient by element d of the row, over the row and the gradient of the transform (`Element.upstream`)."""
    upstream = Element(row, _D, upstream=True)
    return _where_used(_sum(_element_terms(transform, upstream, width)), upstream, width)


def part_gradients(transform: Expr, parts: Sequence[Expr], row: RowName, width: int) -> tuple[Expr, ...]:
    """What element d adds to the gradient of each of `parts`, which read no element of the row."""
    upstream = Element(row, _D, upstream=True)
    gradients = (_sum(_part_terms(transform, i, parts, upstream, width)) for i in range(len(parts)))
    return tuple(_where_used(gradient, upstream, width) for gradient in gradients)


def _where_used(gradient: Expr, upstream: Element, width: int) -> Expr:
    """0 where nothing comes from above: a row that no pair keeps may hold NaN."""
    if not contains(gradient, lambda node: isinstance(node, Element | Load) and not _is_upstream(node)):
        return gradient
    above = Reduce("sum", Apply("abs", (upstream,)), Constant(width))
    return Apply("where", (Apply("eq", (above, Constant(0.0))), Constant(0.0), gradient))


def _is_upstream(node: Expr) -> bool:
    return isinstance(node, Element) and node.upstream


def _sum(terms: Iterator[Expr]) -> Expr:
    found = list(terms)
    return simplify_expr(reduce(lambda a, b: Apply("add", (a, b)), found)) if found else Constant(0.0)


def _element_terms(expr: Expr, above: Expr, width: int) -> Iterator[Expr]:
    """`above` is the gradient of `expr`, which is one value per d."""
    elements, reductions = _outermost(expr, Element), _outermost(expr, Reduce)
    partials = _derivatives(expr, (*elements, *reductions))
    for element, partial in zip(elements, partials, strict=False):
        assert isinstance(element, Element)
        if partial is not None:
            yield _gathered(_times(above, partial), element.index, width)
    for reduction, partial in zip(reductions, partials[len(elements) :], strict=True):
        if partial is not None and reads_row(reduction):
            body, inner = _into(reduction, _times(above, partial), width)
            yield from _element_terms(body, inner, width)


def _part_terms(expr: Expr, i: int, parts: Sequence[Expr], above: Expr, width: int) -> Iterator[Expr]:
    reductions = tuple(reduction for reduction in _outermost(expr, Reduce) if reduction not in parts)
    partials = _derivatives(expr, (*parts, *reductions))
    own = partials[i]
    if own is not None:
        yield _times(above, own)
    for reduction, partial in zip(reductions, partials[len(parts) :], strict=True):
        if partial is not None and reads_row(reduction):
            body, inner = _into(reduction, _times(above, partial), width)
            yield from _part_terms(body, i, parts, inner, width)


def _into(reduction: Expr, above: Expr, width: int) -> tuple[Expr, Expr]:
    """The body of a reduction and its gradient at the body's own d, where the gradient by the reduction adds up."""
    assert isinstance(reduction, Reduce)
    total = _summed(above, width)
    if reduction.op == "max":
        # Shared out among the elements that are the greatest, as PyTorch does.
        is_greatest = Apply("where", (Apply("eq", (reduction.body, reduction)), Constant(1.0), Constant(0.0)))
        share = Apply("div", (total, Reduce("sum", is_greatest, reduction.size)))
        total = Apply("where", (Apply("eq", (reduction.body, reduction)), share, Constant(0.0)))
    return reduction.body, total


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


def _derivatives(expr: Expr, parts: Sequence[Expr]) -> list[Expr | None]:
    """As `tangents_of`; None where one is 0 everywhere."""
    return [None if found.coefficient == 0.0 else found.expr() for found in tangents_of(expr, parts)]


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
    if all(0 <= place < width and places[place] == d for d, place in enumerate(places)):
        return simplify_expr(substitute(term, {_D: index}))
    # Otherwise from d - offset, for each distance over which an element is read.
    offsets = sorted({place - d for d, place in enumerate(places) if 0 <= place < width})
    return _sum(_where_read(term, index, Apply("sub", (_D, Constant(offset))), width) for offset in offsets)


def _where_read(term: Expr, index: Expr, reader: Expr, width: int) -> Expr:
    """`term` at the output element `reader`, where that is one and reads element d."""
    inside = Apply("and", (Apply("ge", (reader, Constant(0))), Apply("lt", (reader, Constant(width)))))
    reads_d = Apply("eq", (substitute(index, {_D: reader}), _D))
    return Apply("where", (Apply("and", (inside, reads_d)), substitute(term, {_D: reader}), Constant(0.0)))


def _places(index: Expr, width: int) -> list[int]:
    """The value of `index` for each d."""
    if variance(index) - {"d"} or contains(index, lambda node: isinstance(node, Parameter | Size | Load)):
        raise IRError(f"no gradient of a row that is read at {index}: it depends on more than d")
    scene = Scene(sizes={}, inputs={}, head={})
    return evaluate(index, scene, {"d": torch.arange(width)}).broadcast_to(width).tolist()
