"""Rewriting rules for truth, as those of `simplify_arithmetic`: chains of `and` and `or`, choices, comparisons."""

from __future__ import annotations

from functools import reduce

from attncc.ir.nodes import Apply, Constant, Expr
from attncc.ir.rewrite import kind_of
from attncc.ir.types import Kind
from attncc.passes.simplify_arithmetic import Rule, apply, int_value, plus, split

TRUE, FALSE = Constant(True), Constant(False)

# Of ints; of floats only those between `eq` and `ne`.
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def opposite(x: Expr) -> Expr:
    """What is true exactly where `x` is not."""
    match x:
        case Constant(value=value):
            return Constant(not value)
        case Apply(op="not", args=(inner,)):
            return inner
        case Apply(op=op, args=args) if op in _OPPOSITE and (op in ("eq", "ne") or kind_of(args[1]) is Kind.INT):
            return Apply(_OPPOSITE[op], args, x.span)
        case _:
            return apply("not", x)


def _not(x: Expr) -> Expr | None:
    result = opposite(x)
    return None if result == apply("not", x) else result


def terms(name: str, expr: Expr) -> list[Expr]:
    """The operands of a chain of `and` or of `or`, from left to right."""
    match expr:
        case Apply(op=op, args=(x, y)) if op == name:
            return [*terms(name, x), *terms(name, y)]
        case _:
            return [expr]


def _chain(name: str) -> Rule:
    """`and` or `or`: each operand once, none that says nothing; settled where two exclude each other."""
    neutral, settled = (TRUE, FALSE) if name == "and" else (FALSE, TRUE)
    dual = "or" if name == "and" else "and"

    def rule(x: Expr, y: Expr) -> Expr | None:
        operands = [*terms(name, x), *terms(name, y)]
        kept: dict[Expr, None] = {}
        for operand in operands:
            if operand == settled or opposite(operand) in kept:
                return settled
            # `a and (a or b)` is `a`.
            absorbed = any(term in kept for term in terms(dual, operand))
            if operand != neutral and operand not in kept and not absorbed:
                kept[operand] = None
        if len(kept) == len(operands):
            return None
        return reduce(lambda chain, operand: apply(name, chain, operand), kept) if kept else neutral

    return rule


def _where(condition: Expr, x: Expr, y: Expr) -> Expr | None:
    match condition, x, y:
        case Constant(value=value), _, _:
            return x if value else y
        case _ if x == y:
            return x
        case Apply(op="not", args=(inner,)), _, _:
            return apply("where", inner, y, x)
        case _, Apply(op="where", args=(inner, a, _)), _ if inner == condition:
            return apply("where", condition, a, y)
        case _, _, Apply(op="where", args=(inner, _, b)) if inner == condition:
            return apply("where", condition, x, b)
        case _, Constant(value=True), _ if kind_of(y) is Kind.BOOL:
            return apply("or", condition, y)
        case _, _, Constant(value=False) if kind_of(x) is Kind.BOOL:
            return apply("and", condition, x)
        case _, Constant(value=False), _ if kind_of(y) is Kind.BOOL:
            return apply("and", apply("not", condition), y)
        case _, _, Constant(value=True) if kind_of(x) is Kind.BOOL:
            return apply("or", apply("not", condition), x)
        case _:
            return None


def _compare(name: str) -> Rule:
    same = Constant(name in ("le", "ge", "eq"))

    def rule(x: Expr, y: Expr) -> Expr | None:
        kind = kind_of(y)
        if kind is Kind.BOOL:
            return _compare_bools(name, x, y)
        if kind is Kind.FLOAT:
            return None
        if x == y:
            return same
        (a, c), (b, d) = split(x), split(y)
        if c != 0 and (value := int_value(y)) is not None:
            return apply(name, a, Constant(value - c))
        if d != 0 and (value := int_value(x)) is not None:
            return apply(name, Constant(value - d), b)
        # x' + c against y' + d: one constant is enough.
        return apply(name, a, plus(b, d - c)) if c != 0 and d != 0 else None

    return rule


def _compare_bools(name: str, x: Expr, y: Expr) -> Expr | None:
    equal = name == "eq"
    if x == y:
        return Constant(equal)
    if opposite(x) == y:
        return Constant(not equal)
    for known, other in ((x, y), (y, x)):
        if isinstance(known, Constant):
            return other if known.value is equal else apply("not", other)
    return None


LOGIC: dict[str, Rule] = {
    "not": _not,
    "and": _chain("and"),
    "or": _chain("or"),
    "where": _where,
    **{name: _compare(name) for name in _OPPOSITE},
}
