"""What the C++ templates of recurrent cores need to know: the machine, the arguments of a call, the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attncc.emit.cpp_machine import ELEMENT_TYPES, Field, Format, mangle
from attncc.emit.cpp_text import tidy
from attncc.emit.render import fill
from attncc.emit.staging_cpp import StagingText, staged_operands
from attncc.ir.types import DType
from attncc.plan.factors import FACTOR
from attncc.plan.recurrent import CorePlan

# Bytes of a vector register.
_REGISTER_BYTES = {"avx512_bf16": 64, "avx512": 64, "avx2": 32, "portable": 16}


@dataclass(frozen=True, slots=True)
class CoreMachine:
    """A C++ target at one element type, as the kernels of recurrent cores see it.

    real      type of the state and of sums
    element   type of the operands in memory
    lanes     numbers in a vector register
    rows      and `vectors`: a product keeps that many rows of so many registers as sums
    chunk     tokens that are taken together
    pairs     products multiply pairs of bf16 and add them up in f32 (vdpbf16ps)
    streams   tokens pass by parts of the state that stay in registers; otherwise a chunk is a few matrix products
    """

    arch: str
    real: Literal["float", "double"]
    element: str
    lanes: int
    rows: int
    vectors: int
    chunk: int
    avx512: bool
    pairs: bool
    streams: bool

    @property
    def suffix(self) -> str:
        """Of C's mathematical functions and literals of type `real`."""
        return "f" if self.real == "float" else ""

    @property
    def transpose_steps(self) -> tuple[int, ...]:
        return tuple(1 << i for i in range(self.lanes.bit_length() - 1))

    def literal(self, digits: str) -> str:
        """A number as a literal of type `real`."""
        return f"{digits}{self.suffix}"


def core_machine(plan: CorePlan) -> CoreMachine:
    """The machine that `plan` is for. Eight rows of two registers are 16 sums, enough to hide the latency of products
    where there are 32 registers; four of two are what fits where there are 16."""
    arch = plan.target.arch
    avx512 = arch.startswith("avx512")
    # Decays of key channels are taken into readers and keys, which bf16 rounds once more. Sums bear that, but not what
    # erases read, as it is written and read again.
    roundable = plan.side in ("none", "scalar") or (plan.side == "key" and not plan.erasing)
    pairs = plan.dtype is DType.BF16 and arch == "avx512_bf16" and plan.kernel == "recurrent" and roundable
    # Without erasures a token needs nothing but the state, and products within a chunk only add work.
    streams = plan.kernel == "recurrent" and not pairs and not plan.erasing
    return CoreMachine(
        arch=arch,
        real="double" if plan.dtype is DType.F64 else "float",
        element=ELEMENT_TYPES[plan.dtype],
        lanes=_REGISTER_BYTES[arch] // (8 if plan.dtype is DType.F64 else 4),
        rows=8 if avx512 else 4,
        vectors=2,
        chunk=32 if pairs or streams else 16,
        avx512=avx512,
        pairs=pairs,
        streams=streams,
    )


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


@dataclass(frozen=True, slots=True)
class NumberedUpdate:
    """An update of a plan.

    key, value, erase   the names of its operands; None where it has none
    row                 where a chunk has that of `token`, among the updates of all tokens
    """

    key: str
    value: str | None
    erase: str | None
    row: str


def known_updates(plan: CorePlan) -> list[NumberedUpdate]:
    """Updates by a value as it is given."""
    return _numbered(plan, "token * KNOWN_PER_TOKEN", erasing=False)


def erasing_updates(plan: CorePlan) -> list[NumberedUpdate]:
    """Updates that depend on the state."""
    return _numbered(plan, "KNOWN + token * ERASING_PER_TOKEN", erasing=True)


def _numbered(plan: CorePlan, row: str, *, erasing: bool) -> list[NumberedUpdate]:
    found = [(i, x) for i, x in enumerate(plan.updates) if x.erase is erasing and (x.value or x.erase)]
    return [
        NumberedUpdate(
            f"key_{i}",
            f"value_{i}" if update.value else None,
            f"erase_{i}" if update.erase else None,
            f"{row} + {place}" if place else row,
        )
        for place, (i, update) in enumerate(found)
    ]


def factors(plan: CorePlan) -> list[str]:
    """The operands that have a factor for each token, `X_factor`."""
    steps = () if plan.staging is None else plan.staging.steps
    return [step.name.removesuffix(FACTOR) for step in steps if step.name.endswith(FACTOR)]


@dataclass(frozen=True, slots=True)
class RowsInPlace:
    """An operand that lies where the caller has it.

    element   C++ type of its numbers
    width     how many of them a row has
    """

    operand: str
    element: str
    width: Literal["D", "E"]


def rows_in_place(plan: CorePlan) -> list[RowsInPlace]:
    """The operands with channels that no steps make; of those that are the same rows, one."""
    element = ELEMENT_TYPES[plan.dtype]
    rows = [RowsInPlace("query", element, "D")]
    for update in (*known_updates(plan), *erasing_updates(plan)):
        rows.append(RowsInPlace(update.key, element, "D"))
        if update.value:
            rows.append(RowsInPlace(update.value, element, "E"))
        if update.erase:
            rows.append(RowsInPlace(update.erase, element, "D"))
    if plan.side in ("key", "value"):
        rows.append(RowsInPlace("log_decay", ELEMENT_TYPES[plan.state_dtype], "D" if plan.side == "key" else "E"))
    if plan.staging is None:
        return rows
    sources = {x.source: x.name for x in reversed(staged_operands(plan)) if x.source in plan.staging.passed}
    return [row for row in rows if row.operand in sources.values()]


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
    "rows_in_place": rows_in_place,
    "tidy": tidy,
}
