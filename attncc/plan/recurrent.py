"""Plans of recurrent kernels.

A *core* works on operands: vectors over key channels (D) or value channels (E) that each token has, made of the inputs
beforehand. It is the same for every recurrence of one shape; what the operands are is the business of the caller.

For each batch and head, with everything below of token t:
    S~ = exp(log_decay) * S      u_m = value_m - erase_m^T S~ (S, if erases_before)      S = S~ + sum_m key_m u_m^T
    o  = query^T S               of the state after the update; before all of it where read is "pre"
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from attncc.ir.types import DType
from attncc.passes.normal_form import Side
from attncc.passes.updates import UpdateForm
from attncc.plan.nodes import Target
from attncc.plan.staging import Staging


@dataclass(frozen=True, slots=True)
class CoreUpdate:
    """One rank-one update: along a key, of what `value` and `erase` say. An update without either is none."""

    value: bool
    erase: bool


@dataclass(frozen=True, slots=True)
class CorePlan:
    """What a kernel of the core is compiled for; lengths, batch, heads and strides are not part of it.

    dtype        of query, keys, values, erases and o. log_decay and the state are f32 (f64 beside f64)
    key_width    D, value_width: E
    side         log_decay has one number per token ("scalar"), or one per key or value channel ("key", "value");
                 there is none where it is "none"
    staging      how the kernel makes the operands itself; None where a call brings them
    exact_state  the last state has all digits of its type, where products of shorter rows would take some. Only on
                 Triton: kernels of C++ are told at run time
    normalized   outputs have E - 1 channels: those before the last, divided by it, and 0 where that is 0
    """

    kernel: Literal["recurrent", "recurrent_backward"]
    name: str
    target: Target
    dtype: DType
    key_width: int
    value_width: int
    side: Side
    updates: tuple[CoreUpdate, ...]
    erases_before: bool
    read: Literal["pre", "post"]
    staging: Staging | None = None
    normalized: bool = False
    exact_state: bool = False

    @property
    def finished(self) -> bool:
        """Whether the kernel applies a gate or a bonus to its outputs."""
        steps = () if self.staging is None else self.staging.steps
        return any(step.name in ("gate", "bonus") for step in steps)

    @property
    def state_dtype(self) -> DType:
        return DType.F64 if self.dtype is DType.F64 else DType.F32

    @property
    def erasing(self) -> bool:
        return any(update.erase for update in self.updates)


def plan_core(
    form: UpdateForm,
    kernel: Literal["recurrent", "recurrent_backward"],
    target: Target,
    dtype: DType,
    key_width: int,
    value_width: int,
) -> CorePlan:
    """The core that computes `form`."""
    updates = tuple(CoreUpdate(update.value is not None, update.erase is not None) for update in form.updates)
    return CorePlan(
        kernel=kernel,
        name=kernel,
        target=target,
        dtype=dtype,
        key_width=key_width,
        value_width=value_width,
        side=form.side,
        updates=updates,
        erases_before=form.before,
        read=form.read,
    )


def gradient_of(plan: CorePlan) -> CorePlan:
    """The gradients of a core, by operands that are given."""
    return replace(plan, kernel="recurrent_backward", name=f"{plan.name}_backward")


def with_exact_state(plan: CorePlan) -> CorePlan:
    """`plan`, or one of its own where its products would take digits from the state: what is written has decays, and
    rows are shorter than the state. What is erased is read in the type of rows, so the state has no more digits."""
    short = plan.dtype in (DType.BF16, DType.F16)
    rounds = plan.target.backend == "triton" and short and plan.side != "none" and not plan.erasing
    return replace(plan, exact_state=True) if rounds else plan
