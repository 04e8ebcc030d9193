"""Cores of recurrences as PyTorch sees them: compiled kernels of a target, and their gradient."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from attncc.runtime.first_derivatives import first_derivatives
from attncc.runtime.recurrent_operands import Operands


class CompiledCore(Protocol):
    """A core compiled for one target and one `CorePlan`.

    offsets: None, or (sequences + 1,) int64: packed sequences lie between them along N, and B is 1; states then have
    one entry per sequence in place of the batch. States are (B, H, D, E), f32 (f64 beside f64), contiguous.
    """

    def forward(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        """Writes o (B, H, N, E), contiguous, and, where it is given, the state after the last token. final_state may
        be initial_state itself."""
        ...

    def backward(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        d_o: Tensor,
        d_state: Tensor | None,
    ) -> tuple[Operands, Tensor]:
        """The gradient of each operand, contiguous and in its shape and type, and that of the initial state, from those
        of o and, where it is not None, of the last state."""
        ...


def run_core(
    core: CompiledCore,
    operands: Operands,
    value_width: int,
    initial_state: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o (B, H, N, E) and the last state, differentiable."""
    o, state = _Core.apply(core, value_width, offsets, initial_state, *operands.tensors)
    return o, state


def kernel_state(given: Tensor | None, q: Tensor) -> Tensor | None:
    """An initial state as kernels take it."""
    return None if given is None else _in_order(given.to(torch.promote_types(q.dtype, torch.float32)))


def _in_order(x: Tensor) -> Tensor:
    """`x` contiguous, and in memory what it says: no lazy negation."""
    return x.resolve_neg().contiguous()


def states_like(operands: Operands, value_width: int, offsets: Tensor | None) -> Tensor:
    """An uninitialised state for each sequence and head."""
    batch, heads, _, width = operands.query.shape
    sequences = batch if offsets is None else len(offsets) - 1
    dtype = torch.promote_types(operands.query.dtype, torch.float32)
    return operands.query.new_empty((sequences, heads, width, value_width), dtype=dtype)


class _Core(torch.autograd.Function):
    """Recomputes the states of chunks in the backward pass instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, core: CompiledCore, value_width: int, offsets: Tensor | None, state: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        operands = Operands.of(tensors)
        ctx.core = core
        ctx.save_for_backward(offsets, state, *tensors)
        o = operands.query.new_empty((*operands.query.shape[:3], value_width))
        last = states_like(operands, value_width, offsets)
        core.forward(operands, state, offsets, o, last)
        return o, last

    @staticmethod
    # PyTorch types it as taking anything.
    def backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Any, ...]:  # type: ignore[override] - two results
        offsets, state, *tensors = ctx.saved_tensors

        def compute() -> tuple[Tensor | None, ...]:
            gradients, d_initial = ctx.core.backward(
                Operands.of(tuple(tensors)), state, offsets, _in_order(d_o), _in_order(d_state)
            )
            return None if state is None else d_initial, *gradients.tensors

        return None, None, None, *first_derivatives(compute, (d_o, d_state, state, *tensors))
