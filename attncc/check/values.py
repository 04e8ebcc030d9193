"""What an expression of a spec stands for while it is checked, and typed arithmetic on it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from attncc.ir.nodes import Apply, Constant, Expr, Index, Load, Reduce, Size, SizeName, TensorParameter
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import children
from attncc.ir.types import Kind
from attncc.source import Span


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar, or a row: then `expr` is its element `d`, and `size` how many there are.

    index: what the element of a row is called; `e` for value vectors within a recurrence.
    """

    expr: Expr
    kind: Kind
    size: Expr | None = None
    index: Literal["d", "e"] = "d"

    @property
    def is_row(self) -> bool:
        return self.size is not None

    # Arithmetic for the formulas of builtins, whose kinds are known to fit.
    def __add__(self, other: Value) -> Value:
        return apply("add", self, other)

    def __sub__(self, other: Value) -> Value:
        return apply("sub", self, other)

    def __mul__(self, other: Value) -> Value:
        return apply("mul", self, other)

    def __truediv__(self, other: Value) -> Value:
        return apply("div", self, other)

    def __neg__(self) -> Value:
        return apply("neg", self)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor parameter by its bare name; `declared` is its type as it was written."""

    parameter: TensorParameter
    declared: Span

    @property
    def kind(self) -> Kind:
        return self.parameter.dtypes[0].kind

    def load(self, indices: tuple[Expr, ...], span: Span | None) -> Expr:
        return Load(self.parameter.name, indices, self.kind, span)


@dataclass(frozen=True, slots=True)
class Unknown:
    """What an expression with a reported error stands for: whatever is done with it is right."""


UNKNOWN = Unknown()

Meaning: TypeAlias = Value | Tensor | Unknown


@dataclass(slots=True)
class KindMismatch(Exception):
    """Argument `position` of an operator has a kind that it cannot take."""

    position: int
    expected: frozenset[Kind]


@dataclass(slots=True)
class SizeMismatch(Exception):
    """Two rows of different sizes were combined."""

    left: Expr
    right: Expr


def constant(value: bool | int | float, span: Span | None = None) -> Value:
    kinds = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT}
    return Value(Constant(value, span), kinds[type(value)])


def size_value(name: SizeName, span: Span | None = None) -> Value:
    return Value(Size(name, span), Kind.INT)


def to_float(value: Value) -> Value:
    """An int as a float; a float as it is."""
    return value if value.kind is Kind.FLOAT else apply("to_float", value)


def apply(op: str, *arguments: Value, span: Span | None = None) -> Value:
    """The operator on its arguments, element by element where some are rows, with ints made floats where it asks.

    Raises `KindMismatch`, `SizeMismatch` and `IntOverflow`.
    """
    row = OPERATORS[op]
    rows = [argument for argument in arguments if argument.size is not None]
    sizes = [argument.size for argument in arguments if argument.size is not None]
    for size in sizes[1:]:
        if size != sizes[0]:
            raise SizeMismatch(sizes[0], size)
    kinds = tuple(argument.kind for argument in arguments)
    result = row.result(kinds)
    if result is None:
        promoted = tuple(Kind.FLOAT if kind is Kind.INT else kind for kind in kinds)
        # Where a bool stands beside numbers (`where`), only the numbers are promoted.
        result = row.result(promoted)
        if result is None:
            raise _mismatch(op, kinds)
        arguments = tuple(_promoted(argument) for argument in arguments)
    expr = fold(Apply(op, tuple(argument.expr for argument in arguments), span))
    return replace(rows[0], expr=expr, kind=result) if rows else Value(expr, result)


def _promoted(value: Value) -> Value:
    if value.kind is not Kind.INT:
        return value
    return replace(value, expr=fold(Apply("to_float", (value.expr,), value.expr.span)), kind=Kind.FLOAT)


def _mismatch(op: str, kinds: tuple[Kind, ...]) -> KindMismatch:
    """The first argument that no overload takes, or the last one where each would do alone."""
    overloads = OPERATORS[op].overloads
    for i, kind in enumerate(kinds):
        accepted = frozenset(overload.arguments[i] for overload in overloads)
        if kind not in accepted and not (kind is Kind.INT and Kind.FLOAT in accepted):
            return KindMismatch(i, accepted)
    # Each argument would do with others: the last one must follow the one before it.
    first = kinds[-2:][0]
    numbers = frozenset((Kind.INT, Kind.FLOAT))
    return KindMismatch(len(kinds) - 1, numbers if first in numbers else frozenset((first,)))


def reduce(op: Literal["sum", "max"], row: Value, span: Span | None = None) -> Value:
    """`sum` or `max` over the elements of a row."""
    row = to_float(row)
    assert row.size is not None
    reduction = Reduce(op, row.expr, row.size, span, over=row.index)
    return Value(reduction, Kind.FLOAT)


def element_index(span: Span | None = None) -> Index:
    """The index of the element of a row."""
    return Index("d", span)


_FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
}
_FOLDED_UNARY: dict[str, Callable[[Any], Any]] = {"neg": operator.neg, "not": operator.not_, "to_float": float}


@dataclass(slots=True)
class IntOverflow(Exception):
    """An int of constants does not fit in 64 bits."""

    value: int


def fold(expr: Apply) -> Expr:
    """A constant for plain arithmetic on constants, where Python's result is exact or rounds as f64 does.

    Raises `IntOverflow`.
    """
    try:
        match expr.args:
            case (Constant(value=x),) if expr.op in _FOLDED_UNARY:
                value = _FOLDED_UNARY[expr.op](x)
            case (Constant(value=x), Constant(value=y)) if expr.op in _FOLDED:
                value = _FOLDED[expr.op](x, y)
            case _:
                return expr
    except (ArithmeticError, ValueError):
        return expr
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and expr.op != "neg")):
        return expr  # NaN is no constant, and an overflow is the spec's own affair.
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise IntOverflow(value)
    return Constant(value, expr.span)


MAX_TERMS = 10_000
MAX_DEPTH = 150


def extent(expr: Expr) -> tuple[int, int]:
    """How many terms an expression has when written out, and how deep they nest. Shared parts count each time."""
    known: dict[int, tuple[int, int]] = {}

    def measure(node: Expr) -> tuple[int, int]:
        found = known.get(id(node))
        if found is None:
            below = [measure(child) for child in children(node)]
            found = (1 + sum(terms for terms, _ in below), 1 + max((depth for _, depth in below), default=0))
            known[id(node)] = found
        return found

    return measure(expr)


def is_too_large(expr: Expr) -> bool:
    terms, depth = extent(expr)
    return terms > MAX_TERMS or depth > MAX_DEPTH


def size_text(size: Expr) -> str:
    """A size for a message: `D`, `64`, `2 * N - 1`."""
    symbols = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
    match size:
        case Constant(value=value):
            return str(value)
        case Size(name=name):
            return name
        case Apply(op=op, args=(left, right)) if op in symbols:
            texts = [f"({size_text(e)})" if isinstance(e, Apply) else size_text(e) for e in (left, right)]
            return f"{texts[0]} {symbols[op]} {texts[1]}"
        case _:
            return "?"
