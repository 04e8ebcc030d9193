"""The functions of the language that are not written in it: how each is called, and what it makes of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from attncc.check import rope
from attncc.check.recurrence_errors import WrongShape
from attncc.check.rope import Scaling
from attncc.check.values import Meaning, Value, apply, constant, reduce
from attncc.check.world import LATER_FUNCTIONS
from attncc.ir.operators import OPERATORS
from attncc.ir.types import Kind
from attncc.source import Span

if TYPE_CHECKING:
    from attncc.check.expressions import Evaluator


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument as it was evaluated, and where it stands."""

    meaning: Meaning | Scaling
    span: Span


@dataclass(frozen=True, slots=True)
class CallSite:
    """One call of a builtin: who evaluates it, and where it stands."""

    evaluator: Evaluator
    name: str
    span: Span

    def value(self, argument: Argument) -> Value:
        return self.evaluator.value(argument.meaning, argument.span)

    def scalar(self, argument: Argument) -> Value:
        return self.evaluator.scalar(argument.meaning, argument.span, f"the argument of `{self.name}`")

    def number(self, argument: Argument) -> Value:
        """A scalar int or float, as a float."""
        return self.evaluator.number(argument.meaning, argument.span, f"the argument of `{self.name}`")

    def row(self, argument: Argument) -> Value:
        """A row of floats."""
        return self.evaluator.float_row(argument.meaning, argument.span, f"the argument of `{self.name}`")

    def apply(self, op: str, *arguments: Argument) -> Value:
        values = [(self.value(argument), argument.span) for argument in arguments]
        return self.evaluator.apply(op, values, self.span, f"`{self.name}`")


Implementation: TypeAlias = Callable[[CallSite, Mapping[str, Argument]], Value]


@dataclass(frozen=True, slots=True)
class Builtin:
    """A function: `parameters` in order, those in `optional` may be left out; `variadic` takes one argument or more."""

    parameters: tuple[str, ...]
    implementation: Implementation
    optional: frozenset[str] = frozenset()
    variadic: bool = False
    signature: str = ""

    def call_text(self, name: str) -> str:
        return self.signature or f"{name}({', '.join(self.parameters)})"


def _operator(op: str, *parameters: str) -> Builtin:
    def implementation(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
        return site.apply(op, *arguments.values())

    return Builtin(parameters or ("x", "y", "z")[: OPERATORS[op].arity], implementation)


def _extremum(op: str) -> Builtin:
    def implementation(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
        if len(arguments) > 1:
            values = [(site.value(argument), argument.span) for argument in arguments.values()]
            (result, span), *rest = values
            for value, value_span in rest:
                result = site.evaluator.apply(op, [(result, span), (value, value_span)], site.span, f"`{site.name}`")
                span = site.span
            return result
        (argument,) = arguments.values()
        row = site.row(argument)
        span = site.evaluator.place(site.span)
        return reduce("max", row, span) if op == "max" else -reduce("max", -row, span)

    return Builtin(("x",), implementation, variadic=True, signature=f"{op}(x, y, …)` or `{op}(row)")


def _sum(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    return reduce("sum", site.row(arguments["row"]), site.evaluator.place(site.span))


def _mean(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    row = site.row(arguments["row"])
    assert row.size is not None
    return reduce("sum", row, site.evaluator.place(site.span)) / Value(row.size, Kind.INT)


def _dot(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    x, y = arguments["x"], arguments["y"]
    rows = [(site.row(x), x.span), (site.row(y), y.span)]
    product = site.evaluator.apply("mul", rows, site.span, f"`{site.name}`")
    return reduce("sum", product, site.evaluator.place(site.span))


def _softmax(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    argument = arguments["row"]
    value = site.value(argument)
    if not value.is_row:
        raise site.evaluator.misplaced_softmax(site.span)
    row = site.row(argument)
    span = site.evaluator.place(site.span)
    weights = apply("exp", row - reduce("max", row, span))
    return weights / reduce("sum", weights, span)


def _to_int(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    value = site.value(arguments["x"])
    return value if value.kind is Kind.INT else site.apply("to_int", arguments["x"])


def _to_float(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    value = site.value(arguments["x"])
    return value if value.kind is Kind.FLOAT else site.apply("to_float", arguments["x"])


def _rope(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    evaluator = site.evaluator
    row = site.row(arguments["x"])
    assert row.size is not None
    evaluator.refuse_too_large(row, site.span, site.name)
    if row.index != "d":
        hint = "rotate it beside `recurrence:`, where `v = rope(v, t)` transforms the row"
        role, found = "the argument of `rope`", "a value vector (E)"
        raise evaluator.fail(WrongShape(arguments["x"].span, role, "a key vector (D)", found, hint))
    given = arguments.get("dim")
    size = Value(row.size, Kind.INT)
    # A row that is shorter is rotated as a whole, so that no element beyond it is read.
    dim = apply("min", evaluator.even_int(given.meaning, given.span, "`dim`"), size) if given else size
    paired = arguments.get("interleaved")
    base = arguments.get("base")
    scaling = arguments.get("scaling")
    return rope.rotated(
        row,
        site.number(arguments["position"]),
        base=site.number(base) if base else constant(10000.0),
        scaling=evaluator.scaling(scaling.meaning, scaling.span) if scaling else None,
        interleaved=evaluator.static_bool(paired.meaning, paired.span, "`interleaved`") if paired else False,
        dim=dim,
        span=evaluator.place(site.span),
    )


def _power(site: CallSite, arguments: Mapping[str, Argument]) -> Value:
    x, y = arguments["x"], arguments["y"]
    return site.evaluator.power((site.value(x), x.span), (site.value(y), y.span), site.span)


_PLAIN = [
    "abs",
    "exp",
    "exp2",
    "log",
    "log2",
    "log1p",
    "sqrt",
    "rsqrt",
    "tanh",
    "sigmoid",
    "relu",
    "gelu",
    "silu",
    "elu",
    "softplus",
    "sin",
    "cos",
    "erf",
    "floor",
    "ceil",
    "round",
    "sign",
    "popcount",
    "bit_length",
]

BUILTINS: dict[str, Builtin] = {
    **{name: _operator(name) for name in _PLAIN},
    "where": _operator("where", "condition", "x", "y"),
    "pow": Builtin(("x", "y"), _power),
    "min": _extremum("min"),
    "max": _extremum("max"),
    "int": Builtin(("x",), _to_int),
    "float": Builtin(("x",), _to_float),
    "sum": Builtin(("row",), _sum),
    "mean": Builtin(("row",), _mean),
    "dot": Builtin(("x", "y"), _dot),
    "softmax": Builtin(("row",), _softmax),
    "rope": Builtin(
        ("x", "position", "base", "scaling", "interleaved", "dim"),
        _rope,
        optional=frozenset(("base", "scaling", "interleaved", "dim")),
        signature="rope(x, position, base=10000, scaling=…, interleaved=false, dim=D)",
    ),
}


def is_builtin(name: str) -> bool:
    """Whether a function of this name is built in."""
    return name in BUILTINS or name in LATER_FUNCTIONS or name in rope.SCALINGS
