"""Recurrences without a normal form: their kernels, one for each element type and widths, and how calls run on them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attncc.ir.nodes import RowName
from attncc.ir.recurrence import Output, Recurrence
from attncc.plan.nodes import Specialization, Target
from attncc.plan.sequential import SequentialPlan, plan_sequential
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES, TORCH_DTYPES
from attncc.runtime.first_derivatives import first_derivatives
from attncc.runtime.recurrent_arguments import BoundRecurrence
from attncc.runtime.recurrent_core import kernel_state
from attncc.runtime.recurrent_operands import divided_by_sum
from attncc.runtime.sequential_gradient import Interpreted, gradients
from attncc.runtime.sequential_kernel import CompiledSequential
from attncc.runtime.sequential_operands import prepare
from attncc.runtime.targets import resolve


class SequentialKernels:
    """Runs a recurrence that has no normal form on arguments that have been bound."""

    def __init__(
        self, recurrence: Recurrence, target: str | None, templates: Sequence[Path], *, interpreted: bool = False
    ) -> None:
        """interpreted: nothing is compiled, PyTorch runs the steps of the plan."""
        self.recurrence = recurrence
        self.target = target
        self.interpreted = interpreted
        self.templates = tuple(templates)
        self.built: dict[object, tuple[SequentialPlan, CompiledSequential]] = {}
        self._lock = threading.Lock()

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence) -> tuple[Tensor, Tensor]:
        """o (B, H, N, E) in the type of q and the last state; differentiable."""
        state = kernel_state(bound.initial_state, q)
        if not self.recurrence.bidirectional:
            o, last = self._tokens("all", {"q": q, "k": k, "v": v}, bound, state)
        else:
            _, last = self._tokens("updates", {"k": k, "v": v}, bound, state)
            o, _ = self._tokens("outputs", {"q": q}, bound, last)
        return self._finished(o, q), last

    def step(self, q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence, state: Tensor) -> Tensor:
        """o of some more tokens; `state` becomes what they leave. Not for autograd to see."""
        o, last = self.run(q, k, v, bound._replace(initial_state=state))
        state.copy_(last)
        return o

    def plan(self, part: Part, q: Tensor, widths: tuple[int, int]) -> SequentialPlan:
        """The plan of a call; widths: those of q and v."""
        target = resolve(self.target, q.device, self.templates)
        return plan_sequential(_part(self.recurrence, part), target, DTYPES[q.dtype], *widths)

    def sources(
        self, specialization: Specialization, target: Target, *, backward: bool = False
    ) -> tuple[tuple[SequentialPlan, str], ...]:
        """The plan and the source of each kernel that calls of these types and widths run on; none backward, which
        PyTorch does."""
        if backward:
            return ()
        parts: tuple[Part, ...] = ("updates", "outputs") if self.recurrence.bidirectional else ("all",)
        widths = specialization.head_dim_qk, specialization.head_dim_v
        return self._rendered(
            [plan_sequential(_part(self.recurrence, part), target, specialization.dtype, *widths) for part in parts]
        )

    def built_sources(self) -> tuple[tuple[SequentialPlan, str], ...]:
        """Those of all kernels that have been compiled so far."""
        return self._rendered([plan for plan, _ in self.built.values()])

    def _rendered(self, plans: Sequence[SequentialPlan]) -> tuple[tuple[SequentialPlan, str], ...]:
        from attncc.runtime.recurrent_sources import source_of

        return tuple((plan, source_of(plan, self.templates)) for plan in plans)

    def _tokens(
        self, part: Part, rows: Mapping[RowName, Tensor], bound: BoundRecurrence, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What some of the statements make of all tokens: o, as it is stored, and the last state."""
        plan, kernel = self._compiled(part, next(iter(rows.values())), (bound.sizes.D, bound.sizes.E))
        sizes = {name: getattr(bound.sizes, name) for name in ("B", "H", "HKV", "M", "N", "D", "E")}
        operands = prepare(plan, rows, bound.inputs, {**sizes, "q_offset": bound.q_offset})
        tokens = bound.sizes.M if part == "outputs" else bound.sizes.N
        if state is None:
            sequences = bound.sizes.B if bound.offsets is None else len(bound.offsets) - 1
            shape = (sequences, bound.sizes.H, plan.key_width, plan.value_width)
            some = next(iter(rows.values()))
            state = some.new_zeros(shape, dtype=TORCH_DTYPES[plan.state_dtype])
        o, last = _Sequential.apply(plan, kernel, (bound.sizes.B, tokens), bound.offsets, state, *operands)
        return o, last

    def _compiled(self, part: Part, x: Tensor, widths: tuple[int, int]) -> tuple[SequentialPlan, CompiledSequential]:
        key = (part, x.dtype, widths, x.device)
        if key not in self.built:
            with self._lock:
                if key not in self.built:
                    plan = self.plan(part, x, widths)
                    kernel = Interpreted(plan) if self.interpreted else compile_sequential(plan, self.templates)
                    self.built[key] = plan, kernel
        return self.built[key]

    def _finished(self, o: Tensor, q: Tensor) -> Tensor:
        """The output of the recurrence, in the type of q."""
        return (divided_by_sum(o) if self.recurrence.normalizer == "sum" else o).to(q.dtype)


Part = Literal["all", "updates", "outputs"]


def _part(recurrence: Recurrence, part: Part) -> Recurrence:
    """Where every query reads what all tokens leave: what tokens do, and what queries do then."""
    if part == "all":
        return recurrence
    kept = tuple(s for s in recurrence.statements if isinstance(s, Output) == (part == "outputs"))
    return replace(recurrence, name=f"{recurrence.name}_{part}", statements=kept)


def compile_sequential(plan: SequentialPlan, templates: Sequence[Path]) -> CompiledSequential:
    """The kernel of `plan`, compiled or found in the cache folder. Raises BuildError where it cannot be compiled."""
    if plan.target.backend == "cpp":
        from attncc.runtime.cpp_sequential import compile_kernel
    else:
        from attncc.runtime.triton_sequential import compile_kernel
    return cache.in_folder(partial(compile_kernel, plan, templates))


class _Sequential(torch.autograd.Function):
    """Keeps the operands, no states: the backward pass runs the tokens again."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: SequentialPlan,
        kernel: CompiledSequential,
        sizes: tuple[int, int],
        offsets: Tensor | None,
        state: Tensor,
        *operands: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """sizes: batch and tokens."""
        ctx.plan, ctx.kernel = plan, kernel
        ctx.save_for_backward(offsets, state, *operands)
        batch, tokens = sizes
        o = state.new_empty((batch, state.shape[1], tokens, plan.value_width), dtype=TORCH_DTYPES[plan.stored])
        last = torch.empty_like(state)
        kernel.forward(operands, state, offsets, o, last)
        return o, last

    @staticmethod
    # PyTorch types it as taking anything.
    def backward(ctx: Any, d_o: Tensor, d_last: Tensor) -> tuple[Any, ...]:  # type: ignore[override] - two results
        offsets, state, *operands = ctx.saved_tensors

        def compute() -> tuple[Tensor | None, ...]:
            found = gradients(ctx.plan, ctx.kernel, operands, state, offsets, d_o.to(state.dtype), d_last)
            return found.state, *found.operands

        return None, None, None, None, *first_derivatives(compute, (d_o, d_last, state, *operands))
