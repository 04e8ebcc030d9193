"""Sequential kernels on the C++ target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attncc.emit.sequential_cpp import argument_fields, source_of
from attncc.plan.sequential import SequentialPlan
from attncc.runtime.cpp import CppKernel, kernel_of


class CppSequential:
    """The shared library of a sequential kernel."""

    def __init__(self, kernel: CppKernel) -> None:
        self._kernel = kernel

    def forward(
        self,
        operands: Sequence[Tensor],
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        batch, heads, tokens, _ = o.shape
        sequences = batch if offsets is None else len(offsets) - 1
        plain = [operand.resolve_neg() for operand in operands]
        self._kernel.launch(
            [
                *(slot for operand in plain for slot in _stream(operand)),
                o.data_ptr(),
                _pointer(initial_state),
                _pointer(final_state),
                _pointer(offsets),
                sequences,
                heads,
                tokens,
                torch.get_num_threads(),
            ]
        )


def compile_kernel(plan: SequentialPlan, templates: Sequence[Path], folder: Path) -> CppSequential:
    """The kernel of `plan`, compiled into `folder` or found there. Raises BuildError where it cannot be compiled,
    OSError where nothing can be written to `folder`."""
    source = source_of(plan, templates)
    return CppSequential(kernel_of(plan.name, plan.target, argument_fields(plan), source, folder))


def _stream(operand: Tensor) -> Iterator[int]:
    """The slots of an operand. Along an axis of one everything is the same."""
    yield operand.data_ptr()
    yield from (0 if size == 1 else stride for size, stride in zip(operand.shape, operand.stride(), strict=True))


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
