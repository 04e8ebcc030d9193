"""Recurrent cores on the C++ target: allocates what kernels write, packs their arguments, launches them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncc.emit.recurrent_cpp import core_fields, render_core
from attncc.plan.recurrent import CorePlan
from attncc.runtime.cpp import CppKernel, kernel_of
from attncc.runtime.programs import contiguous
from attncc.runtime.recurrent_operands import Operands

if TYPE_CHECKING:
    from attncc.runtime.cpp_recurrent_backward import CppGradients


class CppCore:
    """The shared library of a core; that of its gradients is compiled when it is first asked for.

    gradients: compiles it.
    """

    def __init__(self, kernel: CppKernel, gradients: Callable[[], CppGradients]) -> None:
        self._kernel = kernel
        self._gradients = functools.cache(gradients)

    def forward(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        rows = readable(operands)
        self._kernel.launch(
            [
                *operand_slots(rows),
                pointer(initial_state),
                o.data_ptr(),
                pointer(final_state),
                True,  # exact_state
                *size_slots(rows, offsets),
            ]
        )

    def backward(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        d_o: Tensor,
        d_state: Tensor | None,
    ) -> tuple[Operands, Tensor]:
        return self._gradients().run(operands, initial_state, offsets, d_o, d_state)


def compile_core(plan: CorePlan, templates: Sequence[Path], folder: Path) -> CppCore:
    """The core of `plan`, compiled into `folder` or found there. Raises BuildError where it cannot be compiled, OSError
    where nothing can be written to `folder`."""
    from attncc.runtime.cpp_recurrent_backward import compile_gradients

    source = render_core(plan, templates)
    kernel = kernel_of(plan.name, plan.target, core_fields(plan), source, folder)
    return CppCore(kernel, functools.partial(compile_gradients, plan, templates, folder))


def readable(operands: Operands) -> Operands:
    """The operands as kernels read them: with any strides, but a contiguous last axis. What has none is copied."""
    return Operands.of(tuple(None if x is None else _readable(x) for x in operands.tensors))


def _readable(x: Tensor) -> Tensor:
    return contiguous(x) if x.dim() == 4 else x.resolve_neg()


def operand_slots(operands: Operands) -> Iterator[int]:
    """The slots of the operands, in the order of `operand_fields`. The tensors must outlive the call."""
    for x in operands.tensors:
        if x is not None:
            yield from (x.data_ptr(), *x.stride()[:3])


def size_slots(operands: Operands, offsets: Tensor | None) -> tuple[int, ...]:
    """The slots of `size_fields`."""
    batch, heads, tokens = operands.query.shape[:3]
    sequences = batch if offsets is None else len(offsets) - 1
    return pointer(offsets), batch, heads, tokens, sequences, torch.get_num_threads()


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
