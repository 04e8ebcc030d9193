"""`recurrence:` and what stands beside it: the recurrence of the IR that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attncc.check import suggest
from attncc.check.kinds import Failed
from attncc.check.modules import Module
from attncc.check.name_errors import Duplicate, ReservedName
from attncc.check.recurrence_errors import BesideRecurrence, NoOutput, NotTheState, UnreadScale
from attncc.check.recurrence_values import VALUES, Shapes, StatementEvaluator
from attncc.check.recurrent_body import AT_TOKEN, RecurrentBody
from attncc.check.reporter import Reporter
from attncc.check.values import UNKNOWN, Unknown, Value
from attncc.check.world import RECURRENT_NAMES, ROWS, reserved
from attncc.diagnostics import Label
from attncc.ir.nodes import Expr, Load
from attncc.ir.recurrence import STATE, Bind, Output, Recurrence, Statement, Update, map_expressions
from attncc.ir.rewrite import contains, substitute
from attncc.ir.types import Kind
from attncc.source import Span
from attncc.syntax import nodes
from attncc.syntax.walk import walk

_OPERATORS = {"*=": "mul", "+=": "add", "-=": "sub"}
_BESIDE = {
    "score": "what goes into the weight of a token is part of the statements: `S += exp(g[b, h, t]) * outer(k, v)`",
    "mask": "a token sees those before it; one that must not count is written with a gate of 0",
    "weight": "the weight of a pair is the product of q and k, and of the decays between them",
    "normalize": "append a column of ones to v, and divide by its output after the call",
}
# What papers call the state, and what a token gets.
_MEANT = {
    **dict.fromkeys(("s", "h", "H", "state"), "the state is `S`"),
    **dict.fromkeys(("o", "y", "output"), "what a token gets is `out = …`"),
}


def lower_recurrence(
    attention: nodes.Attention, module: Module, constants: Mapping[str, object], reporter: Reporter
) -> Recurrence | None:
    """The recurrence of the IR; None where it has errors, which are reported."""
    before = len(reporter.errors)
    body = _Body(attention, module, constants, reporter, RECURRENT_NAMES)
    rows = body.feature_rows()
    body.features.refuse_width_of_values(rows.width)
    body.inner.shapes = Shapes(rows.width)
    statements = body.statements()
    if len(reporter.errors) > before:
        return None
    made = body.recurrence_of(rows, tuple(statements))
    return map_expressions(made, lambda expr: substitute(expr, AT_TOKEN))


class _Body(RecurrentBody):
    """The clauses beside the recurrence, and its statements."""

    def read(self, attention: nodes.Attention) -> None:
        self.block: nodes.Recurrence | None = None
        self.blocks = [statement for statement in attention.body if isinstance(statement, nodes.Recurrence)]
        # Lets mean something else among the statements, and are evaluated once more where those read them.
        self.inner = StatementEvaluator(self.reporter, self.parameters())
        super().read(attention)

    def recurrence(self, block: nodes.Recurrence) -> None:
        if self.block is not None:
            first = Label(self.block.name_span, "the first one")
            mend = "write all statements under one `recurrence:`"
            self.reporter.report(Duplicate(block.name_span, "clause", "recurrence", mend, related=(first,)))
            return
        self.block = block
        self.inner.lets.update(self.lets)
        self.inner.scope.pending.update(self.evaluator.scope.pending)

    def let(self, let: nodes.Let) -> None:
        super().let(let)
        self.inner.scope.declared.setdefault(let.name, let.name_span)

    def clause(self, clause: nodes.Clause) -> None:
        if clause.name in _BESIDE:
            related = (Label(self.blocks[0].name_span, "the recurrence"),)
            self.reporter.report(BesideRecurrence(clause.name_span, clause.name, _BESIDE[clause.name], related=related))
            return
        super().clause(clause)

    # Statements

    def statements(self) -> list[Statement]:
        assert self.block is not None
        block, scope = self.block, self.inner.scope
        scope.values["scale"] = Value(self.number("scale"), Kind.FLOAT)
        for inner in block.body:
            if isinstance(inner, nodes.Let):
                scope.pending.setdefault(inner.name, inner.name_span)
        found: list[Statement] = []
        output: Span | None = None
        for node in block.body:
            match node:
                case nodes.Let():
                    found += self._bind(node)
                case nodes.Clause(name="out"):
                    if output is not None:
                        first = Label(output, "the first one")
                        mend = "a token gives one result; add the two"
                        self.reporter.report(Duplicate(node.name_span, "statement", "out", mend, related=(first,)))
                    output = output or node.name_span
                    found += self._output(node)
                case nodes.Clause() | nodes.Update():
                    found += self._update(node)
        if output is None:
            self.reporter.report(NoOutput(block.name_span))
        self._refuse_unread_scale(block)
        return found

    def _output(self, node: nodes.Clause) -> list[Statement]:
        hint = "a key vector x reads the state by `x @ S`"
        value = self._fitted(node.value, VALUES, "`out`", hint)
        return [] if value is None else [Output(value, node.span)]

    def _update(self, node: nodes.Clause | nodes.Update) -> list[Statement]:
        if node.name != "S":
            hint = suggest.nearest(node.name, ("out", "S")) or f"a name is given with `let {node.name} = …`"
            if node.name in _MEANT:
                hint = _MEANT[node.name]
            if node.name in ROWS:
                hint = f"transform rows beside `recurrence:`, or name the value: `let {node.name}2 = …`"
            if node.name == "out":
                hint = "`out = …` is given once, with all of its terms"
            self.reporter.report(NotTheState(node.name_span, node.name, hint))
            self.inner.evaluate(node.value)
            # Its uses are not to blame.
            self.inner.scope.values.setdefault(node.name, UNKNOWN)
            return []
        if isinstance(node, nodes.Clause):
            value = self._fitted(
                node.value, self.inner.shapes.state, "`S`", "`outer(x, y)` makes a state of two vectors"
            )
            return [] if value is None else [Update(value, node.span)]
        state = Value(replace(STATE, span=node.name_span), Kind.FLOAT, self.inner.shapes.state)
        try:
            meaning = self.inner.evaluate(node.value)
            operand = (self.inner.value(meaning, node.value.span), node.value.span)
            role = f"what stands after `{node.operator}`"
            operands = [(state, node.name_span), operand]
            value = self.inner.apply(_OPERATORS[node.operator], operands, node.span, role)
            self.inner.refuse_too_large(value, node.value.span, "S")
        except Failed:
            return []
        return [Update(value.expr, node.span)]

    def _fitted(self, node: nodes.Expression, size: Expr, role: str, hint: str) -> Expr | None:
        try:
            value = self.inner.fitted(self.inner.evaluate(node), size, node.span, role, hint)
            self.inner.refuse_too_large(Value(value, Kind.FLOAT), node.span, role.strip("`"))
        except Failed:
            return None
        return value

    def _bind(self, let: nodes.Let) -> list[Statement]:
        scope, name = self.inner.scope, let.name
        meaning = self.inner.evaluate(let.value)
        scope.pending.pop(name, None)
        why = RECURRENT_NAMES.get(name) or reserved(name)
        if why:
            self.reporter.report(ReservedName(let.name_span, name, why))
            return []
        if name in scope.declared:
            first = Label(scope.declared[name], "the first one")
            mend = "give each value its own name"
            self.reporter.report(Duplicate(let.name_span, "name", name, mend, related=(first,)))
            return []
        scope.declared[name] = let.name_span
        scope.values[name] = meaning
        if isinstance(meaning, Unknown) or not isinstance(meaning, Value) or not self._reads_state(meaning.expr):
            return []
        try:
            value = self.inner.as_float(meaning, let.value.span, f"`{name}`, which depends on the state,")
            self.inner.refuse_too_large(value, let.value.span, name)
        except Failed:
            scope.values[name] = UNKNOWN
            return []
        bind = Bind(name, value.expr, let.span)
        scope.values[name] = replace(value, expr=bind.load)
        self.inner.bound.add(name)
        return [bind]

    def _reads_state(self, expr: Expr) -> bool:
        local = {"S", *self.inner.bound}
        return contains(expr, lambda node: isinstance(node, Load) and node.tensor in local)

    def _refuse_unread_scale(self, block: nodes.Recurrence) -> None:
        clause = self.clauses.get("scale")
        read = any(node == nodes.Name("scale", block.span) for inner in block.body for node in walk(inner.value))
        if clause is not None and not read:
            self.reporter.report(UnreadScale(clause.span))
