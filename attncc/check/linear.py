"""`feature`: the weight of a pair is the product of the features of its rows, which makes a recurrence of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attncc.check.modules import Module
from attncc.check.name_errors import NotAvailable
from attncc.check.recurrence_errors import BesideFeature
from attncc.check.recurrent_body import AT_ROW, AT_TOKEN, RecurrentBody
from attncc.check.reporter import Reporter
from attncc.check.world import RECURRENT_NAMES
from attncc.diagnostics import Label
from attncc.ir.nodes import Apply, Expr, Index
from attncc.ir.recurrence import QUERY, Recurrence, linear_statements, map_expressions
from attncc.ir.rewrite import contains, substitute
from attncc.passes.reassociate import is_causal, is_true
from attncc.syntax import nodes

_NAMES = {name: why for name, why in RECURRENT_NAMES.items() if name != "scale"}
_BESIDE = {
    "score": "the weight is the product of the features of q and k; transform the rows: `q = …`, `k = …`",
    "weight": "the weight is the product of the features of q and k; a decay goes into a `recurrence:`",
    "mask": "write `mask = causal`, or leave it out: then every query sees all keys",
}


def lower_feature(
    attention: nodes.Attention, module: Module, constants: Mapping[str, object], reporter: Reporter
) -> Recurrence | None:
    """The recurrence of the IR; None where it has errors, which are reported."""
    before = len(reporter.errors)
    body = _Body(attention, module, constants, reporter, _NAMES)
    is_sum = body.normalize_sum()
    bidirectional = not body.is_causal()
    rows = body.feature_rows(bidirectional=bidirectional)
    at: Mapping[Expr, Expr] = AT_ROW if bidirectional else AT_TOKEN
    scale = substitute(body.scale(), at)
    made = body.recurrence_of(rows, linear_statements(scale, rows.width))
    if len(reporter.errors) > before:
        return None
    made = map_expressions(made, lambda expr: substitute(expr, at))
    return replace(made, normalizer="sum" if is_sum else "none", bidirectional=bidirectional)


class _Body(RecurrentBody):
    """The clauses of an attention with `feature`."""

    def clause(self, clause: nodes.Clause) -> None:
        if clause.name in ("score", "weight"):
            self._refuse(clause)
        else:
            super().clause(clause)

    def is_causal(self) -> bool:
        """Whether each query sees the keys up to its own; all of them otherwise."""
        before = len(self.reporter.errors)
        mask = self.mask()
        if len(self.reporter.errors) == before and not is_causal(mask) and not is_true(mask):
            self._refuse(self.clauses["mask"])
        return not is_true(mask)

    def scale(self) -> Expr:
        """What reads the state: the query, times the scale where there is one."""
        clause = self.clauses.get("scale")
        if clause is None:
            return QUERY
        scale = self.number("scale")
        if contains(scale, lambda node: node == Index("kv_idx")):
            why, hint = "a factor of each query alone", "multiply the rows of k by it: `k = …`"
            self.reporter.report(NotAvailable(clause.value.span, "kv_idx", "scale", why, hint))
        return Apply("mul", (scale, QUERY))

    def _refuse(self, clause: nodes.Clause) -> None:
        feature = next(iter(self.features.clauses.values()), None)
        related = () if feature is None else (Label(feature.name_span, "the features"),)
        self.reporter.report(BesideFeature(clause.name_span, clause.name, _BESIDE[clause.name], related=related))
