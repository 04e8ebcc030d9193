"""What the C++ templates need to know of the machine and of the element types, and the layout of a call's arguments."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

from attncc.ir.nodes import Summary
from attncc.ir.types import DType, Kind
from attncc.plan.nodes import (
    Adjoint,
    BackwardPlan,
    CppTile,
    ForwardPlan,
    KernelPlan,
    RowsPlan,
    ScalarArgument,
    TensorArgument,
    TilesPlan,
)
from attncc.resources import folder

ELEMENT_TYPES: dict[DType, str] = {
    DType.BOOL: "bool",
    DType.I32: "int",
    DType.I64: "int64",
    DType.F16: "half",
    DType.BF16: "bfloat16",
    DType.F32: "float",
    DType.F64: "double",
}
SCALAR_TYPES: dict[Kind, str] = {Kind.BOOL: "bool", Kind.INT: "int", Kind.FLOAT: "real"}

# Keys that the in-loop classification of tiles takes at a time; a summary table has one entry per so many keys.
CLASSIFIED_KEYS = 32

# Functions that a function of the operator table is written in terms of.
_USES: dict[str, tuple[str, ...]] = {
    "exp2": ("floor", "exp2_parts"),
    "exp": ("floor", "exp2_parts"),
    "log": ("log_parts",),
    "log2": ("log_parts",),
    "sigmoid": ("exp", "reciprocal"),
    "silu": ("sigmoid",),
    "log1p": ("log_parts",),
    "softplus": ("exp", "log1p"),
}


class Reals(Protocol):
    """What expressions are computed in: a part of every machine."""

    @property
    def real(self) -> Literal["float", "double"]: ...

    def literal(self, digits: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """A C++ target at one element type.

    real      type of scores, weights and sums
    element   type of q, k, v and o in memory
    pairs     products multiply pairs of bf16 and add them up in f32 (vdpbf16ps)
    widened   k and v are rewritten as `real` once per call, because the products cannot read them as they are
    steps     of a product over the queries of a tile
    """

    arch: str
    real: Literal["float", "double"]
    element: str
    lanes: int
    vectors: int
    steps: int
    block_n: int
    micro_keys: int
    avx512: bool
    pairs: bool
    widened: bool

    @property
    def block_m(self) -> int:
        return self.lanes * self.vectors * self.steps

    @property
    def suffix(self) -> str:
        """Of C's mathematical functions and literals of type `real`."""
        return "f" if self.real == "float" else ""

    @property
    def word(self) -> str:
        """What a product multiplies at a time."""
        return "uint32" if self.pairs else "real"

    @property
    def transpose_steps(self) -> tuple[int, ...]:
        return tuple(1 << i for i in range(self.lanes.bit_length() - 1))

    def literal(self, digits: str) -> str:
        """A number as a literal of type `real`."""
        return f"{digits}{self.suffix}"


def machine_of(plan: KernelPlan) -> Machine:
    """The machine that `plan` is for. A `TilesPlan` has no element type: its reals are f64."""
    tile = CppTile(1, 1, 1, 1) if isinstance(plan, RowsPlan) else plan.tile
    assert isinstance(tile, CppTile)
    dtype = DType.F64 if isinstance(plan, TilesPlan) else plan.dtype
    pairs = dtype is DType.BF16 and plan.target.arch == "avx512_bf16"
    return Machine(
        arch=plan.target.arch,
        real="double" if dtype is DType.F64 else "float",
        element=ELEMENT_TYPES[dtype],
        lanes=tile.lanes,
        vectors=tile.vectors,
        steps=tile.steps,
        block_n=tile.block_n,
        micro_keys=tile.micro_keys,
        avx512=plan.target.arch.startswith("avx512"),
        pairs=pairs,
        widened=dtype in (DType.F16, DType.BF16) and not pairs,
    )


def with_uses(names: list[str]) -> list[str]:
    """`names` and the functions that they are written in terms of, each after those."""
    ordered: dict[str, None] = {}

    def visit(name: str) -> None:
        for used in _USES.get(name, ()):
            visit(used)
        ordered.setdefault(name)

    for name in sorted(names):
        visit(name)
    return list(ordered)


# --- the arguments of a call ----------------------------------------------------------------------------------------

# struct format characters; every slot takes 8 bytes.
Format = Literal["Q", "q", "d"]


@dataclass(frozen=True, slots=True)
class Field:
    """One member of the struct `Arguments`, and the 8-byte slots that it consists of. captured: it belongs to the
    specification, whose names may be those of the kernel's own arguments."""

    declaration: str
    comment: str
    slots: tuple[tuple[str, Format], ...]
    captured: bool = False


