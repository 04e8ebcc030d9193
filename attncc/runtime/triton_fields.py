"""What the functions of a generated Triton module take, in order: the contract between templates and launchers.

A module has one function for a `forward` or `rows` plan, and several for `tiles` and `backward`. Their parameters are
named here as in the templates; a template from outside has to keep to them, which loading checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, assert_never

from attncc.emit.triton_names import name_of
from attncc.ir.types import DType, Kind
from attncc.plan.nodes import BackwardPlan, ForwardPlan, KernelPlan, RowsPlan, Tile, TilesPlan, TritonTile
from attncc.plan.recurrent import CorePlan
from attncc.plan.sequential import SequentialPlan

TYPES = {
    DType.BOOL: "i1",
    DType.I32: "i32",
    DType.I64: "i64",
    DType.F16: "fp16",
    DType.BF16: "bf16",
    DType.F32: "fp32",
    DType.F64: "fp64",
}

# Compile-time constants of a function, by name.
Constants: TypeAlias = tuple[tuple[str, bool], ...]

# Which adjoints each function of a backward module adds up.
ADJOINTS_OF = {"dkdv": ("column",), "dq": ("head", "row", "pair"), "diagonals": ("diagonal",)}


class Role(Enum):
    """What a parameter is, as far as a variant of the kernel may treat it specially."""

    OPERAND = "operand"  # pointer to q, k, v, o or a workspace: 16-byte aligned in aligned variants
    OUTER_STRIDE = "outer stride"  # of a batch or head: whole 16-byte units in aligned variants
    ROW_STRIDE = "row stride"  # the same; 64-bit in wide variants; `Field.packed` in packed ones
    LAST_STRIDE = "last stride"  # of a captured tensor: the constant 1 where `Variant.unit` says so
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter: its name in the kernel, its type as Triton writes it, its role. packed: what a row stride is where
    rows follow one another; None if that is not worth knowing."""

    name: str
    type: str
    role: Role = Role.OTHER
    packed: int | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """What a compiled function takes for granted about the tensors of a call. Never a length.

    aligned   operands start and their rows are spaced at multiples of 16 bytes
    wide      a tile of rows may span 2**31 elements or more
    packed    rows that a program reads tile by tile follow one another (of k and v; in a backward pass of q and do
              too): with strides that are constants, the addresses of a tile take 40 to 60 registers less
    unit      for each captured tensor that has axes, in order: its last axis is contiguous
    """

    aligned: bool
    wide: bool
    packed: bool
    unit: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a generated module and the compile-time constants that it is compiled with. max_registers: of a
    thread on an NVIDIA GPU; where that is not said, ptxas may spill a few for more programs at once."""

    name: str
    fields: tuple[Field, ...]
    constants: Constants = ()
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles it with."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}

    @property
    def label(self) -> str:
        """The name, told apart from that of the same function with other constants."""
        return self.name + "".join(f"[{name}]" for name, value in self.constants if value)

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*(field.name for field in self.fields), *(name for name, _ in self.constants))

    def signature(self, variant: Variant) -> dict[str, str]:
        """Types by parameter, as `triton.compiler.ASTSource` takes them."""
        rows = "i64" if variant.wide else "i32"
        types = {field.name: rows if field.role is Role.ROW_STRIDE else field.type for field in self.fields}
        return {**types, **dict.fromkeys(self.constexprs(variant), "constexpr")}

    def constexprs(self, variant: Variant) -> dict[str, int | bool]:
        """Values of the compile-time parameters."""
        last = [field.name for field in self.fields if field.role is Role.LAST_STRIDE]
        # A function that takes no captured tensors has no use for what is known of them.
        units = {name: 1 for name, is_unit in zip(last, variant.unit, strict=bool(last)) if is_unit}
        packed = {f.name: f.packed for f in self.fields if variant.packed and f.packed is not None}
        return {**units, **packed, **dict(self.constants)}

    def divisors(self, variant: Variant, itemsize: int) -> dict[str, int]:
        """Known divisors by parameter: of an address in bytes, of a stride in elements."""
        if not variant.aligned:
            return {}
        by_role = {Role.OPERAND: 16, Role.OUTER_STRIDE: 16 // itemsize, Role.ROW_STRIDE: 16 // itemsize}
        constants = self.constexprs(variant)
        return {
            field.name: by_role[field.role]
            for field in self.fields
            if by_role.get(field.role, 1) > 1 and field.name not in constants
        }


def functions_of(plan: KernelPlan | CorePlan | SequentialPlan) -> tuple[Function, ...]:
    """The functions of the module that `plan` renders to, in the order of launch."""
    match plan:
        case ForwardPlan(tile=tile):
            return (Function(plan.name, tuple(_forward_fields(plan)), (), *_launch(tile)),)
        case BackwardPlan():
            return tuple(_backward_functions(plan))
        case RowsPlan():
            return (Function(plan.name, tuple(_rows_fields(plan))),)
        case TilesPlan():
            return tuple(_tiles_functions(plan))
        case CorePlan():
            from attncc.runtime.triton_recurrent_fields import core_functions

            return core_functions(plan)
        case SequentialPlan():
            from attncc.runtime.triton_sequential import sequential_functions

            return sequential_functions(plan)
        case _:
            assert_never(plan)


def _launch(tile: Tile | None) -> tuple[int, int]:
    """Warps and stages."""
    if not isinstance(tile, TritonTile):
        raise TypeError(f"{tile} is no tile of a Triton kernel")
    return tile.num_warps, tile.num_stages


def itemsize_of(plan: KernelPlan | CorePlan | SequentialPlan) -> int:
    """Bytes of an element of the operands; 16 for tables, which have none."""
    return 16 if isinstance(plan, TilesPlan) else plan.dtype.bytes


def _forward_fields(plan: ForwardPlan) -> Iterator[Field]:
    pointer = f"*{TYPES[plan.dtype]}"
    yield from (Field(name, pointer, Role.OPERAND) for name in "qkvo")
    if plan.normalizer != "none":
        names = ("lse", "row_max", "entropy") if plan.statistics else ("lse",)
        yield from (Field(name, "*fp64" if plan.dtype is DType.F64 else "*fp32") for name in names)
    packed = {"k": plan.head_dim_qk, "v": plan.head_dim_v}
    for operand, row in zip("qkvo", "mnnm", strict=True):
        yield Field(f"stride_{operand}b", "i64", Role.OUTER_STRIDE)
        yield Field(f"stride_{operand}h", "i64", Role.OUTER_STRIDE)
        yield Field(f"stride_{operand}{row}", "i32", Role.ROW_STRIDE, packed.get(operand))
    yield from _sizes("heads_per_section")
    yield from _captured(plan)
    yield from _summaries(plan)
    if plan.blocks.strategy == "list":
        yield from _lists()


def _rows_fields(plan: RowsPlan) -> Iterator[Field]:
    pointer = f"*{TYPES[plan.dtype]}"
    yield Field("x", pointer, Role.OPERAND)
    if plan.upstream is not None:
        yield Field("upstream", f"*{TYPES[plan.upstream]}", Role.OPERAND)
    yield Field("out", f"*{TYPES[plan.stored]}", Role.OPERAND)
    yield Field("stride_xb", "i64", Role.OUTER_STRIDE)
    yield Field("stride_xh", "i64", Role.OUTER_STRIDE)
    yield Field("stride_xr", "i32", Role.ROW_STRIDE)
    yield from _sizes()
    yield from _captured(plan)


def _backward_functions(plan: BackwardPlan) -> Iterator[Function]:
    if plan.normalizer != "none":
        operands = (Field("o", _pointer(plan), Role.OPERAND), Field("do", _pointer(plan), Role.OPERAND))
        sums = (Field(name, _sum_pointer(plan)) for name in ("total", "dtotal", "delta"))
        sizes = (Field(name, "i32") for name in ("B", "H", "M"))
        fields = (*operands, *sums, *_strides({"o": None, "do": plan.head_dim_v}), *sizes)
        yield from (Function(f"{plan.name}_delta", fields, (("DTOTAL", given),)) for given in (False, True))
    masked = plan.mask is not None
    visits: list[Constants] = [(("STRANGE", False),), (("STRANGE", True),)] if masked else [()]
    dq, dk, dv = (
        Field(name, f"*{TYPES[dtype]}", Role.OPERAND)
        for name, dtype in (("dq", plan.stored.q), ("dk", plan.stored.k), ("dv", plan.stored.v))
    )
    for name, written, tile in (("dkdv", (dk, dv), plan.key_tile), ("dq", (dq,), plan.tile)):
        outputs = [*written, *([Field("strange_programs", "*i32")] if masked else [])]
        tables = _summaries(plan)
        lists = _lists() if name == "dq" and plan.blocks.strategy == "list" else ()
        fields = (*_backward_fields(plan, ADJOINTS_OF[name], outputs), *tables, *lists)
        constants = _sorted_or_not(visits) if name == "dq" and gathers(plan) else visits
        yield from (Function(f"{plan.name}_{name}", fields, values, *_launch(tile)) for values in constants)
    if any(adjoint.along == "diagonal" for adjoint in plan.adjoints):
        fields = tuple(_backward_fields(plan, ADJOINTS_OF["diagonals"], []))
        yield Function(f"{plan.name}_diagonals", fields, (), *_launch(plan.tile))


def gathers(plan: BackwardPlan) -> bool:
    """Whether `dq` adds to elements that pairs have gathered."""
    return any(adjoint.along == "pair" for adjoint in plan.adjoints)


def _sorted_or_not(visits: Sequence[Constants]) -> Iterator[Constants]:
    """The constants of `dq` where it gathers. Only a first visit adds, so only that one can be sorted."""
    yield from ((*visit, ("SORTED", False)) for visit in visits)
    yield (*visits[0], ("SORTED", True))


def _backward_fields(plan: BackwardPlan, along: tuple[str, ...], outputs: Iterable[Field]) -> Iterator[Field]:
    yield from (Field(name, _pointer(plan), Role.OPERAND) for name in ("q", "k", "v", "do"))
    if plan.normalizer != "none":
        yield from (Field(name, _sum_pointer(plan)) for name in ("total", "delta"))
    yield from outputs
    for number, adjoint in enumerate(plan.adjoints):
        if adjoint.along in along:
            yield Field(f"adjoint_{number}", _sum_pointer(plan))
            axes = 0 if adjoint.place is None else len(adjoint.place.indices)
            yield from (Field(f"adjoint_{number}_stride_{axis}", "i64") for axis in range(axes))
    if "pair" in along and gathers(plan):
        yield Field("first_program", "i32")
    yield from _strides({"q": plan.head_dim_qk, "k": plan.head_dim_qk, "v": plan.head_dim_v, "do": plan.head_dim_v})
    yield from _sizes()
    yield from _captured(plan)


def _strides(operands: Mapping[str, int | None]) -> Iterator[Field]:
    """Strides of batch, head and row; with each operand, its row stride where rows follow one another."""
    for operand, packed in operands.items():
        row = "n" if operand in "kv" else "m"
        yield Field(f"stride_{operand}_b", "i64", Role.OUTER_STRIDE)
        yield Field(f"stride_{operand}_h", "i64", Role.OUTER_STRIDE)
        yield Field(f"stride_{operand}_{row}", "i32", Role.ROW_STRIDE, packed)


def _pointer(plan: BackwardPlan) -> str:
    return f"*{TYPES[plan.dtype]}"


def _sum_pointer(plan: BackwardPlan) -> str:
    return "*fp64" if plan.dtype is DType.F64 else "*fp32"


def _lists() -> Iterator[Field]:
    yield Field("list_offsets", "*i32")
    yield Field("list_tiles", "*i32")
    yield Field("list_stride_b", "i32")
    yield Field("list_stride_h", "i32")


def _tiles_functions(plan: TilesPlan) -> Iterator[Function]:
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    for number, summary in enumerate(plan.blocks.summaries):
        table = Field("table", f"*{TYPES[dtypes[summary.load.tensor]]}")
        yield Function(f"{plan.name}_summary_{number}", (table, *_sizes("heads"), *_captured(plan)))
    if plan.blocks.strategy == "list":
        lists = tuple(Field(name, "*i32") for name in ("list_counts", "list_offsets", "list_tiles"))
        fields = (*lists, *_sizes("heads"), *_captured(plan), *_summaries(plan))
        yield from (Function(f"{plan.name}_list", fields, (("WRITE", write),)) for write in (False, True))


def _sizes(*more: str) -> Iterable[Field]:
    return (Field(name, "i32") for name in ("B", "H", "HKV", "M", "N", "q_offset", *more))


def _captured(plan: KernelPlan) -> Iterator[Field]:
    double = isinstance(plan, TilesPlan | RowsPlan) or plan.dtype is DType.F64
    for tensor in plan.tensors:
        name = name_of(tensor.name)
        yield Field(name, f"*{TYPES[tensor.dtype]}")
        for axis in range(tensor.rank):
            role = Role.LAST_STRIDE if axis == tensor.rank - 1 else Role.OTHER
            yield Field(f"{name}_size_{axis}", "i32")
            yield Field(f"{name}_stride_{axis}", "i64", role)
    kinds = {Kind.BOOL: "i1", Kind.INT: "i32", Kind.FLOAT: "fp64" if double else "fp32"}
    yield from (Field(name_of(scalar.name), kinds[scalar.kind]) for scalar in plan.scalars)


def _summaries(plan: ForwardPlan | BackwardPlan | TilesPlan) -> Iterator[Field]:
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    for number, summary in enumerate(plan.blocks.summaries):
        yield Field(f"summary_{number}", f"*{TYPES[dtypes[summary.load.tensor]]}")
        yield Field(f"summary_{number}_stride_b", "i32")
        yield Field(f"summary_{number}_stride_h", "i32")
