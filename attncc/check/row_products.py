"""Products of rows with matrices and with each other, and rows put one after another: what changes a row's width.

Element d of `x @ W` is a sum over e. A row within it that sums over e itself does so over d there: two names for the
places in a row are enough, since a row varies with one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attncc.check.expressions import Evaluator
from attncc.check.kinds import Failed
from attncc.check.limit_errors import LaterFunction
from attncc.check.recurrence_errors import WrongProduct
from attncc.check.values import Tensor, Unknown, Value, reduce, size_text, to_float
from attncc.check.world import LATER_FUNCTIONS
from attncc.ir.nodes import Apply, Constant, Expr, Index, Reduce
from attncc.ir.rewrite import substitute, swap_channels
from attncc.ir.types import Kind
from attncc.passes.algebra import canonical
from attncc.source import Span
from attncc.syntax import nodes

_D, _E = Index("d"), Index("e")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor with two axes left whole: None among its indices."""

    tensor: Tensor
    indices: tuple[Expr | None, ...]

    @property
    def sizes(self) -> tuple[Expr, Expr]:
        shape = self.tensor.parameter.shape
        first, second = (canonical(size) for index, size in zip(self.indices, shape, strict=True) if index is None)
        return first, second

    def element(self, row: Index, column: Index, span: Span) -> Value:
        places = iter((row, column))
        indices = tuple(next(places) if index is None else index for index in self.indices)
        return to_float(Value(self.tensor.load(indices, span), self.tensor.kind))


class RowProducts(Evaluator):
    """Evaluates expressions of rows, whose width may change."""

    def row_of(self, tensor: Tensor, indices: Sequence[Expr | None], span: Span) -> Value:
        row = super().row_of(tensor, indices, span)
        assert row.size is not None
        return replace(row, size=canonical(row.size))

    def matrix_product(self, node: nodes.Binary) -> Value:
        sides = [(side, self._factor(side)) for side in (node.left, node.right)]
        (_, left), (_, right) = sides
        span = self.place(node.span)
        match left, right:
            case Value(), Matrix(sizes=(size, width)) if left.size == size:
                return _summed(left, right.element(_E, _D, span), size, width, span)
            case Matrix(sizes=(width, size)), Value() if right.size == size:
                return _summed(right, left.element(_D, _E, span), size, width, span)
            case Value(), Value() if left.is_row and left.size == right.size:
                operands = [(left, node.left.span), (right, node.right.span)]
                return reduce("sum", self.apply("mul", operands, node.span, "an operand of `@`"), span)
            case _:
                hint = "`x @ W[h]` takes a row of as many elements as `W[h]` has rows: declare `W: float[H, D, R]`"
                raise self.fail(WrongProduct(node.span, _text(left), _text(right), hint))

    def _factor(self, node: nodes.Expression) -> Value | Matrix:
        """A row or a scalar of numbers, or a matrix."""
        base, written = (node.base, node.indices) if isinstance(node, nodes.Subscript) else (node, ())
        tensor = self.evaluate(base) if isinstance(base, nodes.Name) else None
        if isinstance(tensor, Unknown):
            raise Failed
        places = [index for index in written if not isinstance(index, nodes.FullSlice)]
        if not isinstance(tensor, Tensor) or len(tensor.parameter.shape) != len(places) + 2:
            role = "an operand of `@`"
            return self.as_float(self.value(self.evaluate(node), node.span), node.span, role)
        indices = [None if isinstance(index, nodes.FullSlice) else self._index(index) for index in written]
        indices += [None] * (len(tensor.parameter.shape) - len(indices))
        if isinstance(node, nodes.Subscript):
            self._refuse_never_inside(tensor, indices, node)
        if tensor.kind is Kind.BOOL:
            raise self.fail(self.wrong_kind(Kind.BOOL, frozenset((Kind.FLOAT,)), node.span, "an operand of `@`"))
        return Matrix(tensor, tuple(indices))

    def running_sum(self, node: nodes.Call) -> Tensor:
        raise self.fail(LaterFunction(node.span, node.function, LATER_FUNCTIONS[node.function]))

    def outer_product(self, node: nodes.Call) -> Value:
        arguments = self._arguments(node, ("x", "y"), frozenset(), "outer(x, y)")
        x, y = (self.float_row(a.meaning, a.span, "an argument of `outer`") for a in arguments.values())
        assert x.size is not None
        assert y.size is not None
        first, second = Apply("floordiv", (_D, y.size)), Apply("mod", (_D, y.size))
        product = Apply("mul", (substitute(x.expr, {_D: first}), substitute(y.expr, {_D: second})))
        return Value(_placed(product, self.place(node.span)), Kind.FLOAT, canonical(Apply("mul", (x.size, y.size))))

    def concatenation(self, node: nodes.Call) -> Value:
        parameters = tuple(f"x{i}" for i in range(max(1, len(node.arguments))))
        arguments = self._arguments(node, parameters, frozenset(), "concat(x, y, …)").values()
        role = "an argument of `concat`"
        parts = [self.as_float(self.value(a.meaning, a.span), a.span, role) for a in arguments]
        ends: list[Expr] = []
        for part in parts:
            size = part.size or Constant(1)
            ends.append(canonical(Apply("add", (ends[-1], size))) if ends else size)
        result = _moved(parts[-1].expr, ends[-2]) if len(parts) > 1 else parts[0].expr
        for i in reversed(range(len(parts) - 1)):
            here = parts[i].expr if i == 0 else _moved(parts[i].expr, ends[i - 1])
            result = Apply("where", (Apply("lt", (_D, ends[i])), here, result))
        return Value(_placed(result, self.place(node.span)), Kind.FLOAT, ends[-1])


def _summed(row: Value, element: Value, size: Expr, width: Expr, span: Span) -> Value:
    """The sum over e of the row's element times that of a matrix: a row of this width."""
    body = Apply("mul", (swap_channels(row.expr), element.expr), span)
    return Value(Reduce("sum", body, size, span, over="e"), Kind.FLOAT, width)


def _moved(expr: Expr, offset: Expr) -> Expr:
    return substitute(expr, {_D: Apply("sub", (_D, offset))})


def _placed(expr: Expr, span: Span) -> Expr:
    return Apply(expr.op, expr.args, span) if isinstance(expr, Apply) else expr


def _text(operand: Value | Matrix) -> str:
    match operand:
        case Matrix(sizes=(rows, columns)):
            return f"a matrix ({size_text(rows)} x {size_text(columns)})"
        case Value(size=size):
            return "a scalar" if size is None else f"a row of {size_text(size)} elements"
