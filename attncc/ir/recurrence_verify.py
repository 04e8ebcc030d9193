"""The rules of a well-formed recurrence, checked after the front end and after every pass.

A violation is a fault of the compiler, not of a specification, so it raises `IRError`.
"""

from __future__ import annotations

from dataclasses import replace

from attncc.ir.errors import IRError
from attncc.ir.nodes import Expr, RowName, Size, TensorParameter
from attncc.ir.recurrence import CHANNELS, Bind, Output, Recurrence, Statement, Update, statement_name
from attncc.ir.rewrite import has_free
from attncc.ir.types import FLOATS, Kind
from attncc.ir.verify import Scope, declarations, expect

_TOKEN = frozenset({"b", "h", "hkv", "t"})
_ROWS: dict[str, tuple[str, ...]] = {"q": ("B", "H", "N", "D"), "k": ("B", "H", "N", "D"), "v": ("B", "H", "N", "E")}
_RESERVED = frozenset({"t", "S", "out", "d", "e"})


def verify_recurrence(recurrence: Recurrence) -> None:
    """Raise `IRError` unless `recurrence` is well formed: names declared, kinds as the operators ask for, every
    statement over the channels of what it gives a value to, and one output."""
    scalars, tensors = declarations(recurrence)
    for name in _RESERVED & {p.name for p in recurrence.parameters}:
        raise IRError(f"parameter `{name}`: not a name that a parameter can have")
    for row in ("q", "k", "v"):
        scope = Scope(row, scalars, tensors, indices=_TOKEN | {"d"}, row=row, reduced=frozenset({"d"}))
        expect(_transform(recurrence, row), Kind.FLOAT, scope)
    local = {name: _local(name, sizes) for name, sizes in _ROWS.items()}
    local["S"] = _local("S", ("B", "H", "D", "E"))
    scope = Scope("", scalars, {**tensors, **local}, indices=_TOKEN, reduced=frozenset({"d", "e"}))
    outputs = 0
    for statement in recurrence.statements:
        name = statement_name(statement)
        channels = _channels(statement)
        expect(statement.value, Kind.FLOAT, replace(scope, clause=name, indices=_TOKEN | channels))
        outputs += isinstance(statement, Output)
        if isinstance(statement, Bind):
            if name in scope.tensors or name in scalars:
                raise IRError(f"`{name}`: bound where it has a meaning already")
            sizes = tuple(size for index, size in (("d", "D"), ("e", "E")) if index in channels)
            bound = _local(name, ("B", "H", *sizes))
            scope = replace(scope, tensors={**scope.tensors, name: bound})
    if outputs != 1:
        raise IRError(f"{recurrence.name}: a recurrence has one output, not {outputs}")


def _channels(statement: Statement) -> frozenset[str]:
    """The channels that what a statement computes runs over."""
    match statement:
        case Update():
            return frozenset({"d", "e"})
        case Output():
            return frozenset({"e"})
        case Bind(value=value):
            return frozenset(index.name for index in CHANNELS if has_free(value, index.name))


def _transform(recurrence: Recurrence, row: RowName) -> Expr:
    return {"q": recurrence.q, "k": recurrence.k, "v": recurrence.v}[row]


def _local(name: str, sizes: tuple[str, ...]) -> TensorParameter:
    return TensorParameter(name, FLOATS, tuple(Size(size) for size in sizes))  # pyright: ignore[reportArgumentType]
