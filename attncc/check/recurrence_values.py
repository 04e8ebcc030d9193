"""What expressions mean under `recurrence:`, where a value may be a key vector, a value vector or the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from attncc.check.expressions import Evaluator, Scope
from attncc.check.limit_errors import LaterFunction
from attncc.check.name_errors import NotAvailable
from attncc.check.recurrence_errors import ShapeMismatch, WrongProduct, WrongShape
from attncc.check.reporter import Reporter
from attncc.check.rope import Scaling
from attncc.check.row_products import RowProducts
from attncc.check.values import Meaning, Tensor, Value, apply, reduce, size_text
from attncc.check.world import LATER_FUNCTIONS
from attncc.diagnostics import Diagnostic
from attncc.ir.nodes import Apply, Expr, Index, Size
from attncc.ir.recurrence import KEY, QUERY, STATE, VALUE
from attncc.ir.types import Kind
from attncc.passes.algebra import canonical
from attncc.source import Span
from attncc.syntax import nodes

VALUES = Size("E")


@dataclass(frozen=True, slots=True)
class Shapes:
    """How many elements a key vector has, and what is as large as the state: as a row it has that many."""

    keys: Expr = Size("D")

    @property
    def state(self) -> Expr:
        return Apply("mul", (self.keys, VALUES))

    def text(self, size: Expr | None) -> str:
        """A shape in words."""
        keys = size_text(self.keys)
        if size is None:
            return "a scalar"
        if size == self.keys:
            return f"a key vector ({keys})"
        if size == VALUES:
            return "a value vector (E)"
        return f"a matrix ({keys} x E)" if size == self.state else f"a vector of {size_text(size)} elements"


def channel(size: Expr) -> Literal["d", "e"]:
    """What the element of a vector of this size is called."""
    return "e" if size == VALUES else "d"


class RowEvaluator(RowProducts):
    """Evaluates what stands beside `recurrence:` or `feature`: row transforms, `scale`, `let`; `clause` is which.

    of_features: names of `let` lines that read `x`, the row of a feature.
    """

    clause = "let"

    def __init__(self, reporter: Reporter, scope: Scope, depth: int = 0) -> None:
        super().__init__(reporter, scope, depth)
        self.of_features: set[str] = set()

    def name(self, node: nodes.Name) -> Meaning:
        if node.name in self.of_features:
            why = "it reads `x`, the row of `feature`"
            raise self.fail(NotAvailable(node.span, node.name, self.clause, why))
        return super().name(node)

    def world(self, name: str, span: Span) -> Value | None:
        if name == "t":
            return Value(Index("t", self.place(span)), Kind.INT)
        if name == "S":
            why = "the state changes from token to token, and this is computed before"
            raise self.fail(NotAvailable(span, name, self.clause, why, "read it under `recurrence:`"))
        return super().world(name, span)


class StatementEvaluator(Evaluator):
    """Evaluates the statements.

    lets: those beside `recurrence:`, evaluated where a statement reads them first. bound: names of `Bind` statements.
    """

    def __init__(self, reporter: Reporter, scope: Scope, depth: int = 0) -> None:
        super().__init__(reporter, scope, depth)
        self.lets: dict[str, nodes.Let] = {}
        self.bound: set[str] = set()
        self.shapes = Shapes()

    def within(self, scope: Scope) -> Evaluator:
        inner = StatementEvaluator(self.reporter, scope, self.depth)
        inner.shapes = self.shapes
        return inner

    def name(self, node: nodes.Name) -> Meaning:
        let = self.lets.pop(node.name, None)
        if let is not None:
            self.scope.values[node.name] = self.evaluate(let.value)
        return super().name(node)

    def world(self, name: str, span: Span) -> Value | None:
        local = self._local(name)
        if local is not None:
            return replace(local, expr=replace(local.expr, span=self.place(span)))
        if name in ("qk", "score"):
            why = "a recurrence has tokens, no pairs of them"
            raise self.fail(NotAvailable(span, name, "recurrence", why, "`dot(q, k)` is that of the token itself"))
        return super().world(name, span)

    def _local(self, name: str) -> Value | None:
        """The token's own."""
        match name:
            case "t":
                return Value(Index("t"), Kind.INT)
            case "S":
                return Value(STATE, Kind.FLOAT, self.shapes.state)
            case "q" | "k":
                return Value(QUERY if name == "q" else KEY, Kind.FLOAT, self.shapes.keys)
            case "v":
                return Value(VALUE, Kind.FLOAT, VALUES, "e")
            case _:
                return None

    # Products

    def matrix_product(self, node: nodes.Binary) -> Value:
        (left, left_span), (right, right_span) = self._operands(node.left, node.right)
        left, right = (
            self.as_float(left, left_span, "an operand of `@`"),
            self.as_float(right, right_span, "an operand of `@`"),
        )
        sizes, span = (left.size, right.size), self.place(node.span)
        if sizes == (self.shapes.keys, self.shapes.state):
            product = apply("mul", self._as_large_as_state(left), right, span=span)
            return Value(reduce("sum", _over(product, self.shapes.keys), span).expr, Kind.FLOAT, VALUES, "e")
        if sizes == (self.shapes.state, VALUES):
            product = apply("mul", left, self._as_large_as_state(right), span=span)
            return Value(reduce("sum", _over(product, VALUES), span).expr, Kind.FLOAT, self.shapes.keys)
        if left.size is not None and left.size == right.size and left.size != self.shapes.state:
            return reduce("sum", apply("mul", left, right, span=span), span)
        hint = "`x @ S` takes a key vector x (D), `S @ y` a value vector y (E)"
        if sizes == (self.shapes.keys, VALUES):
            matrix = f"outer({_short(node.left)}, {_short(node.right)})"
            hint = f"`{matrix}` is the matrix of their products; `x @ S` takes a key vector x (D)"
        elif None in sizes:
            hint = "a scalar multiplies with `*`"
        elif sizes == (self.shapes.state, self.shapes.keys):
            hint = f"write `{_short(node.right)} @ {_short(node.left)}`: the key channels of the state come first"
        elif sizes == (VALUES, self.shapes.state):
            hint = f"write `{_short(node.right)} @ {_short(node.left)}`: the value channels of the state come last"
        raise self.fail(WrongProduct(node.span, self.shapes.text(left.size), self.shapes.text(right.size), hint))

    def outer_product(self, node: nodes.Call) -> Value:
        arguments = self._arguments(node, ("x", "y"), frozenset(), "outer(x, y)")
        x, y = (self.value(argument.meaning, argument.span) for argument in arguments.values())
        places = [argument.span for argument in arguments.values()]
        for value, size, place, name in ((x, self.shapes.keys, places[0], "first"), (y, VALUES, places[1], "second")):
            if value.size != size:
                hint = "`outer(x, y)` takes a key vector and a value vector, as in `outer(k, v)`"
                role = f"the {name} argument of `outer`"
                raise self.fail(WrongShape(place, role, self.shapes.text(size), self.shapes.text(value.size), hint))
        operands = [(self._as_large_as_state(x), places[0]), (self._as_large_as_state(y), places[1])]
        return self.apply("mul", operands, node.span, "an argument of `outer`")

    def running_sum(self, node: nodes.Call) -> Tensor:
        raise self.fail(LaterFunction(node.span, node.function, LATER_FUNCTIONS[node.function]))

    # Shapes

    def subscript(self, node: nodes.Subscript, meaning: Meaning) -> Value:
        """`x[:, None]` and `y[None, :]`: a vector along one axis of the state."""
        if not any(isinstance(index, nodes.Name) and index.name == "None" for index in node.indices):
            return super().subscript(node, meaning)
        value = self.value(meaning, node.base.span)
        match node.indices:
            case (nodes.FullSlice(), nodes.Name(name="None")):
                size = self.shapes.keys
            case (nodes.Name(name="None"), nodes.FullSlice()):
                size = VALUES
            case _:
                size = None
        if size is None or value.size != size:
            hint = "`x[:, None]` spreads a key vector over the state, `y[None, :]` a value vector"
            expected = "a key vector (D) or a value vector (E)" if size is None else self.shapes.text(size)
            role = f"what stands before `{node.span.text[node.base.span.end - node.span.start :]}`"
            raise self.fail(WrongShape(node.span, role, expected, self.shapes.text(value.size), hint))
        return self._as_large_as_state(value)

    def row_of(self, tensor: Tensor, indices: Sequence[Expr | None], span: Span) -> Value:
        size = canonical(tensor.parameter.shape[indices.index(None)])
        index = channel(size)
        filled = tuple(Index(index) if each is None else each for each in indices)
        return Value(tensor.load(filled, self.place(span)), tensor.kind, size, index)

    def float_row(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        value = self.value(meaning, span)
        if value.size == self.shapes.state or value.size is None:
            hint = "`x @ S` and `S @ y` sum over one axis of the state"
            raise self.fail(WrongShape(span, role, "a vector", self.shapes.text(value.size), hint))
        return self.as_float(value, span, role)

    def scalar(self, meaning: Meaning | Scaling, span: Span, role: str) -> Value:
        value = self.value(meaning, span)
        if value.size is not None:
            hint = "read a tensor with one index per axis, or make a single value of a vector: `sum`, `max`, `dot`"
            raise self.fail(WrongShape(span, role, "a scalar", self.shapes.text(value.size), hint))
        return value

    def row_sizes(self, span: Span, left_size: Expr, right_size: Expr) -> Diagnostic:
        sizes = {left_size, right_size}
        if sizes == {self.shapes.keys, VALUES}:
            hint = "`outer(x, y)` is the product of each element of a key vector with each of a value vector"
        elif sizes == {self.shapes.keys, self.shapes.state}:
            hint = "write `x[:, None]` for a key vector that goes with every value channel of the state"
        elif sizes == {VALUES, self.shapes.state}:
            hint = "write `y[None, :]` for a value vector that goes with every key channel of the state"
        else:
            keys = size_text(self.shapes.keys)
            hint = f"declare the axis of the tensor as `{keys}` for a key vector, as `E` for a value vector"
        return ShapeMismatch(span, self.shapes.text(left_size), self.shapes.text(right_size), hint)

    def _as_large_as_state(self, vector: Value) -> Value:
        return Value(vector.expr, vector.kind, self.shapes.state)

    def fitted(self, meaning: Meaning, size: Expr, span: Span, role: str, hint: str) -> Expr:
        """A value of this shape, or a scalar in its place."""
        value = self.as_float(self.value(meaning, span), span, role)
        if value.size not in (size, None):
            raise self.fail(WrongShape(span, role, self.shapes.text(size), self.shapes.text(value.size), hint))
        return value.expr


def _over(product: Value, size: Expr) -> Value:
    """What is as large as the state, as a vector along one of its axes that the other one does not matter for."""
    return Value(product.expr, product.kind, size, channel(size))


def _short(node: nodes.Expression) -> str:
    text = node.span.text
    return text if len(text) <= 20 and "\n" not in text else "…"
