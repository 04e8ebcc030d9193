"""Errors of calls of recurrences."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NoRecurrentKernel(Diagnostic):
    code = "A0547"
    title = "this version has no kernel for the recurrence `{name}`"
    help = "attn.reference(q, k, v, …) computes it in float64, token by token; `attncc explain` prints its normal form"
    explanation = (
        "A recurrence is read, checked and brought to its normal form, and its float64 reference runs, forward and "
        "backward. The chunked kernel and the one-token step come with a later version."
    )
    bad = 'attncc.build("examples/recurrent/retnet.attn")(q, k, v, gamma=gamma)'
    good = 'attncc.build("examples/recurrent/retnet.attn").reference(q, k, v, gamma=gamma)'

    name: str


@dataclass(frozen=True, slots=True)
class RecurrentHeads(Diagnostic):
    code = "A0620"
    title = "`{name}` has {found} heads, which do not divide {heads}"
    help = "the greatest number of heads of q, k and v is that of the states; each of them must divide it"
    explanation = (
        "A recurrence has as many states as the one of q, k and v that has the most heads, H. The others may have "
        "fewer: head h of the state reads head h // (H // heads) of each."
    )
    bad = "attn.reference(torch.randn(1, 3, 16, 64), torch.randn(1, 3, 16, 64), torch.randn(1, 8, 16, 64))"
    good = "attn.reference(torch.randn(1, 4, 16, 64), torch.randn(1, 4, 16, 64), torch.randn(1, 8, 16, 64))"

    name: str
    found: int
    heads: int
