"""Runs a recurrence by its normal form, token by token in float64: nothing of its statements is looked at."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attncc.ir.nodes import Expr
from attncc.ir.recurrence import Recurrence
from attncc.passes.normal_form import NormalForm
from attncc.recurrent_reference import at_token, token_scope
from attncc.reference import value


def run(
    form: NormalForm,
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    state: Tensor,
    *,
    by_logarithm: bool = False,
) -> tuple[Tensor, Tensor]:
    """o and the last state. by_logarithm: the decay is exp of what kernels sum up."""
    scope = token_scope(recurrence, q, k, v, inputs, 0)
    outputs = []
    for t in range(q.shape[2]):
        at = at_token(scope, t)

        def at_channels(expr: Expr, at=at) -> Tensor:
            return value(expr, at).broadcast_to(torch.broadcast_shapes(value(expr, at).shape, (1, 1, 1, 1)))

        decay = at_channels(form.log_decay).exp() if by_logarithm else at_channels(form.decay)
        before, state = state, decay * state
        erased = [
            (at_channels(erase.e) * (before if erase.before else state)).sum(-2, keepdim=True) for erase in form.erases
        ]
        for erase, z in zip(form.erases, erased, strict=True):
            state = state - at_channels(erase.r) * z
        for write in form.writes:
            state = state + at_channels(write.key) * at_channels(write.value)
        o = (at_channels(form.query) * (before if form.read == "pre" else state)).sum(-2, keepdim=True)
        o = o if form.gate is None else o * at_channels(form.gate)
        o = o if form.bonus is None else o + at_channels(form.bonus)
        outputs.append(o.expand(*state.shape[:2], 1, state.shape[3]))
    o = torch.cat(outputs, 2)
    if recurrence.normalizer == "sum":
        nothing = o[..., -1:] == 0
        o = torch.where(nothing, 0, o[..., :-1]) / torch.where(nothing, 1, o[..., -1:])
    return o, state
