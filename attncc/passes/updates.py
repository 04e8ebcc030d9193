"""The update form of a recurrence: its normal form with everything that happens along one key put together.

    S̃ = decay ⊙ S          S′ = S̃ + Σ key uᵀ,  u = value − eraseᵀ S̃          o = gate ⊙ (queryᵀ S′) + bonus

Before: erasures and writes apart, as many rank-one terms as both together.
After:  a write along the vector that an erasure takes away from is one update with it, as in the delta rule. Chunked
        kernels pay for each update with products of a chunk's tokens, so one less is a third of the work less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.ir.nodes import Expr
from attncc.passes.normal_form import NormalForm, Side
from attncc.passes.simplify import simplify_expr


@dataclass(frozen=True, slots=True)
class Update:
    """The state gains key (over d) times u (over e): value, or nothing, less what erase (over d), if any, reads."""

    key: Expr
    value: Expr | None
    erase: Expr | None


@dataclass(frozen=True, slots=True)
class UpdateForm:
    """log_decay: None where side is "none"; else over no channel, d or e as it says. before: erasures read S, not S̃.
    read: whether query sees S or S′. gate (None: 1) and bonus (None: 0) are over e."""

    log_decay: Expr | None
    side: Side
    updates: tuple[Update, ...]
    before: bool
    query: Expr
    read: Literal["pre", "post"]
    gate: Expr | None
    bonus: Expr | None


def update_form(form: NormalForm) -> UpdateForm:
    """`form`, with each erasure and the write along the same vector as one update."""
    writes = {write.key: write.value for write in form.writes}
    updates = [Update(erase.r, writes.pop(erase.r, None), erase.e) for erase in form.erases]
    updates += [Update(key, value, None) for key, value in writes.items()]
    simple = [Update(simplify_expr(update.key), _simple(update.value), _simple(update.erase)) for update in updates]
    return UpdateForm(
        log_decay=None if form.side == "none" else form.log_decay,
        side=form.side,
        updates=tuple(simple),
        before=any(erase.before for erase in form.erases),
        query=simplify_expr(form.query),
        read=form.read,
        gate=_simple(form.gate),
        bonus=_simple(form.bonus),
    )


def _simple(expr: Expr | None) -> Expr | None:
    return None if expr is None else simplify_expr(expr)
