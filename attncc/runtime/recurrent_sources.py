"""The generated source of each kernel of a recurrence, and its library ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from attncc.emit import recurrent_cpp, recurrent_triton, sequential_cpp, sequential_triton
from attncc.emit.cpp_machine import Field
from attncc.emit.recurrent_backward_cpp import backward_fields, render_backward
from attncc.emit.staging_cpp import staging_fields
from attncc.plan.recurrent import CorePlan
from attncc.plan.sequential import SequentialPlan
from attncc.runtime.cpp import CppKernel, kernel_of

RecurrentPlan: TypeAlias = CorePlan | SequentialPlan


def source_of(plan: RecurrentPlan, templates: Sequence[Path]) -> str:
    """The source of a kernel. Raises BuildError where its template cannot be rendered, or no kernel can do it."""
    on_cpu = plan.target.backend == "cpp"
    if isinstance(plan, SequentialPlan):
        return (sequential_cpp if on_cpu else sequential_triton).source_of(plan, templates)
    if on_cpu and plan.kernel == "recurrent_backward":
        return render_backward(plan, templates)
    return (recurrent_cpp if on_cpu else recurrent_triton).render_core(plan, templates)


def compile_library(plan: RecurrentPlan, source: str, folder: Path) -> CppKernel:
    """The C++ kernel of `source`, compiled into `folder` or found there. Raises BuildError where it cannot be compiled,
    OSError where nothing can be written to `folder`."""
    return kernel_of(plan.name, plan.target, _fields(plan), source, folder)


def _fields(plan: RecurrentPlan) -> tuple[Field, ...]:
    if isinstance(plan, SequentialPlan):
        return sequential_cpp.argument_fields(plan)
    if plan.kernel == "recurrent_backward":
        return backward_fields(plan)
    return (*recurrent_cpp.core_fields(plan), *staging_fields(plan))