def argument_fields(plan: KernelPlan) -> tuple[Field, ...]:
    """The members of a kernel's `Arguments`, in order: the one place that says what a launch passes.

    Slots: `X` pointer of operand X, with `X_stride_b`, `X_stride_h`, `X_stride_row` (in elements; the last axis is
    contiguous); sizes; `NAME` of each scalar; for each captured tensor `NAME` and per axis i `NAME_size_i`,
    `NAME_stride_i`; for summary i `summary_i` and its strides (0 where the table has one entry for all); for lists
    `list_offsets` (int64, one more than there are lists), `list_entries` (int32), `list_stride_b`, `list_stride_h` (in
    lists), and `list_counted` where they are filled. A backward kernel's `adjoint_i` are pointers; that of a pair has
    sizes and strides, as a captured tensor.
    """
    match plan:
        case BackwardPlan():
            element = machine_of(plan).element
            real = machine_of(plan).real
            rows = "(B, H, M), contiguous"
            return (
                _operand("q", f"const {element}", "(B, H, M, D)"),
                _operand("k", f"const {element}", "(B, HKV, N, D)"),
                _operand("v", f"const {element}", "(B, HKV, N, E)"),
                _operand("o", f"const {element}", "(B, H, M, E)"),
                _operand("d_o", f"const {element}", "(B, H, M, E), the gradient of o"),
                *(() if plan.normalizer == "none" else _totals(plan, real, rows)),
                _operand("dq", ELEMENT_TYPES[plan.stored.q], "(B, H, M, D)"),
                _operand("dk", ELEMENT_TYPES[plan.stored.k], "(B, HKV, N, D)"),
                _operand("dv", ELEMENT_TYPES[plan.stored.v], "(B, HKV, N, E)"),
                *((Field(f"{real}* delta;", rows, (("delta", "Q"),)),) if plan.writes_delta else ()),
                *(_adjoint(adjoint, i, real) for i, adjoint in enumerate(plan.adjoints)),
                *_call_fields(plan),
                *(
                    Field(f"{table_type(s)} summary_{i};", "", _table_slots(i))
                    for i, s in enumerate(plan.blocks.summaries)
                ),
                *(_list_fields("const ") if plan.blocks.strategy == "list" else ()),
            )
        case ForwardPlan():
            element = machine_of(plan).element
            real = machine_of(plan).real
            return (
                _operand("q", f"const {element}", "(B, H, M, D)"),
                _operand("k", f"const {element}", "(B, HKV, N, D)"),
                _operand("v", f"const {element}", "(B, HKV, N, E)"),
                _operand("o", element, "(B, H, M, E)"),
                Field(f"{real}* lse;", "(B, H, M), contiguous, or null", (("lse", "Q"),)),
                *(
                    Field(f"{real}* {name};", "(B, H, M), contiguous", ((name, "Q"),))
                    for name in (("row_max", "entropy") if plan.statistics else ())
                ),
                *_call_fields(plan),
                *(
                    Field(f"{table_type(s)} summary_{i};", "", _table_slots(i))
                    for i, s in enumerate(plan.blocks.summaries)
                ),
                *(_list_fields("const ") if plan.blocks.strategy == "list" else ()),
            )
        case RowsPlan():
            element = machine_of(plan).element
            length = "M" if plan.row == "q" else "N"
            shape = f"(B, {plan.heads}, {length}, {plan.width}), contiguous"
            return (
                _operand(
                    "x", f"const {element}", f"({'B, H' if plan.row == 'q' else 'B, HKV'}, {length}, {plan.width})"
                ),
                *(() if plan.upstream is None else (_upstream(plan.upstream, shape),)),
                Field(f"{ELEMENT_TYPES[plan.stored]}* y;", shape, (("y", "Q"),)),
                *_call_fields(plan),
            )
        case TilesPlan():
            return (
                *_call_fields(plan),
                *(
                    Field(f"{table_type(s)} summary_{i};", "", _table_slots(i))
                    for i, s in enumerate(plan.blocks.summaries)
                ),
                *(_list_fields("") if plan.blocks.strategy == "list" else ()),
                *((_LIST_COUNTED,) if plan.blocks.strategy == "list" else ()),
            )
        case _:
            assert_never(plan)


def _call_fields(plan: KernelPlan) -> tuple[Field, ...]:
    sizes = ("B", "H", "HKV", "M", "N", "q_offset")
    return (
        Field(f"int64 {', '.join(sizes)};", "", tuple((size, "q") for size in sizes)),
        *(_scalar(scalar) for scalar in plan.scalars),
        *(_tensor(tensor) for tensor in plan.tensors),
        Field("int64 num_threads;", "", (("num_threads", "q"),)),
    )


def _totals(plan: BackwardPlan, real: str, rows: str) -> tuple[Field, ...]:
    what = "the log of what rows were divided by" if plan.normalizer == "softmax" else "what rows were divided by"
    return (
        Field(f"const {real}* total;", f"{rows}: {what}", (("total", "Q"),)),
        Field(f"const {real}* dtotal;", f"{rows}: its gradient; or null", (("dtotal", "Q"),)),
    )


_ADJOINT_SHAPES = {"head": "(B, H)", "row": "(B, H, M)", "column": "(B, H, N)", "diagonal": "(B, H, M + N - 1)"}


