"""`feature`: what the rows of q and of k become before the two meet, of a width of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attncc.check.expressions import Evaluator, Scope
from attncc.check.kinds import Failed
from attncc.check.limit_errors import OtherRow
from attncc.check.name_errors import Duplicate, NotAvailable, UnknownClause
from attncc.check.recurrence_errors import FeatureWidth
from attncc.check.reporter import Reporter
from attncc.check.row_products import RowProducts
from attncc.check.type_errors import NeedsRow
from attncc.check.values import Meaning, Value, size_text
from attncc.check.world import HOLES, ROWS
from attncc.diagnostics import Label
from attncc.ir.nodes import Apply, Expr, Index, RowName, Size
from attncc.ir.rewrite import contains
from attncc.ir.types import Kind
from attncc.source import Span
from attncc.syntax import nodes

# The row of q or of k, in a `feature` that serves both.
EITHER = "x"
POSITION = Apply("add", (Index("t"), Size("q_offset")))


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Element d of the rows of q and k, in terms of the token; `width` is how many there are."""

    q: Expr
    k: Expr
    width: Expr


class Features:
    """The `feature` clauses of one attention."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.clauses: dict[str, nodes.Clause] = {}

    def add(self, clause: nodes.Clause) -> None:
        row = clause.of or EITHER
        if row not in ("q", "k", EITHER) or clause.of == EITHER:
            hint = (
                "`feature = …` is that of q and k, where `x` is the row; `feature(q) = …` and `feature(k) = …` differ"
            )
            self.reporter.report(UnknownClause(clause.name_span, clause.target, hint))
            return
        others = (row,) if clause.of else ("q", "k", EITHER)
        first = next((self.clauses[name] for name in (*others, EITHER) if name in self.clauses), None)
        if first is None:
            self.clauses[row] = clause
            return
        mend = "give one feature map for both, or one for each: `feature(q) = …` and `feature(k) = …`"
        label = Label(first.name_span, "the first one")
        self.reporter.report(Duplicate(clause.name_span, "clause", clause.target, mend, related=(label,)))

    def rows(
        self, q: Expr, k: Expr, scope: Scope, lets: Mapping[str, nodes.Let], *, bidirectional: bool = False
    ) -> FeatureRows:
        """The features of transformed rows; the rows themselves where there is no clause or one with errors.

        scope: parameters. lets: evaluated anew, since their rows are those that features are made of.
        """
        rows: dict[RowName, Value] = {}
        transformed: tuple[tuple[RowName, Expr], ...] = (("q", q), ("k", k))
        positions = {"q": POSITION, "k": Index("t") if bidirectional else POSITION}
        for name, row in transformed:
            value = Value(row, Kind.FLOAT, Size("D"))
            clause = self.clauses.get(name) or self.clauses.get(EITHER)
            if clause is not None:
                evaluator = FeatureEvaluator(self.reporter, replace(scope, values=dict(scope.values)))
                evaluator.lets = dict(lets)
                evaluator.row, evaluator.row_name, evaluator.position = value, clause.of or EITHER, positions[name]
                value = self._row(clause, evaluator) or value
            rows[name] = value
        width, width_k = rows["q"].size, rows["k"].size
        assert width is not None
        assert width_k is not None
        if width != width_k:
            clause = self.clauses.get("k") or self.clauses["q"]
            problem = f"features of q have {size_text(width)} elements, those of k {size_text(width_k)}"
            self.reporter.report(FeatureWidth(clause.value.span, problem, "their product is a sum over both"))
        return FeatureRows(rows["q"].expr, rows["k"].expr, width)

    def refuse_width_of_values(self, width: Expr) -> None:
        """Statements tell key vectors from value vectors by their sizes."""
        if width == Size("E"):
            clause = next(iter(self.clauses.values()))
            problem = "features of E elements, which is how many a value vector has"
            hint = "declare their width as a constant: `R: const int`, and `W: float[H, D, R]`"
            self.reporter.report(FeatureWidth(clause.value.span, problem, hint))

    def _row(self, clause: nodes.Clause, evaluator: FeatureEvaluator) -> Value | None:
        span = clause.value.span
        try:
            value = evaluator.value(evaluator.evaluate(clause.value), span)
            evaluator.refuse_too_large(value, span, clause.target)
            if value.size is None:
                row = clause.of or EITHER
                raise evaluator.fail(NeedsRow(span, f"`{clause.target}`", f"compute it from the row `{row}`"))
            if contains(value.size, lambda node: isinstance(node, Size) and node.name not in ("D", "E")):
                problem = f"a feature of {size_text(value.size)} elements, which no kernel can be made for"
                hint = "make it of constants, `D` and `E`, such as `R: const int = 64` in `W: float[H, D, R]`"
                raise evaluator.fail(FeatureWidth(span, problem, hint))
            return evaluator.as_float(value, span, f"`{clause.target}`")
        except Failed:
            return None


class FeatureEvaluator(RowProducts):
    """Evaluates a feature map of one row: `row`, called `row_name`, at `position`. It reads no other row."""

    row: Value
    row_name: str
    position: Expr
    lets: dict[str, nodes.Let]

    def within(self, scope: Scope) -> Evaluator:
        inner = FeatureEvaluator(self.reporter, scope, self.depth)
        inner.row, inner.row_name, inner.position, inner.lets = self.row, self.row_name, self.position, {}
        return inner

    def name(self, node: nodes.Name) -> Meaning:
        let = self.lets.pop(node.name, None)
        if let is not None:
            self.scope.values[node.name] = self.evaluate(let.value)
        return super().name(node)

    def world(self, name: str, span: Span) -> Value | None:
        if name == self.row_name:
            return self.row
        if name in ROWS:
            if self.row_name == "x" and name != "v":
                hint = f"`x` is the row, of q and of k in turn; `feature({name}) = …` is that of {name} alone"
                raise self.fail(OtherRow(span, "feature", name, hint))
            raise self.fail(OtherRow(span, "feature", name))
        if name in HOLES:
            why = "features are made before queries meet keys"
            raise self.fail(NotAvailable(span, name, "feature", why))
        if name in ("q_idx", "kv_idx"):
            return Value(self.position, Kind.INT)
        return Value(Index("t", self.place(span)), Kind.INT) if name in ("q_row", "t") else super().world(name, span)
