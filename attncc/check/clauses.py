"""The clauses of an attention: what each may see, and the attention of the IR that they make."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from attncc.check import binding, suggest
from attncc.check.expressions import Evaluator, Scope
from attncc.check.kinds import Failed
from attncc.check.limit_errors import LaterClause
from attncc.check.modules import Module
from attncc.check.name_errors import Duplicate, ReservedName, UnknownClause
from attncc.check.parameters import Declarations
from attncc.check.reporter import Reporter
from attncc.check.running_sums import resolved
from attncc.check.sight import blind_spots
from attncc.check.type_errors import BadNormalize, NeedsRow, RowSizes, SoftmaxMisplaced
from attncc.check.values import UNKNOWN, Unknown, Value, apply, constant, size_text, size_value
from attncc.check.world import LATER_CLAUSES, ROWS, WORLD, reserved
from attncc.diagnostics import Label
from attncc.ir.nodes import (
    Attention,
    Elementwise,
    Expr,
    Hole,
    Normalizer,
    RowName,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    TensorParameter,
    identity_row,
)
from attncc.ir.rewrite import substitute
from attncc.ir.types import Kind
from attncc.source import Span
from attncc.syntax import nodes

CLAUSES = ("q", "k", "v", "scale", "score", "mask", "weight", "normalize")


def lower(
    attention: nodes.Attention, module: Module, constants: Mapping[str, object], reporter: Reporter
) -> Attention | None:
    """The attention of the IR; None where it has errors, which are reported."""
    before = len(reporter.errors)
    evaluator = Evaluator(reporter, Scope(module, "in this attention"))
    declarations = Declarations(evaluator, reporter)
    declarations.declare(attention, constants)
    body = Body(evaluator, reporter)
    body.read(attention)
    rows = {row: body.row(row) for row in ROWS}
    scale, score, mask = body.number("scale"), body.number("score"), body.mask()
    normalizer = body.normalizer()
    if len(reporter.errors) > before or normalizer is None:
        return None
    made = Attention(
        name=attention.name,
        doc=attention.doc or "",
        parameters=in_order(attention, declarations),
        q=rows["q"],
        k=rows["k"],
        v=rows["v"],
        scale=scale,
        score=score,
        mask=mask,
        normalizer=normalizer,
    )
    return resolved(made, reporter)


def in_order(attention: nodes.Attention, declarations: Declarations) -> tuple[ScalarParameter | TensorParameter, ...]:
    place = {parameter.name: i for i, parameter in enumerate(attention.parameters)}
    return tuple(sorted(declarations.declared, key=lambda parameter: place[parameter.name]))


class Body:
    """The clauses of one attention, evaluated as they are asked for."""

    def __init__(self, evaluator: Evaluator, reporter: Reporter) -> None:
        self.evaluator = evaluator
        self.reporter = reporter
        self.clauses: dict[str, nodes.Clause] = {}
        self.values: dict[str, Value | Unknown] = {}

    def read(self, attention: nodes.Attention) -> None:
        """Sorts the clauses and evaluates each `let` in the order of the lines."""
        scope = self.evaluator.scope
        for statement in attention.body:
            if isinstance(statement, nodes.Let):
                scope.pending.setdefault(statement.name, statement.name_span)
        for statement in attention.body:
            match statement:
                case nodes.Let():
                    self.let(statement)
                case nodes.Recurrence():
                    self.recurrence(statement)
                case nodes.Later(name=name, name_span=span):
                    hint = LATER_CLAUSES.get(name, "see docs/language.md for what this version compiles")
                    self.reporter.report(LaterClause(span, name, hint))
                case nodes.Clause():
                    self.clause(statement)

    def recurrence(self, block: nodes.Recurrence) -> None:
        """Takes note of the statements of a recurrence; pairwise attentions have none."""
        raise AssertionError(f"{block.span}: lowered by `attncc.check.recurrence`")

    def let(self, let: nodes.Let) -> None:
        scope = self.evaluator.scope
        meaning = self.evaluator.evaluate(let.value)
        why = reserved(let.name)
        if why:
            self.reporter.report(ReservedName(let.name_span, let.name, why))
            if let.name not in WORLD:
                scope.values[let.name] = UNKNOWN
        elif let.name in scope.declared:
            first = Label(scope.declared[let.name], "the first one")
            mend = "give each value its own name"
            self.reporter.report(Duplicate(let.name_span, "name", let.name, mend, related=(first,)))
        else:
            scope.values[let.name] = meaning
            scope.declared[let.name] = let.name_span
        scope.pending.pop(let.name, None)

    def clause(self, clause: nodes.Clause) -> None:
        name = clause.name
        if name in LATER_CLAUSES:
            self.reporter.report(LaterClause(clause.name_span, name, LATER_CLAUSES[name]))
            return
        if name not in CLAUSES or clause.of:
            hint = (
                suggest.nearest(name, [*CLAUSES, "feature", "recurrence"])
                or f"a local name is given with `let {name} = …`"
            )
            hint = f"write `{name} = …`" if name in CLAUSES else hint
            self.reporter.report(UnknownClause(clause.name_span, clause.target, hint))
            self.evaluator.evaluate(clause.value)
            return
        if name in self.clauses:
            first = Label(self.clauses[name].name_span, "the first one")
            mend = "combine masks with `and`" if name == "mask" else "combine the two expressions into one"
            self.reporter.report(Duplicate(clause.name_span, "clause", name, mend, related=(first,)))
            return
        self.clauses[name] = clause
        if name == "normalize" or (name == "weight" and _softmax_call(clause.value) is not None):
            return
        self.values[name] = self._evaluated(clause)

    def _evaluated(self, clause: nodes.Clause) -> Value | Unknown:
        try:
            value = self.evaluator.value(self.evaluator.evaluate(clause.value), clause.value.span)
            self.evaluator.refuse_too_large(value, clause.value.span, clause.name)
        except Failed:
            return UNKNOWN
        return value

    # The clauses of rows

    def row(self, name: RowName) -> Expr:
        value = self.values.get(name)
        if not isinstance(value, Value):
            return identity_row(name)
        span = self.clauses[name].value.span
        size = Size(ROWS[name])
        if value.kind is Kind.BOOL:
            self._number_of(value, span, name)
        elif not self._sees(value.expr, name, span):
            pass
        elif value.size is None:
            hint = f"compute it from the row `{name}`, such as `{name} * x`"
            self.reporter.report(NeedsRow(span, f"`{name}`", hint))
        elif value.size != size:
            found, expected = size_text(value.size), size_text(size)
            hint = f"rows of {name} have {expected} elements"
            self.reporter.report(RowSizes(span, found, expected, hint))
        else:
            return self._number_of(value, span, name)
        return identity_row(name)

    # The clauses of pairs

    def number(self, name: str) -> Expr:
        """`scale` and `score`, or their defaults."""
        if name not in self.clauses:
            return default_scale() if name == "scale" else Hole("qk")
        return self._pair(name)

    def mask(self) -> Expr:
        if "mask" not in self.clauses:
            return constant(value=True).expr
        value = self.values["mask"]
        span = self.clauses["mask"].value.span
        if not isinstance(value, Value):
            return constant(value=True).expr
        if value.size is not None:
            self._scalar_of(value, span, "mask")
        elif self._sees(value.expr, "mask", span):
            with suppress(Failed):
                self.evaluator.require(value, Kind.BOOL, span, "`mask`")
        return value.expr

    def _pair(self, name: str) -> Expr:
        value = self.values[name]
        if not isinstance(value, Value):
            return constant(0.0).expr
        span = self.clauses[name].value.span
        if not self._sees(value.expr, name, span) or not self._scalar_of(value, span, name):
            return constant(0.0).expr
        return self._number_of(value, span, name)

    def _scalar_of(self, value: Value, span: Span, name: str) -> bool:
        try:
            self.evaluator.scalar(value, span, f"`{name}`")
        except Failed:
            return False
        return True

    def _number_of(self, value: Value, span: Span, name: str) -> Expr:
        try:
            return self.evaluator.as_float(value, span, f"`{name}`").expr
        except Failed:
            return constant(0.0).expr

    # Weights

    def normalizer(self) -> Normalizer | None:
        clause = self.clauses.get("weight")
        call = None if clause is None else _softmax_call(clause.value)
        if clause is None or call is not None:
            self._refuse_normalize(clause)
            return Softmax() if call is None else self._softmax(call)
        is_sum = self.normalize_sum()
        value = self.values["weight"]
        if not isinstance(value, Value):
            return None
        weight = value.expr
        if "score" not in self.clauses:
            # The score is qk then, and may be called so.
            weight = substitute(weight, {Hole("qk"): Hole("score")})
        span = clause.value.span
        if not self._sees(weight, "weight", span) or not self._scalar_of(value, span, "weight"):
            return None
        weight = self._number_of(Value(weight, value.kind), span, "weight")
        return Sum(weight) if is_sum else Elementwise(weight)

    def _softmax(self, call: nodes.Call) -> Softmax | None:
        bound = binding.bind(call, ("score", "sink"), frozenset(("sink",)), "softmax(score, sink=…)", self.reporter)
        arguments = dict(bound.arguments)
        if "score" in arguments:
            argument = arguments["score"]
            meaning = self.evaluator.evaluate(argument)
            right = (Hole("score"),) if "score" in self.clauses else (Hole("score"), Hole("qk"))
            if isinstance(meaning, Unknown):
                return None
            if not isinstance(meaning, Value) or meaning.expr not in right:
                hint = f"write `score = {_readable(argument.span.text)}` and `weight = softmax(score)`"
                self.reporter.report(
                    SoftmaxMisplaced(argument.span, "the softmax of a row is that of its `score`", hint)
                )
                return None
        if "sink" not in arguments or not bound.is_right:
            return Softmax()
        span = arguments["sink"].span
        try:
            value = self.evaluator.scalar(self.evaluator.evaluate(arguments["sink"]), span, "`sink`")
            self.evaluator.refuse_too_large(value, span, "sink")
            if not self._sees(value.expr, "sink", span):
                return None
            return Softmax(self.evaluator.as_float(value, span, "`sink`").expr)
        except Failed:
            return None

    def normalize_sum(self) -> bool:
        """Whether the clause asks for it."""
        clause = self.clauses.get("normalize")
        if clause is None:
            return False
        match clause.value:
            case nodes.Name(name="sum"):
                return True
            case nodes.Name(name="none"):
                return False
            case other:
                hint = "write `normalize = sum` or `normalize = none`"
                self.reporter.report(BadNormalize(other.span, "`normalize` is `sum` or `none`", hint))
                return False

    def _refuse_normalize(self, weight: nodes.Clause | None) -> None:
        clause = self.clauses.get("normalize")
        if clause is None:
            return
        hint = "remove the line, or give another weight: `weight = exp(score)`"
        related = () if weight is None else (Label(weight.span, "softmax divides by its own sum"),)
        self.reporter.report(BadNormalize(clause.span, "softmax is normalised already", hint, related=related))

    # Sight

    def _sees(self, expr: Expr, clause: str, span: Span) -> bool:
        """Whether a clause reads nothing that it cannot see; what it does is reported where it is read."""
        found = list(blind_spots(expr, clause, span))
        for diagnostic in found:
            self.reporter.report(diagnostic)
        return not found


def _softmax_call(node: nodes.Expression) -> nodes.Call | None:
    return node if isinstance(node, nodes.Call) and node.function == "softmax" else None


def _readable(text: str) -> str:
    return text.replace("score", "qk") if len(text) <= 40 and "\n" not in text else "…"


def default_scale() -> Expr:
    """1 / sqrt(D)."""
    return apply("div", constant(1.0), apply("sqrt", size_value("D"))).expr
