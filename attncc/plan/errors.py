"""Errors of planning: what no kernel can be made of (A057x)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class StateInIndex(Diagnostic):
    code = "A0571"
    title = "`{tensor}` is read at a place that depends on the state"
    label = "this place is known only when the token's turn comes"
    help = "choose among values with `if … else`, or compute the value instead of looking it up"
    explanation = (
        "A recurrence that has no normal form runs token by token. What it reads of captured tensors is read for all "
        "tokens beforehand, so that the kernel itself has the state and vectors alone. `attn.reference` computes it."
    )
    bad = "S = levels[int(max(k @ S))] * S"
    good = "S = (levels[1] if max(k @ S) > 0.0 else levels[0]) * S"

    tensor: str


@dataclass(frozen=True, slots=True)
class StateTooLarge(Diagnostic):
    code = "A0572"
    title = "the state of `{name}`, {key_width} x {value_width} values, is too large for {target}"
    help = 'use narrower heads, or `target="cpp"`'
    explanation = (
        "A recurrence that has no normal form runs token by token, and on a GPU each program holds the state of a head "
        "in registers: up to {limit} bytes of it, with both widths rounded up to powers of two. Where the statements "
        "do not sum over value channels a program holds some of the value channels only, and widths do not matter."
    )
    bad = 'attncc.build("coupled.attn", target="triton")(torch.randn(1, 8, 512, 512), k, v)'
    good = 'attncc.build("coupled.attn", target="triton")(torch.randn(1, 8, 512, 64), k, v)'

    name: str
    key_width: int
    value_width: int
    target: str
    limit: int
