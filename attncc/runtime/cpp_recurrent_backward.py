"""Gradients of recurrent cores on the C++ target: allocates what the kernel writes, packs arguments, launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from attncc.emit.recurrent_backward_cpp import backward_fields, render_backward
from attncc.plan.recurrent import CorePlan, gradient_of
from attncc.runtime.cpp import CppKernel, kernel_of
from attncc.runtime.cpp_recurrent import operand_slots, pointer, readable, size_slots
from attncc.runtime.programs import contiguous
from attncc.runtime.recurrent_core import states_like
from attncc.runtime.recurrent_operands import Operands


class CppGradients:
    """The shared library of the gradients of a core."""

    def __init__(self, plan: CorePlan, kernel: CppKernel) -> None:
        self._plan = plan
        self._kernel = kernel

    def run(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        d_o: Tensor,
        d_state: Tensor | None,
    ) -> tuple[Operands, Tensor]:
        """As `CompiledCore.backward`."""
        gradients = Operands.of(tuple(None if x is None else _like(x) for x in operands.tensors))
        if self._plan.side != "value":
            return gradients, self._launch(operands, initial_state, offsets, d_o, d_state, gradients)
        # The kernel takes this for a decay of key channels: keys and values change places, query and gradient of o. Of
        # what it writes, o has the place of the gradient by the query.
        state, last = (None if x is None else x.mT.contiguous() for x in (initial_state, d_state))
        rows = replace(_with_keys_as_values(operands), query=d_o)
        d_initial = self._launch(rows, state, offsets, operands.query, last, _with_keys_as_values(gradients))
        return gradients, d_initial.mT.contiguous()

    def _launch(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        d_o: Tensor,
        d_state: Tensor | None,
        gradients: Operands,
    ) -> Tensor:
        """Fills `gradients`; the gradient of the initial state."""
        rows, d_rows = readable(operands), contiguous(d_o)
        d_initial = states_like(operands, d_o.shape[3], offsets)
        self._kernel.launch(
            [
                *operand_slots(rows),
                d_rows.data_ptr(),
                *d_rows.stride()[:3],
                pointer(initial_state),
                pointer(d_state),
                *operand_slots(gradients),
                d_initial.data_ptr(),
                *size_slots(rows, offsets),
            ]
        )
        return d_initial


def compile_gradients(plan: CorePlan, templates: Sequence[Path], folder: Path) -> CppGradients:
    """The gradients of the core of `plan`, a plan of the forward kernel; as `compile_core`."""
    plan = gradient_of(plan)
    source = render_backward(plan, templates)
    return CppGradients(plan, kernel_of(plan.name, plan.target, backward_fields(plan), source, folder))


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _with_keys_as_values(x: Operands) -> Operands:
    values = tuple(value for value in x.values if value is not None)
    return replace(x, keys=values, values=x.keys)
