"""The rules of a well-formed attention, checked after the front end and after every pass.

A violation is a fault of the compiler, not of a specification, so it raises `IRError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol, assert_never, get_args

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
    RowName,
    ScalarParameter,
    Size,
    SizeName,
    Softmax,
    Sum,
    Summary,
    TensorParameter,
    Variable,
)
from attncc.ir.operators import OPERATORS
from attncc.ir.text import to_text
from attncc.ir.types import Kind

__all__ = ["IRError", "verify"]

_KIND_OF_CONSTANT: dict[type, Kind] = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT}
_RESERVED = frozenset({*get_args(IndexName), *get_args(SizeName), *get_args(RowName), "dot", "qk", "score"}) - {
    "t",
    "e",
}

_HEAD = frozenset({"b", "h", "hkv"})
_QUERY = _HEAD | {"q_row", "q_idx"}
_KEY = _HEAD | {"kv_idx"}
_SHAPE_SIZES = frozenset(get_args(SizeName)) - {"q_offset"}


class Declared(Protocol):
    """What has parameters."""

    @property
    def parameters(self) -> tuple[ScalarParameter | TensorParameter, ...]: ...
    @property
    def scalars(self) -> tuple[ScalarParameter, ...]: ...
    @property
    def tensors(self) -> tuple[TensorParameter, ...]: ...


@dataclass(frozen=True, slots=True)
class Scope:
    """What may stand in a clause. reduced: the indices that reductions may run over."""

    clause: str
    scalars: dict[str, Kind]
    tensors: dict[str, TensorParameter]
    indices: frozenset[str] = frozenset()
    sizes: frozenset[str] = frozenset(get_args(SizeName))
    holes: frozenset[str] = frozenset()
    row: RowName | None = None
    reduced: frozenset[str] = frozenset()

    def refuse(self, expr: Expr, reason: str) -> NoReturn:
        raise IRError(f"{self.clause}: {reason}, in {to_text(expr)}")


def verify(attention: Attention) -> None:
    """Raise `IRError` unless `attention` is well formed: names declared, kinds as the operators ask for, and in each
    clause only what has a value there (see `Attention`)."""
    scalars, tensors = declarations(attention)

    def check(clause: str, expr: Expr, kind: Kind, **scope: object) -> None:
        expect(expr, kind, replace(Scope(clause, scalars, tensors), **scope))

    check("q", attention.q, Kind.FLOAT, indices=_QUERY | {"d"}, row="q")
    check("k", attention.k, Kind.FLOAT, indices=_KEY | {"d"}, row="k")
    check("v", attention.v, Kind.FLOAT, indices=_KEY | {"d"}, row="v")
    pair = _QUERY | _KEY
    check("scale", attention.scale, Kind.FLOAT, indices=pair)
    check("score", attention.score, Kind.FLOAT, indices=pair, holes=frozenset({"qk"}))
    check("mask", attention.mask, Kind.BOOL, indices=pair)
    match attention.normalizer:
        case Softmax(sink=sink):
            if sink is not None:
                check("sink", sink, Kind.FLOAT, indices=_QUERY)
        case Elementwise(weight=weight) | Sum(weight=weight):
            check("weight", weight, Kind.FLOAT, indices=pair, holes=frozenset({"score"}))
        case _:
            assert_never(attention.normalizer)
    if attention.dropout is not None:
        check("dropout", attention.dropout, Kind.FLOAT, indices=pair)


def declarations(attention: Declared) -> tuple[dict[str, Kind], dict[str, TensorParameter]]:
    seen: set[str] = set()
    for parameter in attention.parameters:
        name = parameter.name
        if not name.isidentifier() or name in _RESERVED:
            raise IRError(f"parameter `{name}`: not a name that a parameter can have")
        if name in seen:
            raise IRError(f"parameter `{name}`: declared twice")
        seen.add(name)
        match parameter:
            case ScalarParameter():
                _check_default(parameter)
            case TensorParameter():
                _check_tensor(parameter)
            case _:
                assert_never(parameter)
    return {p.name: p.kind for p in attention.scalars}, {p.name: p for p in attention.tensors}


def _check_default(parameter: ScalarParameter) -> None:
    default = parameter.default
    if default is None:
        return
    if _KIND_OF_CONSTANT[type(default)] is not parameter.kind:
        raise IRError(f"parameter `{parameter.name}`: default {default!r} is no {parameter.kind.value}")
    if parameter.kind is Kind.INT and not -(2**31) <= default < 2**31:
        raise IRError(f"parameter `{parameter.name}`: default {default} does not fit 32 bits")


def _check_tensor(parameter: TensorParameter) -> None:
    kinds = {dtype.kind for dtype in parameter.dtypes}
    if len(kinds) != 1:
        raise IRError(f"parameter `{parameter.name}`: element types of one kind expected, not {parameter.dtypes}")
    if parameter.summed is not None and (kinds != {Kind.FLOAT} or parameter.summed not in range(len(parameter.shape))):
        raise IRError(f"parameter `{parameter.name}`: no sums of floats along axis {parameter.summed}")
    scope = Scope(f"shape of `{parameter.name}`", {}, {}, sizes=_SHAPE_SIZES)
    for size in parameter.shape:
        expect(size, Kind.INT, scope)


def expect(expr: Expr, kind: Kind, scope: Scope) -> None:
    found = _check(expr, scope)
    if found is not kind:
        scope.refuse(expr, f"expected {kind.value}, found {found.value}")


def _check(expr: Expr, scope: Scope) -> Kind:
    """The kind of `expr`, after checking it and everything below it."""
    match expr:
        case Constant(value=value):
            if isinstance(value, float) and math.isnan(value):
                scope.refuse(expr, "NaN is no constant")
            if type(value) is int and not -(2**63) <= value < 2**63:
                scope.refuse(expr, "the constant does not fit 64 bits")
            return _KIND_OF_CONSTANT[type(value)]
        case Index(name=name):
            if name not in scope.indices:
                scope.refuse(expr, f"`{name}` has no value here")
            return Kind.INT
        case Size(name=name):
            if name not in scope.sizes:
                scope.refuse(expr, f"`{name}` has no value here")
            return Kind.INT
        case Parameter(name=name, kind=kind):
            if scope.scalars.get(name) is not kind:
                scope.refuse(expr, f"`{name}` is not declared as {kind.value}")
            return kind
        case Load():
            return _check_load(expr, scope)
        case Element(row=row, index=index):
            if row != scope.row:
                scope.refuse(expr, f"elements of {row} cannot be read here")
            expect(index, Kind.INT, scope)
            return Kind.FLOAT
        case Reduce(body=body, size=size, over=over):
            if scope.row is None and not scope.reduced:
                scope.refuse(expr, "a reduction stands in a row transform only")
            if over not in (scope.reduced or {"d"}):
                scope.refuse(expr, f"nothing is reduced over `{over}` here")
            expect(body, Kind.FLOAT, replace(scope, indices=scope.indices | {over}))
            expect(size, Kind.INT, Scope(f"{scope.clause}: size of a reduction", {}, {}, sizes=_SHAPE_SIZES))
            return Kind.FLOAT
        case Hole(name=name):
            if name not in scope.holes:
                scope.refuse(expr, f"`{name}` has no value here")
            return Kind.FLOAT
        case Apply():
            return _check_apply(expr, scope)
        case Variable() | Summary():
            return scope.refuse(expr, f"a {type(expr).__name__} belongs to a plan")
        case _:
            assert_never(expr)


def _check_load(load: Load, scope: Scope) -> Kind:
    tensor = scope.tensors.get(load.tensor)
    if tensor is None:
        scope.refuse(load, f"tensor `{load.tensor}` is not declared")
    if load.kind is not tensor.dtypes[0].kind:
        scope.refuse(load, f"`{load.tensor}` holds {tensor.dtypes[0].kind.value}, not {load.kind.value}")
    if len(load.indices) != len(tensor.shape):
        scope.refuse(load, f"`{load.tensor}` has {len(tensor.shape)} axes")
    for index in load.indices:
        expect(index, Kind.INT, scope)
    return load.kind


def _check_apply(expr: Apply, scope: Scope) -> Kind:
    operator = OPERATORS.get(expr.op)
    if operator is None:
        scope.refuse(expr, f"`{expr.op}` is no operator")
    kinds = tuple(_check(argument, scope) for argument in expr.args)
    result = operator.result(kinds)
    if result is None:
        scope.refuse(expr, f"`{expr.op}` does not take ({', '.join(kind.value for kind in kinds)})")
    return result
