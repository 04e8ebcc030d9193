"""What a compiled sequential kernel does, on whatever target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class CompiledSequential(Protocol):
    """A sequential kernel compiled for one target and one plan.

    operands: (B, H, N, D, E) in the order of the plan, each axis 1 where nothing differs along it. offsets: None, or
    (sequences + 1,) int64: packed sequences lie between them along N, and B is 1; states then have one entry per
    sequence in place of the batch. States are (B, H, D, E), f32 (f64 beside f64), contiguous.
    """

    def forward(
        self,
        operands: Sequence[Tensor],
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        """Writes o (B, H, N, E), contiguous and of `plan.stored`, if tokens have an output, and, where it is given, the
        state after the last token. final_state may be initial_state itself."""
        ...