def _adjoint(adjoint: Adjoint, i: int, real: str) -> Field:
    name = f"adjoint_{i}"
    if adjoint.place is None:
        return Field(f"{real}* {name};", f"{_ADJOINT_SHAPES[adjoint.along]}, contiguous", ((name, "Q"),))
    rank = len(adjoint.place.indices)
    comment = f"the gradient of {adjoint.place.tensor}"
    return Field(f"Tensor<{real}, {rank}> {name};", comment, _tensor_slots(name, rank))


def _operand(name: str, element: str, shape: str) -> Field:
    strides = tuple[tuple[str, Format], ...]((f"{name}_stride_{axis}", "q") for axis in ("b", "h", "row"))
    return Field(f"Operand<{element}> {name};", shape, ((name, "Q"), *strides))


def _upstream(dtype: DType, shape: str) -> Field:
    return Field(f"const {ELEMENT_TYPES[dtype]}* g;", f"{shape}: the gradient", (("g", "Q"),))


def _scalar(scalar: ScalarArgument) -> Field:
    ctype, form = ("double", "d") if scalar.kind is Kind.FLOAT else ("int64", "q")
    return Field(f"{ctype} {mangle(scalar.name)};", "", ((scalar.name, form),), captured=True)


def _tensor(tensor: TensorArgument) -> Field:
    slots = _tensor_slots(tensor.name, tensor.rank)
    return Field(
        f"Tensor<{ELEMENT_TYPES[tensor.dtype]}, {tensor.rank}> {mangle(tensor.name)};", "", slots, captured=True
    )


def _tensor_slots(name: str, rank: int) -> tuple[tuple[str, Format], ...]:
    sizes: list[tuple[str, Format]] = [(f"{name}_size_{axis}", "q") for axis in range(rank)]
    strides: list[tuple[str, Format]] = [(f"{name}_stride_{axis}", "q") for axis in range(rank)]
    return ((name, "Q"), *sizes, *strides)


def table_type(summary: Summary) -> str:
    """The C++ type of a summary table."""
    return f"Table<{table_element(summary)}, {'LEAST' if summary.op == 'min' else 'GREATEST'}>"


def table_element(summary: Summary) -> str:
    """The C++ type of the entries of a summary table."""
    return "double" if summary.load.kind is Kind.FLOAT else "int64"


def _table_slots(i: int) -> tuple[tuple[str, Format], ...]:
    return ((f"summary_{i}", "Q"), (f"summary_{i}_stride_b", "q"), (f"summary_{i}_stride_h", "q"))


_LIST_COUNTED = Field("int64 list_counted;", "whether only the entries are missing", (("list_counted", "q"),))


def _list_fields(const: str) -> tuple[Field, ...]:
    return (
        Field(
            f"{const}int64* list_offsets;",
            "where the tiles of each list begin, and the last end",
            (("list_offsets", "Q"),),
        ),
        Field(f"{const}int* list_entries;", "tile * 2 + full, ascending", (("list_entries", "Q"),)),
        Field("int64 list_stride_b, list_stride_h;", "", (("list_stride_b", "q"), ("list_stride_h", "q"))),
    )


# --- names -----------------------------------------------------------------------------------------------------------

_KEYWORDS = frozenset(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr const_cast
    continue decltype default delete do double dynamic_cast else enum explicit export extern false float for friend
    goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
    public register reinterpret_cast return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile
    wchar_t while xor xor_eq linux unix main
    """.split()
)
# Names of `argument_fields`, and those that templates put together.
_FIELDS = frozenset(
    """
    q k v o x y g lse row_max entropy d_o total dtotal dq dk dv delta B H HKV M N q_offset num_threads
    list_offsets list_entries list_stride_b list_stride_h list_counted
    """.split()
)
_NUMBERED = re.compile(
    r"(summary|summarized|fill_summary|range|(add_|store_)?adjoint|partial|places|(place|row|first)_of|sum)_\d+|of_spec_\w+"
)


@functools.cache
def _template_names() -> frozenset[str]:
    """Every identifier in the C++ of the templates: what generated code may use itself."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((folder("templates") / "cpp").glob("*.jinja")))
    code = re.sub(r"{#.*?#}|{%.*?%}|{{.*?}}|//[^\n]*", " ", text, flags=re.DOTALL)
    return frozenset(re.findall(r"[A-Za-z_]\w*", code))


def mangle(name: str) -> str:
    """A name of the specification as a C++ identifier that means nothing else in the generated code."""
    return next(
        spelt for spelt in (name, f"{name}_", f"of_spec_{name}") if spelt.startswith("of_spec_") or not _taken(spelt)
    )


def _taken(name: str) -> bool:
    if name in _KEYWORDS or name in _FIELDS or name in _template_names() or _NUMBERED.fullmatch(name):
        return True
    # `x_` is how `x` may be spelt.
    return name.endswith("_") and _taken(name[:-1])
