"""What the expressions of a spec mean: names resolved, definitions expanded, kinds checked, conversions written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

from attncc.check import binding, suggest
from attncc.check.functions import BUILTINS, Argument, CallSite
from attncc.check.kinds import KIND_NAMES, Failed, Kinds
from attncc.check.limit_errors import LaterFunction, MatrixProduct, TooLarge
from attncc.check.modules import Module
from attncc.check.name_errors import NeedsCall, NotAFunction, UnknownFunction, UnknownName, UsedBeforeDefinition
from attncc.check.reporter import Expansion, Reporter
from attncc.check.rope import SCALINGS, Scaling
from attncc.check.running_sums import running_sum
from attncc.check.type_errors import (
    BadValue,
    NeverInside,
    NoAttributes,
    NotConstant,
    NotIndexable,
    WrongIndexCount,
)
from attncc.check.values import (
    MAX_DEPTH,
    UNKNOWN,
    Meaning,
    Tensor,
    Unknown,
    Value,
    constant,
    size_text,
)
from attncc.check.world import COORDINATE_OF, LATER_FUNCTIONS, named
from attncc.diagnostics import Diagnostic, Label
from attncc.ir.nodes import Constant, Expr, Size
from attncc.ir.types import Kind
from attncc.source import Span
from attncc.syntax import nodes

_BINARY = {
    "or": "or",
    "and": "and",
    "|": "bit_or",
    "^": "bit_xor",
    "&": "bit_and",
    "<<": "shl",
    ">>": "shr",
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "//": "floordiv",
    "%": "mod",
}
_UNARY = {"not": "not", "-": "neg", "~": "bit_not"}
_COMPARE = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}


# Expressions that are evaluated for one spec, expanded definitions among them.
MAX_STEPS = 100_000


@dataclass(slots=True)
class Scope:
    """What names mean in one attention, or in the body of one definition.

    values     parameters and `let` names, and where each is declared
    pending    `let` names further down, with their place
    """

    module: Module
    where: str
    values: dict[str, Meaning] = field(default_factory=dict[str, Meaning])
    declared: dict[str, Span] = field(default_factory=dict[str, Span])
    pending: dict[str, Span] = field(default_factory=dict[str, Span])


class Evaluator(Kinds):
    """Evaluates expressions of one scope; errors go to the reporter, and what has one becomes `UNKNOWN`."""

    def __init__(self, reporter: Reporter, scope: Scope, depth: int = 0) -> None:
        super().__init__(reporter)
        self.scope = scope
        self.depth = depth

    # Expressions

    def evaluate(self, node: nodes.Expression) -> Meaning:
        """What the expression means; `UNKNOWN` where it has an error."""
        self.depth += 1
        try:
            self.reporter.steps += 1
            if self.depth > MAX_DEPTH:
                raise self.fail(TooLarge(node.span, "this expression", f"more than {MAX_DEPTH} levels deep"))
            if self.reporter.steps == MAX_STEPS:
                self.fail(TooLarge(node.span, "this spec", f"more than {MAX_STEPS:,} expressions"))
            if self.reporter.steps >= MAX_STEPS:
                raise Failed  # noqa: TRY301 - handled as any part that fails
            return self._evaluate(node)
        except Failed:
            return UNKNOWN
        finally:
            self.depth -= 1

    def _evaluate(self, node: nodes.Expression) -> Meaning:
        match node:
            case nodes.Name():
                return self.name(node)
            case nodes.Number(value=value) | nodes.Boolean(value=value):
                return constant(value, self.place(node.span))
            case nodes.Unary(operator=operator, operand=operand):
                value = self._operand(operand)
                if operator == "+":
                    return self.checked_number(value, f"the operand of `{operator}`")
                return self.apply(_UNARY[operator], [value], node.span, f"the operand of `{operator}`")
            case nodes.Binary():
                return self._binary(node)
            case nodes.Compare(first=first, rest=rest):
                return self._compare(first, rest, node.span)
            case nodes.Conditional(then=then, condition=condition, otherwise=otherwise):
                values = self._operands(condition, then, otherwise)
                return self.apply("where", values, node.span, "`if … else`")
            case nodes.Call():
                return self._call(node)
            case nodes.Subscript():
                return self._subscript(node)
            case nodes.Attribute(name=name):
                raise self.fail(NoAttributes(node.span, name, suggest.attribute(name)))
            case _:
                assert_never(node)

    def _operand(self, node: nodes.Expression) -> tuple[Value, Span]:
        return self.value(self.evaluate(node), node.span), node.span

    def _operands(self, *operands: nodes.Expression) -> list[tuple[Value, Span]]:
        """Every operand, so that an error in one does not hide those in the others."""
        meanings = [(self.evaluate(operand), operand.span) for operand in operands]
        return [(self.value(meaning, span), span) for meaning, span in meanings]

    def _binary(self, node: nodes.Binary) -> Value:
        if node.operator == "@":
            return self.matrix_product(node)
        left, right = self._operands(node.left, node.right)
        if node.operator == "**":
            return self.power(left, right, node.span)
        return self.apply(_BINARY[node.operator], [left, right], node.span, f"an operand of `{node.operator}`")

    def matrix_product(self, node: nodes.Binary) -> Value:
        raise self.fail(MatrixProduct(node.operator_span))

    def _compare(
        self, first: nodes.Expression, rest: Sequence[tuple[nodes.Comparison, nodes.Expression]], span: Span
    ) -> Value:
        values = self._operands(first, *(operand for _, operand in rest))
        result: Value | None = None
        for (operator, _), left, right in zip(rest, values, values[1:], strict=False):
            link = self.apply(_COMPARE[operator], [left, right], span, f"an operand of `{operator}`")
            result = link if result is None else self.apply("and", [(result, span), (link, span)], span, "`and`")
        assert result is not None
        return result

    # Names and definitions

    def name(self, node: nodes.Name) -> Meaning:
        name, scope = node.name, self.scope
        if name in scope.values:
            return scope.values[name]
        if name in scope.pending:
            related = (Label(scope.pending[name], "defined here"),)
            raise self.fail(UsedBeforeDefinition(node.span, name, related=related))
        found = self.world(name, node.span)
        if found is not None:
            return found
        define = scope.module.find(name)
        if define is not None and define[0].parameters is None:
            return self._expand(define, {}, node.span)
        if define is not None:
            parameters = ", ".join(p.name for p in define[0].parameters or ())
            raise self.fail(NeedsCall(node.span, name, f"{name}({parameters})"))
        if name in BUILTINS:
            raise self.fail(NeedsCall(node.span, name, BUILTINS[name].call_text(name)))
        hint, declared = suggest.value(name, scope)
        related = () if declared is None else (Label(declared[1], f"`{declared[0]}` is declared here"),)
        raise self.fail(UnknownName(node.span, name, scope.where, hint, related=related))

    def world(self, name: str, span: Span) -> Value | None:
        """What a name of every spec means."""
        return named(name, self.place(span))

    def within(self, scope: Scope) -> Evaluator:
        """What evaluates the body of a definition."""
        return type(self)(self.reporter, scope, self.depth)

    def _expand(self, found: tuple[nodes.Define, Module], arguments: dict[str, Meaning], use: Span) -> Meaning:
        define, module = found
        if define.name_span in self.reporter.refused or any(isinstance(a, Unknown) for a in arguments.values()):
            return UNKNOWN
        scope = Scope(module, "in this definition", dict(arguments))
        scope.declared = {p.name: p.span for p in define.parameters or ()}
        with self.reporter.expanding(Expansion(define.name, use, module.is_prelude)):
            inner = self.within(scope)
            for parameter in define.parameters or ():
                if parameter.name not in arguments and parameter.default is not None:
                    scope.values[parameter.name] = inner.evaluate(parameter.default)
            return inner.evaluate(define.value)

    def _call(self, node: nodes.Call) -> Meaning:
        name = node.function
        define = self.scope.module.find(name)
        if define is not None and name not in BUILTINS:
            if define[0].parameters is None:
                raise self.fail(NotAFunction(node.span, name, f"use it without brackets: `{name}`"))
            signature = suggest.define_signature(define[0])
            parameters = tuple(p.name for p in define[0].parameters)
            optional = frozenset(p.name for p in define[0].parameters if p.default is not None)
            bound = self._arguments(node, parameters, optional, signature)
            meanings = {name: a.meaning for name, a in bound.items() if not isinstance(a.meaning, Scaling)}
            return self._expand(define, meanings, node.span)
        if name == "outer":
            return self.outer_product(node)
        if name == "concat":
            return self.concatenation(node)
        if name == "cumsum":
            return self.running_sum(node)
        if name in LATER_FUNCTIONS:
            raise self.fail(LaterFunction(node.span, name, LATER_FUNCTIONS[name]))
        builtin = BUILTINS.get(name)
        if builtin is not None:
            signature = builtin.call_text(name)
            parameters = builtin.parameters
            if builtin.variadic:
                parameters = tuple(f"x{i}" for i in range(max(1, len(node.arguments))))
            bound = self._arguments(node, parameters, builtin.optional, signature)
            if any(isinstance(argument.meaning, Unknown) for argument in bound.values()):
                raise Failed
            return builtin.implementation(CallSite(self, name, node.span), bound)
        if name in SCALINGS:
            problem = f"`{name}` is a scaling of rope"
            raise self.fail(NotAFunction(node.span, name, f"{problem}: `rope(q, q_idx, scaling={name}(…))`"))
        if name in self.scope.values or named(name, node.span) is not None:
            for argument in node.arguments:
                self.evaluate(argument)
            hint = f"read an element with `{name}[…]`" if isinstance(self.scope.values.get(name), Tensor) else (
                f"`{name}` is a value: use it without brackets"
            )  # fmt: skip
            raise self.fail(NotAFunction(node.function_span, name, hint))
        raise self.fail(UnknownFunction(node.function_span, name, suggest.function(name, self.scope)))

    def outer_product(self, node: nodes.Call) -> Value:
        raise self.fail(LaterFunction(node.span, node.function, LATER_FUNCTIONS[node.function]))

    def concatenation(self, node: nodes.Call) -> Value:
        raise self.fail(LaterFunction(node.span, node.function, LATER_FUNCTIONS[node.function]))

    def running_sum(self, node: nodes.Call) -> Tensor:
        (argument,) = self._arguments(node, ("x",), frozenset(), "cumsum(x[b, h, :])").values()
        role = "the argument of `cumsum`"
        found = running_sum(self.float_row(argument.meaning, argument.span, role), self.place(node.span))
        if found is None:
            wanted = "a tensor of floats along one axis, such as `x[b, h, :]`"
            raise self.fail(BadValue(argument.span, role, wanted, "another row"))
        return found

    def _arguments(
        self, node: nodes.Call, parameters: tuple[str, ...], optional: frozenset[str], signature: str
    ) -> dict[str, Argument]:
        bound = binding.bind(node, parameters, optional, signature, self.reporter)
        # Evaluate them even where the call itself is wrong: their errors are independent of that.
        evaluated: dict[str, Argument] = {}
        for parameter, expression in bound.arguments:
            if node.function == "rope" and parameter == "scaling" and isinstance(expression, nodes.Call):
                meaning = self._scaling(expression)
            else:
                meaning = self.evaluate(expression)
            evaluated[parameter] = Argument(meaning, expression.span)
        if not bound.is_right:
            raise Failed
        return evaluated

    def _scaling(self, node: nodes.Call) -> Scaling | Unknown:
        kind = SCALINGS.get(node.function)
        if kind is None:
            hint = suggest.nearest(node.function, SCALINGS) or "a scaling is one of " + ", ".join(
                f"`{name}`" for name in SCALINGS
            )
            self.reporter.report(UnknownFunction(node.function_span, node.function, hint))
            return UNKNOWN
        signature = f"{node.function}({', '.join(kind.parameters)})"
        try:
            bound = self._arguments(node, kind.parameters, frozenset(kind.defaults), signature)
            values: dict[str, Value] = {name: constant(value) for name, value in kind.defaults.items()}
            for name, argument in bound.items():
                role = f"`{name}` of `{node.function}`"
                check = self.float_row if name == "factors" else self.number
                values[name] = check(argument.meaning, argument.span, role)
        except Failed:
            return UNKNOWN
        return Scaling(kind.function, values)

    def scaling(self, meaning: Meaning | Scaling, span: Span) -> Scaling:
        if isinstance(meaning, Scaling):
            return meaning
        scalings = ", ".join(f"`{name}(…)`" for name in SCALINGS)
        raise self.fail(NotConstant(span, "`scaling`", f"one of {scalings}"))

    # Elements of tensors

    def _subscript(self, node: nodes.Subscript) -> Value:
        return self.subscript(node, self.evaluate(node.base))

    def subscript(self, node: nodes.Subscript, meaning: Meaning) -> Value:
        slices = [i for i, index in enumerate(node.indices) if isinstance(index, nodes.FullSlice)]
        indices: list[Expr | None] = []
        failed = False
        for index in node.indices:
            if isinstance(index, nodes.FullSlice):
                indices.append(None)
                continue
            try:
                indices.append(self._index(index))
            except Failed:
                failed = True
        if isinstance(meaning, Unknown) or failed:
            raise Failed
        if isinstance(meaning, Value):
            what = "a row" if meaning.is_row else KIND_NAMES[meaning.kind]
            raise self.fail(NotIndexable(node.span, what))
        axes = len(meaning.parameter.shape)
        if len(indices) == axes - 1 and not slices:
            indices.append(None)
        if len(indices) != axes or indices.count(None) > 1:
            raise self.fail(self._wrong_count(meaning, node, len(slices)))
        self._refuse_never_inside(meaning, indices, node)
        if None not in indices:
            return Value(meaning.load(tuple(i for i in indices if i is not None), self.place(node.span)), meaning.kind)
        return self.row_of(meaning, indices, node.span)

    def _index(self, node: nodes.Expression) -> Expr:
        value = self.scalar(self.evaluate(node), node.span, "an index")
        self.require(value, Kind.INT, node.span, "an index")
        return value.expr

    def _refuse_never_inside(self, tensor: Tensor, indices: Sequence[Expr | None], node: nodes.Subscript) -> None:
        """Reports an index that is outside its axis whatever the call: the size of the axis, or a constant."""
        for axis, (index, size) in enumerate(zip(indices, tensor.parameter.shape, strict=True)):
            match index, size:
                case Size(name=name), Size() if index == size:
                    hint = f"did you mean `{COORDINATE_OF[name]}`?" if name in COORDINATE_OF else "write `:` for all"
                case Constant(value=value), _ if value < 0:
                    hint = "indices do not wrap: the last one is the size of the axis - 1"
                case Constant(value=value), Constant(value=length) if value >= length:
                    hint = "indices count from 0"
                case _:
                    continue
            span = node.indices[axis].span
            self.fail(NeverInside(span, tensor.parameter.name, axis, size_text(size), span.text, hint))

    def _wrong_count(self, tensor: Tensor, node: nodes.Subscript, slices: int) -> Diagnostic:
        axes = len(tensor.parameter.shape)
        found = f"{len(node.indices) - slices} ind{'ices' if len(node.indices) - slices != 1 else 'ex'}"
        found += f" and {slices} `:`" if slices else ""
        related = () if tensor.parameter.span is None else (Label(tensor.parameter.span, "declared here"),)
        name = tensor.parameter.name
        shape = tensor.declared.text
        return WrongIndexCount(
            node.span, name, f"{axes} ax{'is' if axes == 1 else 'es'}", found, shape, related=related
        )
