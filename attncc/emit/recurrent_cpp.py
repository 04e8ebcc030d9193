"""What the C++ templates of recurrent cores need to know: the arguments of a call, and by which names what is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attncc.emit.core_machine import core_machine, erasing_updates, known_updates
from attncc.emit.cpp_machine import ELEMENT_TYPES, Field, Format, mangle
from attncc.emit.cpp_text import tidy
from attncc.emit.recurrent_ahead import ahead
from attncc.emit.render import fill
from attncc.emit.staging_cpp import StagingText
from attncc.plan.factors import FACTOR
from attncc.plan.recurrent import CorePlan


def core_fields(plan: CorePlan) -> tuple[Field, ...]:
    """The members of a forward kernel's `Arguments`, in order.

    Slots: `X` pointer of operand X, with `X_stride_b`, `X_stride_h`, `X_stride_row` (in elements; the last axis is
    contiguous), where X is `query`, `key_i`, `value_i`, `erase_i` or `log_decay`; pointers of the rest; sizes.
    """
    element, real = f"const {ELEMENT_TYPES[plan.dtype]}", ELEMENT_TYPES[plan.state_dtype]
    return (
        *operand_fields(plan, element, f"const {real}"),
        Field(
            f"const {real}* initial_state;",
            "(B or sequences, H, D, E), or null where it is 0",
            (("initial_state", "Q"),),
        ),
        Field(f"{ELEMENT_TYPES[plan.dtype]}* o;", "(B, H, N, E)", (("o", "Q"),)),
        Field(f"{real}* final_state;", "as initial_state, which it may be; or null", (("final_state", "Q"),)),
        Field("int64 exact_state;", "whether it keeps what rounding takes from products", (("exact_state", "q"),)),
        *size_fields(),
    )


def operand_fields(plan: CorePlan, element: str, real: str, prefix: str = "") -> tuple[Field, ...]:
    """The operands, as `Operand<element>` or, of log_decay, `Operand<real>`; their names begin with `prefix`."""
    channels = {"scalar": "(B, H, N)", "key": "(B, H, N, D)", "value": "(B, H, N, E)"}
    key, value = "(B, H, N, D)", "(B, H, N, E)"
    updates = list(enumerate(plan.updates))
    return (
        _operand(f"{prefix}query", element, key),
        *(_operand(f"{prefix}key_{i}", element, key) for i, _ in updates),
        *(_operand(f"{prefix}value_{i}", element, value) for i, update in updates if update.value),
        *(_operand(f"{prefix}erase_{i}", element, key) for i, update in updates if update.erase),
        *(() if plan.side == "none" else (_operand(f"{prefix}log_decay", real, channels[plan.side]),)),
    )


def size_fields() -> tuple[Field, ...]:
    """Sizes, where packed sequences lie, and the number of threads."""
    sizes = ("B", "H", "N", "sequences")
    return (
        Field(
            "const int64* offsets;",
            "of sequences along N: `sequences` + 1; or null, and B of them",
            (("offsets", "Q"),),
        ),
        Field(f"int64 {', '.join(sizes)};", "", tuple((size, "q") for size in sizes)),
        Field("int64 num_threads;", "", (("num_threads", "q"),)),
    )


def _operand(name: str, element: str, shape: str) -> Field:
    strides = tuple[tuple[str, Format], ...]((f"{name}_stride_{axis}", "q") for axis in ("b", "h", "row"))
    return Field(f"Operand<{element}> {name};", shape, ((name, "Q"), *strides))


def factors(plan: CorePlan) -> list[str]:
    """The operands that have a factor for each token, `X_factor`."""
    steps = () if plan.staging is None else plan.staging.steps
    return [step.name.removesuffix(FACTOR) for step in steps if step.name.endswith(FACTOR)]


def render_core(plan: CorePlan, templates: Sequence[Path] = ()) -> str:
    """The source of a kernel. Raises BuildError where its template cannot be rendered."""
    staging = {} if plan.staging is None else StagingText(plan, core_machine(plan)).filters()
    return fill(f"{plan.kernel}.cpp.jinja", plan, plan.name, plan.target, {**FILTERS, **staging}, templates)


def _elements(plan: CorePlan) -> list[str]:
    """The C++ types of all elements that a kernel reads or writes."""
    inputs = () if plan.staging is None else plan.staging.passed
    return list(
        dict.fromkeys(ELEMENT_TYPES[dtype] for dtype in (plan.dtype, plan.state_dtype, *(x.dtype for x in inputs)))
    )


FILTERS: Mapping[str, Callable[..., object]] = {
    "core_machine": core_machine,
    "core_arguments": core_fields,
    "core_elements": _elements,
    "name": mangle,
    "known_updates": known_updates,
    "erasing_updates": erasing_updates,
    "factors": factors,
    "ahead": ahead,
    "tidy": tidy,
}
