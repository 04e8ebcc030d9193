"""The rules of a well-formed recurrence, checked after the front end and after every pass.

A violation is a fault of the compiler, not of a specification, so it raises `IRError`.
"""

from __future__ import annotations

from dataclasses import replace

from attncc.ir.errors import IRError
from attncc.ir.nodes import Expr, Load, Reduce, RowName, Size, TensorParameter
from attncc.ir.recurrence import CHANNELS, Bind, Output, Recurrence, Statement, Update, statement_name
from attncc.ir.rewrite import contains, has_free, walk
from attncc.ir.text import to_text
from attncc.ir.types import FLOATS, Kind
from attncc.ir.verify import Scope, declarations, expect

_TOKEN = frozenset({"b", "h", "hkv", "t"})
_STATIC = frozenset({"D", "E"})
_RESERVED = frozenset({"t", "S", "out", "d", "e"})


def verify_recurrence(recurrence: Recurrence) -> None:
    """Raise `IRError` unless `recurrence` is well formed: names declared, kinds as the operators ask for, every
    statement over the channels of what it gives a value to, and one output."""
    scalars, tensors = declarations(recurrence)
    for name in _RESERVED & {p.name for p in recurrence.parameters}:
        raise IRError(f"parameter `{name}`: not a name that a parameter can have")
    for row in ("q", "k", "v"):
        scope = Scope(row, scalars, tensors, indices=_TOKEN | {"d"}, row=row, reduced=frozenset({"d", "e"}))
        expect(_transform(recurrence, row), Kind.FLOAT, scope)
    keys = recurrence.key_width
    expect(keys, Kind.INT, Scope("the width of keys", {}, {}, sizes=_STATIC))
    queries = Size("M") if recurrence.bidirectional else Size("N")
    head, token, values = (Size("B"), Size("H")), Size("N"), Size("E")
    shapes: dict[str, tuple[Expr, ...]] = {
        "q": (*head, queries, keys),
        "k": (*head, token, keys),
        "v": (*head, token, values),
        "S": (*head, keys, values),
    }
    local = {name: TensorParameter(name, FLOATS, shape) for name, shape in shapes.items()}
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
            sizes = tuple(size for index, size in (("d", keys), ("e", values)) if index in channels)
            bound = TensorParameter(name, FLOATS, (*head, *sizes))
            scope = replace(scope, tensors={**scope.tensors, name: bound})
    if outputs != 1:
        raise IRError(f"{recurrence.name}: a recurrence has one output, not {outputs}")
    if recurrence.normalizer == "sum":
        _verify_normalized(recurrence)
    if recurrence.bidirectional:
        _verify_bidirectional(recurrence)


def _verify_normalized(recurrence: Recurrence) -> None:
    """The last value column is a column of ones: what varies with value channels is made of v and the state."""
    for statement in recurrence.statements:
        for node in walk(statement.value):
            if isinstance(node, Reduce) and node.over == "e":
                raise IRError(f"{recurrence.name}: a sum over value channels would count the one of the sum of weights")
            if not isinstance(node, Load) or node.tensor in ("v", "S"):
                continue
            if any(has_free(index, "e") for index in node.indices):
                raise IRError(f"{recurrence.name}: {to_text(node)} has no element for the sum of weights")


def _verify_bidirectional(recurrence: Recurrence) -> None:
    for statement in recurrence.statements:
        match statement:
            case Bind():
                raise IRError(f"{recurrence.name}: nothing is bound where every query reads all tokens")
            case Update():
                unseen = {"q"}
            case Output():
                unseen = {"k", "v"}
        if contains(statement.value, lambda node, unseen=unseen: isinstance(node, Load) and node.tensor in unseen):
            raise IRError(f"{recurrence.name}: queries and tokens are different rows, in {to_text(statement.value)}")


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
