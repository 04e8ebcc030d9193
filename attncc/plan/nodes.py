"""A kernel as data: what a template receives as its one variable, `plan`.

A plan says what is computed at which loop level and with which tiles; the template says how. Expressions are IR;
templates print them with the filters that the target's emitter provides.

Loop levels, outermost first: call (nothing but scalars and sizes vary), head (b, h), row (q_idx), key (kv_idx),
pair (both). Hoisting has put each subexpression at the outermost level where it is constant: a `Binding` of one
level may read `Variable`s of its own level bound before it, and of the levels outside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Attention, Expr, RowName
from attncc.ir.types import DType, Kind

# A run-time scalar of kernels, not of specifications: H // HKV of the call. It stands for the key/value head of a query
# head where k and v have been written out once per query head, so that the kernel's own HKV is H.
GROUP_SIZE = "_group_size"


@dataclass(frozen=True, slots=True)
class Target:
    """A folder of templates and the machine that they are rendered for.

    cpp:     avx512_bf16, avx512, avx2 or portable
    triton:  sm_80, sm_90, sm_100, gfx942, or interpret

    A family from outside the project is based on one of these two (`attncc.emit.families`): its templates are looked
    up first, its base's otherwise, and the base compiles and launches its kernels.
    """

    family: str
    arch: str
    based_on: Literal["cpp", "triton", ""] = ""
    flags: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """`cpp` or `triton`: which printer, tiles, compiler and launcher apply."""
        return self.based_on or self.family

    def __str__(self) -> str:
        return f"{self.family}:{self.arch}"


@dataclass(frozen=True, slots=True)
class Specialization:
    """What a kernel is compiled for, beside the specification: all that is known of a call at compile time.

    Lengths, batch, head counts, strides and scalars are not part of it. `tensors` lists the element type of each
    captured tensor, in the order of the specification.
    """

    dtype: DType
    head_dim_qk: int
    head_dim_v: int
    tensors: tuple[tuple[str, DType], ...] = ()


@dataclass(frozen=True, slots=True)
class Binding:
    """name := value"""

    name: str
    kind: Kind
    value: Expr


@dataclass(frozen=True, slots=True)
class Staged:
    """A pair-level value and the shared subexpressions to compute just before it."""

    bindings: tuple[Binding, ...]
    value: Expr


@dataclass(frozen=True, slots=True)
class TensorArgument:
    """A captured tensor that a kernel reads: a pointer, `rank` sizes and `rank` strides (in elements)."""

    name: str
    dtype: DType
    rank: int


@dataclass(frozen=True, slots=True)
class ScalarArgument:
    """A run-time scalar that a kernel reads. Ints arrive within [-2**31, 2**31), floats in the compute type."""

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """Writes the transformed rows of q, k or v to a contiguous (B, heads, rows, width) workspace.

    `element` is the value of output element d. Hoisted: `call`; `position` (varies with the row's position only, one
    value per position: shared by all b and h); `position_element` (position and d: shared by all b and h); `row` (b,
    h and position; reductions over the row live here). `heads` is "H" or "HKV".
    """

    kernel: Literal["rows"]
    name: str
    spec: Attention
    target: Target
    row: RowName
    dtype: DType
    width: int
    heads: Literal["H", "HKV"]
    tensors: tuple[TensorArgument, ...]
    scalars: tuple[ScalarArgument, ...]
    call: tuple[Binding, ...]
    position: tuple[Binding, ...]
    position_element: tuple[Binding, ...]
    row_values: tuple[Binding, ...]
    element: Staged


@dataclass(frozen=True, slots=True)
class CppTile:
    """lanes: queries per vector register; vectors: registers per tile of queries (block_m = lanes * vectors);
    block_n: keys per tile; micro_keys: keys per micro-kernel step."""

    lanes: int
    vectors: int
    block_n: int
    micro_keys: int

    @property
    def block_m(self) -> int:
        return self.lanes * self.vectors


@dataclass(frozen=True, slots=True)
class TritonTile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Tile: TypeAlias = CppTile | TritonTile


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """Streaming attention forward: o and lse from (transformed) q, k, v.

    scale        multiplies dot(q, k); bound at the level that its own value allows
    fold_scale   score is `qk` itself and scale is a positive head-level value: the kernel may leave the scores unscaled
                 and multiply within the exponential; `score.value` is then Hole("dot")
    score        over Hole("dot") (qk has been replaced by scale * dot)
    mask         None where every pair is kept
    weight       None for softmax; else over Hole("score")
    normalizer   softmax | sum | none
    sink         softmax only: a row-level or outer value, in natural-log units
    """

    kernel: Literal["forward"]
    name: str
    spec: Attention
    target: Target
    dtype: DType
    head_dim_qk: int
    head_dim_v: int
    tensors: tuple[TensorArgument, ...]
    scalars: tuple[ScalarArgument, ...]
    call: tuple[Binding, ...]
    head: tuple[Binding, ...]
    row: tuple[Binding, ...]
    key: tuple[Binding, ...]
    scale: Expr
    fold_scale: bool
    score: Staged
    mask: Staged | None
    normalizer: Literal["softmax", "sum", "none"]
    weight: Staged | None
    sink: Expr | None
    blocks: BlockStructure
    tile: Tile


@dataclass(frozen=True, slots=True)
class TilesPlan:
    """Fills the summary tables and, for the list strategy, the lists of live tiles that a `ForwardPlan` reads.

    Tables: one per `blocks.summaries` entry, in that order, shape (B or 1, H or 1, ceil(N / block_n)) by what the load
    varies with; ceil(M / block_m) instead for a summary of axis "q". Lists (per b, h where the mask varies with them;
    per tile of queries): offsets into one array of entries `tile * 2 + full`, ascending.
    """

    kernel: Literal["tiles"]
    name: str
    spec: Attention
    target: Target
    tensors: tuple[TensorArgument, ...]
    scalars: tuple[ScalarArgument, ...]
    call: tuple[Binding, ...]
    head: tuple[Binding, ...]
    blocks: BlockStructure
    tile: Tile


KernelPlan: TypeAlias = RowsPlan | ForwardPlan | TilesPlan


@dataclass(frozen=True, slots=True)
class Program:
    """All kernels of one specialization, in the order of launch; the last one is the forward kernel.

    operand_heads: the heads of k and v as the forward kernel reads them. "H" where their transforms vary with the query
    head and have been written out once per query head.
    """

    kernels: tuple[KernelPlan, ...]
    specialization: Specialization
    target: Target
    operand_heads: Literal["H", "HKV"]

    @property
    def forward(self) -> ForwardPlan:
        plan = self.kernels[-1]
        assert isinstance(plan, ForwardPlan)
        return plan

    @property
    def spec(self) -> Attention:
        return self.forward.spec
