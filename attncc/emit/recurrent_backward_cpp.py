"""What the C++ template of the gradients of recurrent cores needs to know: the arguments of a call, the chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from attncc.emit.core_machine import core_machine
from attncc.emit.cpp_machine import ELEMENT_TYPES, Field
from attncc.emit.cpp_text import tidy
from attncc.emit.recurrent_cpp import _operand, operand_fields, size_fields
from attncc.emit.render import fill
from attncc.plan.recurrent import CorePlan


def chunk_tokens(plan: CorePlan) -> int:
    """Tokens of a chunk, in whole steps of products. A product of rows with rows costs the more the more tokens there
    are, what is done once per state the less; an erase doubles the former."""
    writes = 32 if plan.erasing else 64
    return max(writes // max(len(plan.updates), 1) // 8 * 8, 8)


def described_updates(plan: CorePlan) -> str:
    """The updates in words, for a comment."""
    words = {(True, True): "value and erase", (True, False): "value", (False, True): "erase", (False, False): "nothing"}
    return "; ".join(words[update.value, update.erase] for update in plan.updates) or "none"


def backward_fields(plan: CorePlan) -> tuple[Field, ...]:
    """The members of a backward kernel's `Arguments`, in order: operands, the gradient of o, and the gradients of the
    operands, the latter contiguous. Where value channels decay, they are those of the kernel, as it sees them: its
    gradient of the query is left out, for o."""
    swapped = plan.side == "value"
    roles = replace(plan, side="key") if swapped else plan
    element, real = ELEMENT_TYPES[plan.dtype], ELEMENT_TYPES[plan.state_dtype]
    states, rows = "(B or sequences, H, D, E)", "(B, H, N, E)"
    gradients = operand_fields(roles, element, real, "d_")
    return (
        *operand_fields(roles, f"const {element}", f"const {real}"),
        _operand("d_o", f"const {element}", rows),
        Field(f"const {real}* initial_state;", f"{states}, or null where it is 0", (("initial_state", "Q"),)),
        Field(f"const {real}* d_state;", f"{states}, of the last state, or null", (("d_state", "Q"),)),
        *((_operand("o", element, rows), *gradients[1:]) if swapped else gradients),
        Field(f"{real}* d_initial_state;", states, (("d_initial_state", "Q"),)),
        *size_fields(),
    )


def render_backward(plan: CorePlan, templates: Sequence[Path] = ()) -> str:
    """The source of a kernel. Raises BuildError where its template cannot be rendered."""
    return fill(f"{plan.kernel}.cpp.jinja", plan, plan.name, plan.target, _FILTERS, templates)


_FILTERS: Mapping[str, Callable[..., object]] = {
    "core_machine": core_machine,
    "arguments": backward_fields,
    "chunk_tokens": chunk_tokens,
    "described_updates": described_updates,
    "tidy": tidy,
}
