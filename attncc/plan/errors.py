"""What no kernel can be planned for (A04xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NoRowGradient(Diagnostic):
    code = "A0411"
    title = "the transform of {row} has no gradient that a kernel could write"
    help = "read the row at `d`, or at an index that leads back when it is applied twice, as `rope` does"
    explanation = (
        "A backward kernel writes the gradient of a row element by element, and gathers it from where the transform "
        "read that element. For that the index must be its own inverse: element d read at p(d) means element p(d) "
        "read at d."
    )
    bad = "q = rope(rope(q, q_idx, dim=32), q_idx)"
    good = "q = rope(q, q_idx)"

    row: str
    index: str
