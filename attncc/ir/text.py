"""A stable, readable text form of the IR, for people, goldens and messages.

Equal nodes print alike and different ones differ: `3` is an int and `3.0` a float, `q[d]` is an element of a row,
`bias[h, q_idx]` a load, `%name` a variable of a plan, `sum(d < D: …)` a reduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Element,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Normalizer,
    Parameter,
    Reduce,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    Summary,
    TensorParameter,
    Variable,
)
from attncc.ir.recurrence import Bind, Recurrence, statement_name


@dataclass(frozen=True, slots=True)
class _Symbol:
    """How tightly an operator binds, and how tightly its operands must to go without parentheses."""

    text: str
    level: int
    left: int
    right: int


def _left_associative(level: int, *symbols: tuple[str, str]) -> dict[str, _Symbol]:
    return {op: _Symbol(text, level, level, level + 1) for op, text in symbols}


def _standing_alone(level: int, *symbols: tuple[str, str]) -> dict[str, _Symbol]:
    return {op: _Symbol(text, level, level + 1, level + 1) for op, text in symbols}


# Python's levels, loosest first.
_OR, _AND, _NOT, _COMPARE, _BIT_OR, _BIT_XOR, _BIT_AND, _SHIFT, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(13)
_INFIX = {
    **_left_associative(_OR, ("or", "or")),
    **_left_associative(_AND, ("and", "and")),
    **_standing_alone(_COMPARE, ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")),
    **_left_associative(_BIT_OR, ("bit_or", "|")),
    **_left_associative(_BIT_XOR, ("bit_xor", "^")),
    **_left_associative(_BIT_AND, ("bit_and", "&")),
    **_left_associative(_SHIFT, ("shl", "<<"), ("shr", ">>")),
    **_left_associative(_SUM, ("add", "+"), ("sub", "-")),
    **_left_associative(_PRODUCT, ("mul", "*"), ("div", "/"), ("floordiv", "//"), ("mod", "%")),
    **_standing_alone(_POWER, ("pow", "**")),
}
_PREFIX = {
    "not": _Symbol("not ", _NOT, _NOT, _NOT),
    "neg": _Symbol("-", _SIGN, _SIGN, _SIGN),
    "bit_not": _Symbol("~", _SIGN, _SIGN, _SIGN),
}


def to_text(node: Attention | Recurrence | Expr) -> str:
    """`node` as text; an attention ends with a line break, an expression does not."""
    match node:
        case Attention():
            return _attention(node)
        case Recurrence():
            return _recurrence(node)
        case _:
            return _expr(node)


def _recurrence(r: Recurrence) -> str:
    lines = [f"recurrence {r.name}({', '.join(_parameter(p) for p in r.parameters)})"]
    if r.doc:
        lines.append(f"  doc = {r.doc!r}")
    lines += [f"  {name:<3} = {_expr(row)}" for name, row in (("q", r.q), ("k", r.k), ("v", r.v))]
    lines.append(f"  keys of {_expr(r.key_width)}" if r.key_width != Size("D") else "")
    lines.append("  divided by the sum" if r.normalizer == "sum" else "")
    lines.append("  for all tokens t, before any output:" if r.bidirectional else "  for each token t:")
    for statement in r.statements:
        let = "let " if isinstance(statement, Bind) else ""
        lines.append(f"    {let}{statement_name(statement):<3} = {_expr(statement.value)}")
    return "\n".join(filter(None, lines)) + "\n"


def _attention(a: Attention) -> str:
    clauses = [("q", _expr(a.q)), ("k", _expr(a.k)), ("v", _expr(a.v)), ("scale", _expr(a.scale))]
    clauses += [("score", _expr(a.score)), ("mask", _expr(a.mask)), *_normalizer(a.normalizer)]
    clauses += [] if a.dropout is None else [("dropout", _expr(a.dropout))]
    lines = [f"attention {a.name}({', '.join(_parameter(p) for p in a.parameters)})"]
    if a.doc:
        lines.append(f"  doc       = {a.doc!r}")
    lines += [f"  {name:<9} = {text}" for name, text in clauses]
    return "\n".join(lines) + "\n"


def _normalizer(normalizer: Normalizer) -> list[tuple[str, str]]:
    match normalizer:
        case Softmax(sink=sink):
            return [("weight", "softmax")] + ([] if sink is None else [("sink", _expr(sink))])
        case Elementwise(weight=weight):
            return [("weight", _expr(weight)), ("normalize", "none")]
        case Sum(weight=weight):
            return [("weight", _expr(weight)), ("normalize", "sum")]
        case _:
            assert_never(normalizer)


def _parameter(parameter: ScalarParameter | TensorParameter) -> str:
    match parameter:
        case ScalarParameter(name=name, kind=kind, default=None):
            return f"{name}: {kind.value}"
        case ScalarParameter(name=name, kind=kind, default=default):
            return f"{name}: {kind.value} = {default!r}"
        case TensorParameter(name=name, dtypes=dtypes, shape=shape, summed=summed):
            elements = "|".join(dtype.value for dtype in dtypes)
            text = f"{name}: {elements}[{', '.join(_expr(size) for size in shape)}]"
            return text if summed is None else f"{text} summed along {summed}"
        case _:
            assert_never(parameter)


def _expr(expr: Expr, level: int = _OR) -> str:
    """`expr`, in parentheses where it binds less tightly than `level`."""
    match expr:
        case Constant(value=value):
            return _constant(value, level)
        case Index(name=name) | Size(name=name) | Parameter(name=name) | Hole(name=name):
            return name
        case Variable(name=name):
            return f"%{name}"
        case Load(tensor=tensor, indices=indices):
            return f"{tensor}[{', '.join(_expr(index) for index in indices)}]"
        case Element(row=row, index=index, upstream=upstream):
            return f"{'d' if upstream else ''}{row}[{_expr(index)}]"
        case Reduce(op=op, body=body, size=size, over=over):
            return f"{op}({over} < {_expr(size)}: {_expr(body)})"
        case Summary(op=op, load=load, axis=axis):
            return f"{op}_{axis}({_expr(load)})"
        case Apply(op=op, args=(a, b)) if op in _INFIX:
            symbol = _INFIX[op]
            return _enclose(f"{_expr(a, symbol.left)} {symbol.text} {_expr(b, symbol.right)}", symbol.level, level)
        case Apply(op="neg", args=(Constant() as constant,)):
            # `-3` is the constant; this is the negation of one.
            return _enclose(f"-({_expr(constant)})", _SIGN, level)
        case Apply(op=op, args=(a,)) if op in _PREFIX:
            symbol = _PREFIX[op]
            return _enclose(f"{symbol.text}{_expr(a, symbol.right)}", symbol.level, level)
        case Apply(op=op, args=args):
            return f"{op}({', '.join(_expr(argument) for argument in args)})"
        case _:
            assert_never(expr)


def _constant(value: bool | float, level: int) -> str:
    text = ("true" if value else "false") if isinstance(value, bool) else repr(value)
    return _enclose(text, _SIGN if text.startswith("-") else _ATOM, level)


def _enclose(text: str, own: int, wanted: int) -> str:
    return text if own >= wanted else f"({text})"
