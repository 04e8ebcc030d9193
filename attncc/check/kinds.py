"""Kinds checked and conversions written out; what does not fit is reported at the operand that is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never, assert_never

from attncc.check.limit_errors import TooLarge
from attncc.check.reporter import Reporter
from attncc.check.rope import Scaling
from attncc.check.type_errors import (
    BadValue,
    ConstantOverflow,
    IntPower,
    NeedsRow,
    NeedsScalar,
    NotConstant,
    RowSizes,
    SoftmaxMisplaced,
    WrongIndexCount,
    WrongKind,
)
from attncc.check.values import (
    IntOverflow,
    KindMismatch,
    Meaning,
    SizeMismatch,
    Tensor,
    Unknown,
    Value,
    apply,
    constant,
    element_index,
    extent,
    is_too_large,
    size_text,
    to_float,
)
from attncc.diagnostics import Diagnostic, Label
from attncc.ir.nodes import Constant, Expr
from attncc.ir.types import Kind
from attncc.source import Span

KIND_NAMES = {Kind.BOOL: "a bool", Kind.INT: "an int", Kind.FLOAT: "a float"}

# An int to a constant power is a product; beyond this many factors no int of 64 bits is left.
_MAX_INT_POWER = 63


# What to write for bools in place of an operator on bits, by the end of the role of its operand.
_FOR_BOOLS = {
    "`&`": "bools are combined by `and`, which binds less tightly than comparisons",
    "`|`": "bools are combined by `or`, which binds less tightly than comparisons",
    "`^`": "bools are compared by `!=`",
    "`~`": "write `not`",
}


class Failed(Exception):
    """The expression at hand has an error, which was reported."""


class Kinds:
    """Makes values of a wanted kind out of what expressions mean. Each method raises `Failed` after a report."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    # Errors and places

    def fail(self, diagnostic: Diagnostic) -> Failed:
        self.reporter.report(diagnostic)
        return Failed()

    def place(self, span: Span) -> Span:
        """Where IR nodes made for the text at `span` say that they come from."""
        return self.reporter.span_of(span)

    # Values

    def value(self, meaning: Meaning | Scaling, span: Span) -> Value:
        """A scalar or a row; a tensor of no axis is a scalar, one of one axis a row."""
        match meaning:
            case Value():
                return meaning
            case Tensor(parameter=parameter):
                if len(parameter.shape) == 0:
                    return Value(meaning.load((), self.place(span)), meaning.kind)
                if len(parameter.shape) == 1:
                    return self.row_of(meaning, [None], span)
                related = () if parameter.span is None else (Label(parameter.span, "declared here"),)
                raise self.fail(
                    WrongIndexCount(
                        span,
                        parameter.name,
                        f"{len(parameter.shape)} axes",
                        "no index",
                        meaning.declared.text,
                        related=related,
                    )
                )
            case Unknown():
                raise Failed
            case Scaling():
                raise AssertionError("only `rope` has an argument `scaling`, which takes one")
            case _:
                assert_never(meaning)

    def scalar(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        value = self.value(meaning, span)
        if value.size is not None:
            raise self.fail(NeedsScalar(span, role, size_text(value.size)))
        return value

    def number(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        """A scalar int or float, as a float."""
        return self.as_float(self.scalar(meaning, span, role), span, role)

    def float_row(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        """A row of numbers, as floats."""
        value = self.value(meaning, span)
        if not value.is_row:
            raise self.fail(
                NeedsRow(span, role, "rows are `q`, `k` and `v` in their clauses, and `gain[h, :]` of a tensor")
            )
        return self.as_float(value, span, role)

    def row_of(self, tensor: Tensor, indices: Sequence[Expr | None], span: Span) -> Value:
        axis = indices.index(None)
        filled = tuple(element_index() if index is None else index for index in indices)
        return Value(tensor.load(filled, self.place(span)), tensor.kind, tensor.parameter.shape[axis])

    def as_float(self, value: Value, span: Span, role: str) -> Value:
        """A number, or a row of numbers, as floats."""
        return to_float(self.checked_number((value, span), role))

    def require(self, value: Value, kind: Kind, span: Span, role: str) -> None:
        if value.kind is not kind:
            raise self.fail(self.wrong_kind(value.kind, frozenset((kind,)), span, role))

    def checked_number(self, operand: tuple[Value, Span], role: str) -> Value:
        value, span = operand
        if value.kind is Kind.BOOL:
            raise self.fail(self.wrong_kind(value.kind, frozenset((Kind.INT, Kind.FLOAT)), span, role))
        return value

    def static_int(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        """An int made of sizes and constants."""
        value = self.scalar(meaning, span, role)
        self.require(value, Kind.INT, span, role)
        if not is_static(value.expr):
            raise self.fail(NotConstant(span, role, "made of sizes and constants"))
        return value

    def even_int(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        """An int made of sizes and constants; a positive even one where it is known."""
        value = self.static_int(meaning, span, role)
        if isinstance(value.expr, Constant) and (value.expr.value <= 0 or value.expr.value % 2):
            raise self.fail(BadValue(span, role, "a positive even int", str(value.expr.value)))
        return value

    def static_bool(self, meaning: Meaning | Scaling, span: Span, role: str) -> bool:
        value = self.scalar(meaning, span, role)
        self.require(value, Kind.BOOL, span, role)
        if not isinstance(value.expr, Constant):
            raise self.fail(NotConstant(span, role, "a constant"))
        return bool(value.expr.value)

    def wrong_kind(self, found: Kind, expected: frozenset[Kind], span: Span, role: str) -> Diagnostic:
        hint = kind_hint(found, expected, span.text, role)
        return WrongKind(span, role, expected_text(expected), KIND_NAMES[found], hint)

    def apply(self, op: str, operands: Sequence[tuple[Value, Span]], span: Span, role: str) -> Value:
        """An operator of the table on its operands; a misfit is reported at the operand that is to blame."""
        try:
            return apply(op, *(value for value, _ in operands), span=self.place(span))
        except KindMismatch as mismatch:
            value, operand_span = operands[mismatch.position]
            if op == "where":
                role = ("the condition", "the value before `if`", "the value after `else`")[mismatch.position]
            raise self.fail(self.wrong_kind(value.kind, mismatch.expected, operand_span, role)) from None
        except SizeMismatch as mismatch:
            raise self.fail(self.row_sizes(span, mismatch.left, mismatch.right)) from None
        except IntOverflow as overflow:
            raise self.fail(ConstantOverflow(span, str(overflow.value))) from None

    def row_sizes(self, span: Span, left_size: Expr, right_size: Expr) -> Diagnostic:
        """The error for rows of different sizes that were combined."""
        left, right = size_text(left_size), size_text(right_size)
        row_size = left if left in ("D", "E") else right
        other = right if row_size == left else left
        hint = f"declare the axis of the tensor as `{row_size}` instead of `{other}`"
        return RowSizes(span, left, right, hint)

    def power(self, base: tuple[Value, Span], exponent: tuple[Value, Span], span: Span) -> Value:
        """x ** y, with Python's meaning: ints stay ints where the exponent is a constant of 0 or more."""
        x, y = self.checked_number(base, "the base of `**`"), self.checked_number(exponent, "the exponent of `**`")
        if Kind.FLOAT in (x.kind, y.kind):
            return self.apply("pow", [(to_float(x), base[1]), (to_float(y), exponent[1])], span, "an operand of `**`")
        if not isinstance(y.expr, Constant):
            raise self.fail(IntPower(exponent[1], "this exponent is known at the call only"))
        n = int(y.expr.value)
        if n < 0:
            return self.apply("pow", [(to_float(x), base[1]), (to_float(y), exponent[1])], span, "an operand of `**`")
        if n > _MAX_INT_POWER:
            raise self.fail(IntPower(exponent[1], f"more than {_MAX_INT_POWER} factors"))
        try:
            return _product([x] * n, self.place(span))
        except IntOverflow as overflow:
            raise self.fail(ConstantOverflow(span, str(overflow.value))) from None

    # Refusals

    def misplaced_softmax(self, span: Span) -> Never:
        hint = "write `weight = softmax(score)`, and put what is done to the score into `score = …`"
        raise self.fail(SoftmaxMisplaced(span, "softmax of a single value", hint))

    def refuse_too_large(self, value: Value, span: Span, clause: str) -> None:
        if is_too_large(value.expr):
            terms, depth = extent(value.expr)
            raise self.fail(TooLarge(span, clause, f"{terms:,} terms, {depth} deep"))


def _product(factors: Sequence[Value], span: Span) -> Value:
    """The factors multiplied pair by pair, so that equal products are shared."""
    if not factors:
        return constant(1, span)
    if len(factors) == 1:
        return factors[0]
    half = len(factors) // 2
    first = _product(factors[:half], span)
    second = first if len(factors) == 2 * half else _product(factors[half:], span)
    return apply("mul", first, second, span=span)


def is_static(expr: Expr) -> bool:
    """Whether an int expression is made of sizes and constants alone."""
    from attncc.ir.nodes import Apply, Size

    match expr:
        case Constant() | Size():
            return True
        case Apply(args=args):
            return all(is_static(argument) for argument in args)
        case _:
            return False


def expected_text(expected: frozenset[Kind]) -> str:
    if Kind.FLOAT in expected:
        return "a number"  # An int is made a float.
    return " or ".join(KIND_NAMES[kind] for kind in sorted(expected, key=lambda kind: kind.value))


def kind_hint(found: Kind, expected: frozenset[Kind], text: str, role: str) -> str:
    """What to write instead."""
    short = text if len(text) <= 30 and "\n" not in text else "x"
    match found, expected:
        case Kind.BOOL, _ if role[-3:] in _FOR_BOOLS:
            return _FOR_BOOLS[role[-3:]]
        case Kind.BOOL, _:
            return f"choose by it: `x if {short} else y`; `int({short})` makes 0 or 1 of it"
        case Kind.INT, _ if Kind.BOOL in expected:
            return f"compare it: `{short} != 0`"
        case Kind.FLOAT, _ if Kind.BOOL in expected:
            return f"compare it: `{short} > 0.0`"
        case Kind.FLOAT, _ if Kind.INT in expected:
            if role.endswith("`//`"):
                return "`floor(x / y)` divides floats and rounds down"
            if "/" in text and "//" not in text:
                return "`//` divides ints and rounds down; `/` makes a float"
            return f"`int({short})` drops the fraction"
        case _:
            return ""
