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
from attncc.ir.nodes import Attention, Expr, Load, RowName
from attncc.ir.types import Along, DType, Kind

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
    captured tensor, in the order of the specification. statistics: the forward kernel also writes the greatest score
    and the entropy of each row (softmax only).
    """

    dtype: DType
    head_dim_qk: int
    head_dim_v: int
    tensors: tuple[tuple[str, DType], ...] = ()
    statistics: bool = False


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
class StagedValues:
    """As `Staged`, for several values that share subexpressions."""

    bindings: tuple[Binding, ...]
    values: tuple[Expr, ...]


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

    `element` is the value of output element d. upstream: the kernel also reads the rows `d{row}` of the gradient of the
    transformed rows, of this type, contiguous and of the same shape as the output, and what it writes is a gradient.
    stored: the type of what it writes. Hoisted: `call`; `position` (varies with the row's position only, one
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
    stored: DType
    upstream: DType | None = None


@dataclass(frozen=True, slots=True)
class CppTile:
    """lanes: queries per vector register; vectors: registers of queries of one step of a product; steps: how many of
    those make a tile (block_m = lanes * vectors * steps); block_n: keys per tile; micro_keys: keys per micro-kernel
    step."""

    lanes: int
    vectors: int
    block_n: int
    micro_keys: int
    steps: int = 1

    @property
    def block_m(self) -> int:
        return self.lanes * self.vectors * self.steps


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
    dropout      what a weight is multiplied by before it meets its value; not in the sum that it is divided by. None
                 where there is no dropout
    statistics   softmax only: the kernel also writes row_max and entropy (B, H, M), in the type of lse: the greatest
                 score of the kept pairs of each row, -inf where there is none, and -sum(p log p) of its weights p
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
    dropout: Staged | None
    statistics: bool
    blocks: BlockStructure
    tile: Tile


@dataclass(frozen=True, slots=True)
class Adjoint:
    """The gradient of one part of the pair's value: a part that reads captured tensors whose gradient is wanted, and
    neither the product of query and key nor anything else that varies more than `along` says. What no other pair shares
    is added to the tensor that it was read from.

    part     an expression as the specification has it, over coordinates and loads; for `pair` a `Load`
    place    for `pair`: that load as the kernel's printer reads it, over hoisted values; else None
    """

    part: Expr
    along: Along
    place: Load | None = None


@dataclass(frozen=True, slots=True)
class RowTypes:
    """Element types of rows of q, k and v, or of their gradients."""

    q: DType
    k: DType
    v: DType


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """Gradients of streaming attention, recomputing the weights from the forward pass's row totals.

    With dp = dot(do, v) and delta = dot(do, o) - dlse of the query, the gradient of a pair's value f is
      softmax   df = p (dp - delta),  p = exp(f - lse)              f is the score
      sum       df = (dp - delta) / total,  p = f / total          f is the weight; total is what the row was divided by
      none      df = dp,  p = f                                    f is the weight
    and then  dv += p do,   ddot = df * partial,   dq += dot_factor * ddot * k,   dk += dot_factor * ddot * q,
    and for each adjoint  entry += df * its partial. Where a row's total is 0 (lse is -inf) all of it is 0; so it is at
    masked pairs, whatever stands there. Where there is dropout, dp and the p of dv are multiplied by it; delta, which
    o has been through already, is not.

    pair         values[0] is f over Hole("dot"); values[1] its derivative by the product, without `dot_factor`
                 (Constant(1.0) where that is all there is to it); values[2 + i] that by `adjoints[i].part`
    fold_scale   as in a `ForwardPlan`: f is Hole("dot") and stands for scale * dot; the kernel multiplies by `scale`
                 within the exponential
    dot_factor   a head-level or outer value, applied once per element of dq and dk
    stored       the types of dq, dk and dv: that of q, k and v, or of the sums that they are where a kernel reads them
                 that takes them through a transform, so that they are rounded once
    writes_delta the launcher wants delta (B, H, M): a sink has a gradient
    key_blocks   Triton: which queries a tile of keys sees (`attncc.passes.transpose`), and
    key_tile     its tiles, for the kernel of dk and dv; `blocks` and `tile` are for that of dq. Both structures list
                 the same summaries
    """

    kernel: Literal["backward"]
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
    pair: StagedValues
    dot_factor: Expr
    adjoints: tuple[Adjoint, ...]
    mask: Staged | None
    normalizer: Literal["softmax", "sum", "none"]
    dropout: Staged | None
    stored: RowTypes
    writes_delta: bool
    blocks: BlockStructure
    tile: Tile
    key_blocks: BlockStructure | None
    key_tile: Tile | None


@dataclass(frozen=True, slots=True)
class TilesPlan:
    """Fills the summary tables and, for the list strategy, the lists of live tiles that a `ForwardPlan` reads.

    A backward plan's `key_blocks` and `key_tile` have tables of their own, and no lists.
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


# Kernels that visit pairs of a query and a key.
PairsPlan: TypeAlias = ForwardPlan | BackwardPlan
KernelPlan: TypeAlias = RowsPlan | ForwardPlan | BackwardPlan | TilesPlan


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


@dataclass(frozen=True, slots=True)
class RowAdjoint:
    """The gradient of a part of a row transform that reads captured tensors: `rows` writes one value per element of the
    rows of q, k or v, (B, heads, rows, width)."""

    part: Expr
    rows: RowsPlan


@dataclass(frozen=True, slots=True)
class BackwardProgram:
    """All kernels of a backward pass.

    rows          transforms of rows, as in the forward pass: computed again rather than kept
    tiles         the tables of `backward`, if it has any
    key_tiles     those of its `key_blocks`
    backward      gradients of the transformed rows, and adjoints
    row_adjoints  what captured tensors get through transforms, from those
    transposed    gradients of the rows as they came, from those: of q, k, v, where they have a transform
    sink          the sink, where a captured tensor whose gradient is wanted is part of it
    """

    rows: tuple[RowsPlan, ...]
    tiles: TilesPlan | None
    key_tiles: TilesPlan | None
    backward: BackwardPlan
    row_adjoints: tuple[RowAdjoint, ...]
    transposed: tuple[RowsPlan, ...]
    sink: Expr | None
    specialization: Specialization
    target: Target
    operand_heads: Literal["H", "HKV"]

    @property
    def kernels(self) -> tuple[KernelPlan, ...]:
        """In the order of launch."""
        tiles = tuple(plan for plan in (self.tiles, self.key_tiles) if plan is not None)
        return (*self.rows, *tiles, self.backward, *(part.rows for part in self.row_adjoints), *self.transposed)

    @property
    def spec(self) -> Attention:
        return self.backward.spec
