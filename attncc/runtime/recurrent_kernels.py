"""The kernels of one recurrence: a core for each type and width that a call asks for, and how calls run on it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncc.ir.recurrence import Recurrence
from attncc.ir.types import DType
from attncc.passes.updates import UpdateForm
from attncc.plan.nodes import Specialization, Target
from attncc.plan.recurrent import CorePlan, gradient_of, plan_core, with_exact_state
from attncc.plan.staging import NotStaged, plan_staging
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES, Sizes
from attncc.runtime.recurrent_arguments import BoundRecurrence, state_shape
from attncc.runtime.recurrent_core import CompiledCore, kernel_state, run_core, states_like
from attncc.runtime.recurrent_operands import Operands, prepare
from attncc.runtime.targets import resolve

if TYPE_CHECKING:
    from attncc.runtime.cpp_staged import StagedCppCore


class RecurrentKernels:
    """Runs a recurrence that has an update form on arguments that have been bound.

    built: its cores, by type and widths; staged: those that make their operands themselves, None where there is none.
    """

    def __init__(self, recurrence: Recurrence, form: UpdateForm, target: str | None, templates: Sequence[Path]) -> None:
        self.recurrence = recurrence
        self.form = form
        self.target = target
        self.templates = tuple(templates)
        self.built: dict[object, tuple[CorePlan, CompiledCore]] = {}
        self.staged: dict[object, StagedCppCore | None] = {}
        self._lock = threading.Lock()

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence) -> tuple[Tensor, Tensor]:
        """o (B, H, N, E) in the type of q and the last state; differentiable. A state that need not be kept may be a
        tensor of nothing: those of many short sequences are much to write."""
        state = kernel_state(bound.initial_state, q)
        staged = None if _is_followed(q, k, v, bound, state) else self._staged(q, v, bound)
        if staged is not None:
            o, last = _empty_output(q, bound), _empty_state(self.recurrence, q, bound) if bound.keeps_state else None
            staged.run({"q": q, "k": k, "v": v}, bound, state, o, last)
            return o, q.new_empty(0) if last is None else last
        prepared = prepare(self.recurrence, self.form, q, k, v, bound.inputs, bound.q_offset)
        operands = prepared.operands
        if self.recurrence.bidirectional:
            output, last = self._bidirectional(operands, prepared.value_width, state)
        else:
            core = self._core(operands, prepared.value_width, exact_state=bound.exact_state)
            output, last = run_core(core, operands, prepared.value_width, state, bound.offsets)
        return prepared.finished(output), last

    def step(self, q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence, state: Tensor) -> Tensor:
        """o of some more tokens; `state` becomes what they leave. Not for autograd to see."""
        staged = self._staged(q, v, bound)
        if staged is not None:
            o = _empty_output(q, bound)
            staged.run({"q": q, "k": k, "v": v}, bound, state, o, state)
            return o
        prepared = prepare(self.recurrence, self.form, q, k, v, bound.inputs, bound.q_offset)
        operands, width = prepared.operands, prepared.value_width
        output = q.new_empty((*operands.query.shape[:3], width))
        self._core(operands, width).forward(operands, state, bound.offsets, output, state)
        return prepared.finished(output)

    def sources(
        self, specialization: Specialization, target: Target, *, backward: bool = False
    ) -> tuple[tuple[CorePlan, str], ...]:
        """The plan and the source of each kernel that calls of these types and widths may run on, or their backward
        passes; none where PyTorch computes everything."""
        if self.recurrence.bidirectional:
            return ()
        widths = specialization.head_dim_qk, specialization.head_dim_v
        *_, key_width, value_width = state_shape(self.recurrence, Sizes(1, 1, 1, 1, 1, *widths), 1)
        core = plan_core(self.form, "recurrent", target, specialization.dtype, key_width, value_width)
        staged = None if backward else self._staged_plan(target, specialization.dtype, widths, specialization.tensors)
        return self._rendered([gradient_of(core) if backward else core, *(() if staged is None else (staged,))])

    def built_sources(self) -> tuple[tuple[CorePlan, str], ...]:
        """Those of all kernels that have been compiled so far."""
        staged = [core.plan for core in self.staged.values() if core is not None]
        return self._rendered([*(plan for plan, _ in self.built.values()), *staged])

    def _rendered(self, plans: Sequence[CorePlan]) -> tuple[tuple[CorePlan, str], ...]:
        from attncc.runtime.recurrent_sources import source_of

        return tuple((plan, source_of(plan, self.templates)) for plan in plans)

    def _bidirectional(self, operands: Operands, width: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every query reads what all tokens have left: a sum over tokens, and two products of matrices in all."""
        wide = torch.promote_types(operands.query.dtype, torch.float32)
        last = torch.zeros_like(states_like(operands, width, None)) if state is None else state
        for key, value in zip(operands.keys, operands.values, strict=True):
            assert value is not None, "nothing erases where every query reads the same state"
            last = last + key.to(wide).mT @ value.to(wide)
        return (operands.query.to(wide) @ last).to(operands.query.dtype), last

    def _staged(self, q: Tensor, v: Tensor, bound: BoundRecurrence) -> StagedCppCore | None:
        """A core that makes its operands itself; None where there is none, and PyTorch has to make them."""
        key = (q.dtype, q.shape[3], v.shape[3], q.device, *[x.dtype for x in bound.tensors.values()])
        if key not in self.staged:
            with self._lock:
                if key not in self.staged:
                    dtypes = tuple((name, DTYPES[x.dtype]) for name, x in bound.tensors.items())
                    self.staged[key] = self._compile_staged(q, v, dtypes)
        return self.staged[key]

    def _compile_staged(self, q: Tensor, v: Tensor, dtypes: Sequence[tuple[str, DType]]) -> StagedCppCore | None:
        target = resolve(self.target, q.device, self.templates)
        plan = self._staged_plan(target, DTYPES[q.dtype], (q.shape[3], v.shape[3]), dtypes)
        if plan is None:
            return None
        from attncc.runtime.cpp_staged import compile_staged

        return cache.in_folder(partial(compile_staged, plan, self.templates))

    def _staged_plan(
        self, target: Target, dtype: DType, widths: tuple[int, int], tensors: Sequence[tuple[str, DType]]
    ) -> CorePlan | None:
        """The plan of a core that makes its operands; widths: those of q and v."""
        if target.backend != "cpp":
            return None
        dtypes: Mapping[str, DType] = {**dict(tensors), "q": dtype, "k": dtype, "v": dtype}
        try:
            staging = plan_staging(self.recurrence, self.form, dtypes, *widths)
        except NotStaged:
            return None
        *_, key_width, value_width = state_shape(self.recurrence, Sizes(1, 1, 1, 1, 1, *widths), 1)
        core = plan_core(self.form, "recurrent", target, dtype, key_width, value_width)
        normalized = self.recurrence.normalizer == "sum"
        return replace(core, name="recurrent_staged", staging=staging, normalized=normalized)

    def _core(self, operands: Operands, value_width: int, *, exact_state: bool = False) -> CompiledCore:
        query = operands.query
        key = (query.dtype, query.shape[3], value_width, query.device, exact_state)
        if key not in self.built:
            with self._lock:
                if key not in self.built:
                    target = resolve(self.target, query.device, self.templates)
                    plan = self.plan(target, query.dtype, query.shape[3], value_width)
                    if exact_state:
                        plan = with_exact_state(plan)
                    self.built[key] = plan, self._compile(plan)
        return self.built[key][1]

    def plan(self, target: Target, dtype: torch.dtype, key_width: int, value_width: int) -> CorePlan:
        """The plan of the core; widths are those of the state."""
        return plan_core(self.form, "recurrent", target, DTYPES[dtype], key_width, value_width)

    def _compile(self, plan: CorePlan) -> CompiledCore:
        if plan.target.backend == "cpp":
            from attncc.runtime.cpp_recurrent import compile_core
        else:
            from attncc.runtime.triton_recurrent import compile_core
        return cache.in_folder(partial(compile_core, plan, self.templates))


def _empty_output(q: Tensor, bound: BoundRecurrence) -> Tensor:
    """Memory for o."""
    sizes = bound.sizes
    return q.new_empty((sizes.B, sizes.H, sizes.N, sizes.E))


def _empty_state(recurrence: Recurrence, q: Tensor, bound: BoundRecurrence) -> Tensor:
    """Memory for the last state."""
    sequences = bound.sizes.B if bound.offsets is None else len(bound.offsets) - 1
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(state_shape(recurrence, bound.sizes, sequences), dtype=wide)


def _is_followed(q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence, state: Tensor | None) -> bool:
    """Whether autograd has to see what operands are made of."""
    given = (q, k, v, *bound.tensors.values(), *(() if state is None else (state,)))
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)
