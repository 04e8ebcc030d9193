"""Which parts of an expression carry captured tensors into it, and along what each of them varies.

Before: score = qk / exp(tau[h]) + bias[h, bucket(q_idx - kv_idx)]       tau and bias are wanted
After:  1 / exp(tau[h]) along the head, bias[h, bucket(q_idx - kv_idx)] along the diagonal

A kernel adds up the gradient of a part over all pairs that share it; what is within the part is differentiated
afterwards, once per entry, outside the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from attncc.ir.nodes import Apply, Element, Expr, Hole, Index, Load, Reduce, Size, Variable
from attncc.ir.rewrite import children, contains, kind_of, map_children, substitute, walk
from attncc.ir.types import Along, Kind
from attncc.passes.algebra import ZERO, canonical, expr_of, linear
from attncc.passes.variance import variance

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def learned_parts(expr: Expr, wanted: AbstractSet[str]) -> tuple[tuple[Expr, Along], ...]:
    """The greatest parts of a float expression through which the captured tensors `wanted` change it smoothly, and
    which no pair has for itself, or else the loads: each once, in reading order."""
    return tuple(dict.fromkeys(_parts(expr, wanted)))


def _parts(expr: Expr, wanted: AbstractSet[str]) -> Iterator[tuple[Expr, Along]]:
    if not _is_learned(expr, wanted):
        return
    along = along_of(expr)
    inner = [part for child in _smooth_children(expr) for part in _parts(child, wanted)]
    # Sums along the diagonal cost more than those of a head, a query or a key: only where a tensor is read along it.
    if along is None or (along == "diagonal" and inner and all(a in ("head", "row", "column") for _, a in inner)):
        yield from inner
    else:
        yield expr, along


def learned_elements(expr: Expr, wanted: AbstractSet[str]) -> tuple[Expr, ...]:
    """The same for a row transform: the greatest parts that read no element of the row."""
    return tuple(dict.fromkeys(_element_parts(expr, wanted)))


def _element_parts(expr: Expr, wanted: AbstractSet[str]) -> Iterator[Expr]:
    if not _is_learned(expr, wanted):
        return
    if not reads_row(expr):
        yield expr
        return
    inner = (expr.body,) if isinstance(expr, Reduce) else _smooth_children(expr)
    for child in inner:
        yield from _element_parts(child, wanted)


def reads_row(expr: Expr) -> bool:
    return contains(expr, lambda node: isinstance(node, Element))


def _is_learned(expr: Expr, wanted: AbstractSet[str]) -> bool:
    """Whether a wanted tensor reaches the value of `expr` through floats alone: not as an index or in a condition."""
    if kind_of(expr) is not Kind.FLOAT:
        return False
    match expr:
        case Load(tensor=tensor):
            return tensor in wanted
        case Reduce(body=body):
            return _is_learned(body, wanted)
        case _:
            return any(_is_learned(child, wanted) for child in _smooth_children(expr))


def _smooth_children(expr: Expr) -> tuple[Expr, ...]:
    if not isinstance(expr, Apply):
        return ()
    return tuple(child for child in children(expr) if kind_of(child) is Kind.FLOAT)


def along_of(expr: Expr) -> Along | None:
    """What `expr` varies along; None where it varies with the pair and is more than one load."""
    if contains(expr, lambda node: isinstance(node, Hole)):
        return None
    varies = variance(expr)
    if not varies & {"q", "kv"}:
        return "head"
    if "kv" not in varies:
        return "row"
    if "q" not in varies:
        return "column"
    if _depends_on_distance(expr):
        return "diagonal"
    return "pair" if isinstance(expr, Load) else None


def _depends_on_distance(expr: Expr) -> bool:
    """Whether query and key enter `expr` by the difference of their positions alone."""
    key, distance = Index("kv_idx"), Variable("distance", Kind.INT)
    position = Apply("add", (key, distance))
    row = Apply("sub", (position, Size("q_offset")))
    shifted = substitute(expr, {Index("q_idx"): position, Index("q_row"): row})
    return key not in walk(canonical(_compared_with_zero(shifted)))


def _compared_with_zero(expr: Expr) -> Expr:
    """`expr` with every comparison of ints as one of their difference."""
    expr = map_children(expr, _compared_with_zero)
    match expr:
        case Apply(op=op, args=(a, b)) if op in _COMPARISONS and kind_of(a) is Kind.INT:
            return Apply(op, (expr_of(linear(a) - linear(b)), ZERO))
        case _:
            return expr
