"""Compiled backward passes: what every backend makes of a `BackwardProgram`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from attncc.plan.nodes import BackwardProgram
from attncc.runtime.arguments import Bound


@dataclass(frozen=True, slots=True)
class Results:
    """What a forward pass has given, and the gradients of that.

    o, do          (B, H, M, E)
    total, dtotal  (B, H, M): lse for softmax, what each row was divided by for sum, None where nothing is divided.
                   dtotal None stands for zeros
    """

    o: Tensor
    total: Tensor | None
    do: Tensor
    dtotal: Tensor | None


@dataclass(frozen=True, slots=True)
class Gradients:
    """What the kernels of a backward pass write.

    dq, dk, dv     in type and shape of q, k, v
    adjoints       one per adjoint of the plan, f32 (f64 for f64): (B, H) head, (B, H, M) row, (B, H, N) column,
                   (B, H, M + N - 1) diagonal, the shape of the tensor that is read for pair
    row_adjoints   one per row adjoint of the program, f32 (f64 for f64), (B, heads, rows, width)
    delta          (B, H, M), f32 (f64 for f64): dot(do, o) - dlse; None where the plan does not write it
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    adjoints: tuple[Tensor, ...]
    row_adjoints: tuple[Tensor, ...]
    delta: Tensor | None


class CompiledBackward(Protocol):
    """The kernels of one backward program."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, results: Results) -> Gradients:
        """From a call and what the forward pass gave it: all that its gradients are made of."""
        ...


def compile_backward(program: BackwardProgram, sources: Sequence[str], folder: Path) -> CompiledBackward:
    """Compiles the sources of a backward program, one per kernel, or finds them compiled in `folder`. Raises BuildError
    where that fails."""
    if program.target.backend == "cpp":
        from attncc.runtime.cpp_backward import CppBackward

        return CppBackward(program, sources, folder)
    from attncc.runtime.triton_backward import TritonBackward

    return TritonBackward(program, sources, folder)
