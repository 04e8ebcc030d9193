"""What expressions mean under `recurrence:`, where a value may be a key vector, a value vector or the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from attncc.check.expressions import Evaluator, Scope
from attncc.check.name_errors import NotAvailable
from attncc.check.recurrence_errors import ShapeMismatch, WrongProduct, WrongShape
from attncc.check.reporter import Reporter
from attncc.check.rope import Scaling
from attncc.check.values import Meaning, Tensor, Value, apply, reduce, size_text
from attncc.diagnostics import Diagnostic
from attncc.ir.nodes import Apply, Expr, Index, Size
from attncc.ir.recurrence import KEY, QUERY, STATE, VALUE
from attncc.ir.types import Kind
from attncc.source import Span
from attncc.syntax import nodes

KEYS, VALUES = Size("D"), Size("E")
# A value with an element for each of the state's: as a row it has so many.
STATE_SIZE = Apply("mul", (KEYS, VALUES))

_LOCAL = {
    "t": Value(Index("t"), Kind.INT),
    "S": Value(STATE, Kind.FLOAT, STATE_SIZE),
    "q": Value(QUERY, Kind.FLOAT, KEYS),
    "k": Value(KEY, Kind.FLOAT, KEYS),
    "v": Value(VALUE, Kind.FLOAT, VALUES, "e"),
}
_SHAPES: dict[Expr, str] = {KEYS: "a key vector (D)", VALUES: "a value vector (E)", STATE_SIZE: "a matrix (D x E)"}


def shape_text(size: Expr | None) -> str:
    """A shape in words."""
    if size is None:
        return "a scalar"
    return _SHAPES.get(size) or f"a vector of {size_text(size)} elements"


def channel(size: Expr) -> Literal["d", "e"]:
    """What the element of a vector of this size is called."""
    return "e" if size == VALUES else "d"


class RowEvaluator(Evaluator):
    """Evaluates what stands beside `recurrence:`: row transforms, `scale`, `let`; `clause` is which."""

    clause = "let"

    def world(self, name: str, span: Span) -> Value | None:
        if name == "t":
            return Value(Index("t", self.place(span)), Kind.INT)
        if name == "S":
            why = "the state changes from token to token, and this is computed before"
            raise self.fail(NotAvailable(span, name, self.clause, why, "read it under `recurrence:`"))
        return super().world(name, span)

    def matrix_product(self, node: nodes.Binary) -> Value:
        self._operands(node.left, node.right)
        return super().matrix_product(node)


class StatementEvaluator(Evaluator):
    """Evaluates the statements.

    lets: those beside `recurrence:`, evaluated where a statement reads them first. bound: names of `Bind` statements.
    """

    def __init__(self, reporter: Reporter, scope: Scope, depth: int = 0) -> None:
        super().__init__(reporter, scope, depth)
        self.lets: dict[str, nodes.Let] = {}
        self.bound: set[str] = set()

    def name(self, node: nodes.Name) -> Meaning:
        let = self.lets.pop(node.name, None)
        if let is not None:
            self.scope.values[node.name] = self.evaluate(let.value)
        return super().name(node)

    def world(self, name: str, span: Span) -> Value | None:
        if name in _LOCAL:
            local = _LOCAL[name]
            return replace(local, expr=replace(local.expr, span=self.place(span)))
        if name in ("qk", "score"):
            why = "a recurrence has tokens, no pairs of them"
            raise self.fail(NotAvailable(span, name, "recurrence", why, "`dot(q, k)` is that of the token itself"))
        return super().world(name, span)

    # Products

    def matrix_product(self, node: nodes.Binary) -> Value:
        (left, left_span), (right, right_span) = self._operands(node.left, node.right)
        left, right = (
            self.as_float(left, left_span, "an operand of `@`"),
            self.as_float(right, right_span, "an operand of `@`"),
        )
        sizes, span = (left.size, right.size), self.place(node.span)
        if sizes == (KEYS, STATE_SIZE):
            product = apply("mul", _as_large_as_state(left), right, span=span)
            return Value(reduce("sum", _over(product, KEYS), span).expr, Kind.FLOAT, VALUES, "e")
        if sizes == (STATE_SIZE, VALUES):
            product = apply("mul", left, _as_large_as_state(right), span=span)
            return Value(reduce("sum", _over(product, VALUES), span).expr, Kind.FLOAT, KEYS)
        if left.size is not None and left.size == right.size and left.size != STATE_SIZE:
            return reduce("sum", apply("mul", left, right, span=span), span)
        hint = "`x @ S` takes a key vector x (D), `S @ y` a value vector y (E)"
        if None in sizes:
            hint = "a scalar multiplies with `*`"
        elif sizes == (STATE_SIZE, KEYS):
            hint = f"write `{_short(node.right)} @ {_short(node.left)}`: the key channels of the state come first"
        elif sizes == (VALUES, STATE_SIZE):
            hint = f"write `{_short(node.right)} @ {_short(node.left)}`: the value channels of the state come last"
        raise self.fail(WrongProduct(node.span, shape_text(left.size), shape_text(right.size), hint))

    def outer_product(self, node: nodes.Call) -> Value:
        arguments = self._arguments(node, ("x", "y"), frozenset(), "outer(x, y)")
        x, y = (self.value(argument.meaning, argument.span) for argument in arguments.values())
        places = [argument.span for argument in arguments.values()]
        for value, size, place, name in ((x, KEYS, places[0], "first"), (y, VALUES, places[1], "second")):
            if value.size != size:
                hint = "`outer(x, y)` takes a key vector and a value vector, as in `outer(k, v)`"
                role = f"the {name} argument of `outer`"
                raise self.fail(WrongShape(place, role, shape_text(size), shape_text(value.size), hint))
        operands = [(_as_large_as_state(x), places[0]), (_as_large_as_state(y), places[1])]
        return self.apply("mul", operands, node.span, "an argument of `outer`")

    # Shapes

    def subscript(self, node: nodes.Subscript, meaning: Meaning) -> Value:
        """`x[:, None]` and `y[None, :]`: a vector along one axis of the state."""
        if not any(isinstance(index, nodes.Name) and index.name == "None" for index in node.indices):
            return super().subscript(node, meaning)
        value = self.value(meaning, node.base.span)
        match node.indices:
            case (nodes.FullSlice(), nodes.Name(name="None")):
                size = KEYS
            case (nodes.Name(name="None"), nodes.FullSlice()):
                size = VALUES
            case _:
                size = None
        if size is None or value.size != size:
            hint = "`x[:, None]` spreads a key vector over the state, `y[None, :]` a value vector"
            expected = "a key vector (D) or a value vector (E)" if size is None else shape_text(size)
            role = f"what stands before `{node.span.text[node.base.span.end - node.span.start :]}`"
            raise self.fail(WrongShape(node.span, role, expected, shape_text(value.size), hint))
        return _as_large_as_state(value)

    def row_of(self, tensor: Tensor, indices: Sequence[Expr | None], span: Span) -> Value:
        size = tensor.parameter.shape[indices.index(None)]
        index = channel(size)
        filled = tuple(Index(index) if each is None else each for each in indices)
        return Value(tensor.load(filled, self.place(span)), tensor.kind, size, index)

    def float_row(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        value = self.value(meaning, span)
        if value.size == STATE_SIZE or value.size is None:
            hint = "`x @ S` and `S @ y` sum over one axis of the state"
            raise self.fail(WrongShape(span, role, "a vector", shape_text(value.size), hint))
        return self.as_float(value, span, role)

    def scalar(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        value = self.value(meaning, span)
        if value.size is not None:
            hint = "read a tensor with one index per axis, or make a single value of a vector: `sum`, `max`, `dot`"
            raise self.fail(WrongShape(span, role, "a scalar", shape_text(value.size), hint))
        return value

    def row_sizes(self, span: Span, left_size: Expr, right_size: Expr) -> Diagnostic:
        sizes = {left_size, right_size}
        if sizes == {KEYS, VALUES}:
            hint = "`outer(x, y)` is the product of each element of a key vector with each of a value vector"
        elif sizes == {KEYS, STATE_SIZE}:
            hint = "write `x[:, None]` for a key vector that goes with every value channel of the state"
        elif sizes == {VALUES, STATE_SIZE}:
            hint = "write `y[None, :]` for a value vector that goes with every key channel of the state"
        else:
            hint = "declare the axis of the tensor as `D` for a key vector, as `E` for a value vector"
        return ShapeMismatch(span, shape_text(left_size), shape_text(right_size), hint)

    def fitted(self, meaning: Meaning, size: Expr, span: Span, role: str, hint: str) -> Expr:
        """A value of this shape, or a scalar in its place."""
        value = self.as_float(self.value(meaning, span), span, role)
        if value.size not in (size, None):
            raise self.fail(WrongShape(span, role, shape_text(size), shape_text(value.size), hint))
        return value.expr


def _as_large_as_state(vector: Value) -> Value:
    return Value(vector.expr, vector.kind, STATE_SIZE)


def _over(product: Value, size: Expr) -> Value:
    """What is as large as the state, as a vector along one of its axes that the other one does not matter for."""
    return Value(product.expr, product.kind, size, channel(size))


def _short(node: nodes.Expression) -> str:
    text = node.span.text
    return text if len(text) <= 20 and "\n" not in text else "…"
