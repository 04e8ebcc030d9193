"""Walking and rebuilding expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import assert_never

from attncc.ir.errors import IRError
from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Element,
    Elementwise,
    Expr,
    Hole,
    Index,
    IndexName,
    Load,
    Parameter,
    Reduce,
    Size,
    Softmax,
    Sum,
    Summary,
    Variable,
)
from attncc.ir.operators import OPERATORS
from attncc.ir.types import Kind

_KINDS: dict[type, Kind] = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT}


def kind_of(expr: Expr) -> Kind:
    """What `expr` computes. Trusts that it is well formed (`attncc.ir.verify` checks): looks at one argument only."""
    match expr:
        case Constant(value=value):
            return _KINDS[type(value)]
        case Index() | Size():
            return Kind.INT
        case Element() | Reduce() | Hole():
            return Kind.FLOAT
        case Parameter(kind=kind) | Load(kind=kind) | Variable(kind=kind):
            return kind
        case Summary(load=load):
            return load.kind
        case Apply(op=op, args=args):
            if op not in OPERATORS or not args:
                raise IRError(f"not an operator with arguments: {expr}")
            return OPERATORS[op].result_of_last(kind_of(args[-1]))
        case _:
            assert_never(expr)


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions directly below `expr`, in reading order."""
    match expr:
        case Constant() | Index() | Size() | Parameter() | Hole() | Variable():
            return ()
        case Load(indices=indices):
            return indices
        case Element(index=index):
            return (index,)
        case Reduce(body=body, size=size):
            return (body, size)
        case Apply(args=args):
            return args
        case Summary(load=load):
            return (load,)
        case _:
            assert_never(expr)


def map_children(expr: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """`expr` with `f` of each child in its place; `expr` itself where `f` changes none."""
    before = children(expr)
    after = tuple(f(child) for child in before)
    if all(new is old for new, old in zip(after, before, strict=True)):
        return expr
    match expr:
        case Constant() | Index() | Size() | Parameter() | Hole() | Variable():
            return expr
        case Load(tensor=tensor, kind=kind, span=span):
            return Load(tensor, after, kind, span)
        case Element(row=row, upstream=upstream, span=span):
            return Element(row, after[0], upstream, span)
        case Reduce(op=op, over=over, span=span):
            return Reduce(op, after[0], after[1], span, over=over)
        case Apply(op=op, span=span):
            return Apply(op, after, span)
        case Summary(op=op, axis=axis, span=span):
            if not isinstance(after[0], Load):
                raise IRError(f"only a load can be summarised, not {after[0]}")
            return Summary(op, after[0], axis, span)
        case _:
            assert_never(expr)


def walk(expr: Expr) -> Iterator[Expr]:
    """`expr` and everything below it, parents first, in reading order."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def contains(expr: Expr, predicate: Callable[[Expr], bool]) -> bool:
    """Whether `predicate` holds of `expr` or of anything below it."""
    return any(predicate(node) for node in walk(expr))


def has_free(expr: Expr, name: IndexName) -> bool:
    """Whether the index `name` occurs in `expr` outside every `Reduce` that binds it."""
    match expr:
        case Index(name=found):
            return found == name
        case Reduce(size=size, over=over) if over == name:
            return has_free(size, name)
        case _:
            return any(has_free(child, name) for child in children(expr))


def has_free_d(expr: Expr) -> bool:
    """Whether `d` occurs in `expr` outside every `Reduce` that binds it."""
    return has_free(expr, "d")


def substitute(expr: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """`expr` with each key of `mapping` replaced by its value, the outermost match first.

    `d` (or `e`) inside the body of a `Reduce` over it is that reduction's own: a key with a free `d` does not match
    there, and a value with a free `d` would be captured there and raises `IRError`.
    """
    if not mapping:
        return expr
    if expr in mapping:
        return mapping[expr]
    if isinstance(expr, Reduce):
        inner = {key: value for key, value in mapping.items() if not has_free(key, expr.over)}
        body = substitute(expr.body, inner)
        for key, value in inner.items():
            if has_free(value, expr.over) and contains(expr.body, lambda node, key=key: node == key):
                raise IRError(f"substituting {value} for {key} inside {expr} would capture its {expr.over}")
        return Reduce(expr.op, body, substitute(expr.size, mapping), expr.span, over=expr.over)
    return map_children(expr, lambda child: substitute(child, mapping))


def swap_channels(expr: Expr) -> Expr:
    """`expr` with `d` and `e` in each other's place, whatever binds them."""
    match expr:
        case Index(name="d" | "e" as name, span=span):
            return Index("e" if name == "d" else "d", span)
        case Reduce(op=op, body=body, size=size, over=over, span=span):
            return Reduce(op, swap_channels(body), size, span, over="e" if over == "d" else "d")
        case _:
            return map_children(expr, swap_channels)


def clauses(attention: Attention) -> Iterator[tuple[str, Expr]]:
    """The expressions of an attention with the names of their clauses, in the order of their meaning."""
    yield from (("q", attention.q), ("k", attention.k), ("v", attention.v))
    yield from (("scale", attention.scale), ("score", attention.score), ("mask", attention.mask))
    match attention.normalizer:
        case Softmax(sink=sink):
            if sink is not None:
                yield "sink", sink
        case Elementwise(weight=weight) | Sum(weight=weight):
            yield "weight", weight
        case _:
            assert_never(attention.normalizer)
    if attention.dropout is not None:
        yield "dropout", attention.dropout


def map_clauses(attention: Attention, f: Callable[[Expr], Expr]) -> Attention:
    """`attention` with `f` of each of its expressions in its place, called in the order of `clauses`."""
    attention = replace(
        attention,
        q=f(attention.q),
        k=f(attention.k),
        v=f(attention.v),
        scale=f(attention.scale),
        score=f(attention.score),
        mask=f(attention.mask),
    )
    match attention.normalizer:
        case Softmax(sink=sink):
            attention = replace(attention, normalizer=Softmax(None if sink is None else f(sink)))
        case Elementwise(weight=weight):
            attention = replace(attention, normalizer=Elementwise(f(weight)))
        case Sum(weight=weight):
            attention = replace(attention, normalizer=Sum(f(weight)))
        case _:
            assert_never(attention.normalizer)
    return attention if attention.dropout is None else replace(attention, dropout=f(attention.dropout))
