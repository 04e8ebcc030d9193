"""The clauses that go with a recurrence, written out or made by `feature`: row transforms, features, `let`, `scale`."""

from __future__ import annotations

from collections.abc import Mapping

from attncc.check import clauses
from attncc.check.expressions import Scope
from attncc.check.features import EITHER, POSITION, FeatureRows, Features
from attncc.check.modules import Module
from attncc.check.name_errors import ReservedName
from attncc.check.parameters import Declarations
from attncc.check.recurrence_values import RowEvaluator
from attncc.check.reporter import Reporter
from attncc.ir.nodes import Expr, Index, Size
from attncc.ir.recurrence import Recurrence, Statement
from attncc.ir.rewrite import substitute
from attncc.syntax import nodes
from attncc.syntax.walk import calls_and_names

# A row and its position stand at the token; there are as many queries as tokens.
AT_TOKEN: Mapping[Expr, Expr] = {
    Index("q_idx"): POSITION,
    Index("kv_idx"): POSITION,
    Index("q_row"): Index("t"),
    Size("M"): Size("N"),
}
# The same where queries are others than the tokens.
AT_ROW: Mapping[Expr, Expr] = {
    Index("q_idx"): POSITION,
    Index("kv_idx"): Index("t"),
    Index("q_row"): Index("t"),
}
_ROW_OF_FEATURE = {EITHER: "this is the row that `feature` is made of"}


class RecurrentBody(clauses.Body):
    """The clauses of one attention, read. reserved: names that nothing of it can have, and why."""

    def __init__(
        self,
        attention: nodes.Attention,
        module: Module,
        constants: Mapping[str, object],
        reporter: Reporter,
        reserved: Mapping[str, str],
    ) -> None:
        self.rows = RowEvaluator(reporter, Scope(module, "in this attention"))
        super().__init__(self.rows, reporter)
        self.attention = attention
        self.features = Features(reporter)
        self.lets: dict[str, nodes.Let] = {}
        shared = any(isinstance(s, nodes.Clause) and s.target == "feature" for s in attention.body)
        self.reserved = {**reserved, **(_ROW_OF_FEATURE if shared else {})}
        self.declarations = Declarations(self.rows, reporter)
        self.declarations.declare(attention, constants)
        for parameter in attention.parameters:
            if parameter.name in self.reserved:
                reporter.report(ReservedName(parameter.name_span, parameter.name, self.reserved[parameter.name]))
                self.rows.scope.values.pop(parameter.name, None)
        self.of_parameters = self.parameters()
        self.read(attention)

    def parameters(self) -> Scope:
        """A scope of its own, of what is declared so far."""
        scope = self.evaluator.scope
        return Scope(scope.module, scope.where, dict(scope.values), dict(scope.declared))

    def let(self, let: nodes.Let) -> None:
        scope = self.evaluator.scope
        if let.name in self.reserved:
            self.reporter.report(ReservedName(let.name_span, let.name, self.reserved[let.name]))
            scope.pending.pop(let.name, None)
            return
        if EITHER in self.reserved and let.name not in scope.declared and self._reads_feature_row(let):
            scope.declared[let.name] = let.name_span
            scope.pending.pop(let.name, None)
            self.rows.of_features.add(let.name)
        else:
            super().let(let)
        self.lets.setdefault(let.name, let)

    def _reads_feature_row(self, let: nodes.Let) -> bool:
        mentioned = set(calls_and_names(let.value))
        return bool(mentioned & {EITHER, *self.rows.of_features})

    def clause(self, clause: nodes.Clause) -> None:
        if clause.name == "feature":
            self.features.add(clause)
            return
        self.rows.clause = clause.name
        super().clause(clause)
        self.rows.clause = "let"

    def feature_rows(self, *, bidirectional: bool = False) -> FeatureRows:
        """The rows of q and k, in terms of the token."""
        at = AT_ROW if bidirectional else AT_TOKEN
        q, k = substitute(self.row("q"), at), substitute(self.row("k"), at)
        return self.features.rows(q, k, self.of_parameters, self.lets, bidirectional=bidirectional)

    def recurrence_of(self, rows: FeatureRows, statements: tuple[Statement, ...]) -> Recurrence:
        return Recurrence(
            self.attention.name,
            self.attention.doc or "",
            clauses.in_order(self.attention, self.declarations),
            rows.q,
            rows.k,
            self.row("v"),
            statements,
            rows.width,
        )
