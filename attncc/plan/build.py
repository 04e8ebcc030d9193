"""From an attention to the kernels of one specialization: the choices that are neither meaning nor spelling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from attncc.ir.blocks import BlockStructure, KeyRange
from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    RowName,
    Size,
    Softmax,
    Sum,
    Summary,
    identity_row,
)
from attncc.ir.rewrite import map_children, map_clauses, substitute, walk
from attncc.ir.types import DType, Kind
from attncc.passes.blocks import block_structure
from attncc.passes.simplify import simplify, simplify_expr
from attncc.passes.variance import variance
from attncc.plan.cpp_tiles import choose_tile as choose_cpp_tile
from attncc.plan.nodes import (
    GROUP_SIZE,
    BackwardPlan,
    Binding,
    ForwardPlan,
    KernelPlan,
    Program,
    RowsPlan,
    ScalarArgument,
    Specialization,
    Target,
    TensorArgument,
    Tile,
    TilesPlan,
)
from attncc.plan.stage import Stager
from attncc.plan.triton_tiles import choose_tile as choose_triton_tile

PAIR_LEVELS = ("call", "head", "row", "key")
PAIR_SUFFIXES = ("c", "h", "q", "kv")
_ROW_LEVELS = ("call", "position", "position_element", "row_values")
_ROW_SUFFIXES = ("c", "p", "d", "r")


def plan_attention(attention: Attention, specialization: Specialization, target: Target) -> Program:
    """The kernels of a call, in the order of launch: transforms of rows, tables of tiles, the attention itself."""
    attention = specialize(attention, specialization)
    per_query_head = any(varies_with_head(transform) for transform in (attention.k, attention.v))
    if per_query_head:
        attention = with_group_size(attention)
    rows = tuple(
        plan_rows(attention, row, specialization, target, per_query_head=per_query_head)
        for row in ("q", "k", "v")
        if getattr(attention, row) != identity_row(row) or (per_query_head and row != "q")
    )
    forward = _plan_forward(attention, specialization, target)
    tiles = (plan_tiles(forward),) if forward.blocks.summaries or forward.blocks.strategy == "list" else ()
    kernels: tuple[KernelPlan, ...] = (*rows, *tiles, forward)
    return Program(kernels, specialization, target, "H" if per_query_head else "HKV")


def specialize(attention: Attention, specialization: Specialization) -> Attention:
    """The attention with the head dimensions filled in, simplified."""
    sizes: dict[Expr, Expr] = {
        Size("D"): Constant(specialization.head_dim_qk),
        Size("E"): Constant(specialization.head_dim_v),
    }
    return simplify(map_clauses(attention, lambda clause: substitute(clause, sizes)))


def varies_with_head(transform: Expr) -> bool:
    """Whether a transform of k or v reads the query head, and so differs between the heads that share the row."""
    return any(isinstance(node, Index) and node.name == "h" for node in walk(transform))


def with_group_size(attention: Attention) -> Attention:
    group = Parameter(GROUP_SIZE, Kind.INT)
    mapping: dict[Expr, Expr] = {
        Index("hkv"): Apply("floordiv", (Index("h"), group)),
        Size("HKV"): Apply("floordiv", (Size("H"), group)),
    }
    return map_clauses(attention, lambda clause: substitute(clause, mapping))


# --- transforms of rows ---------------------------------------------------------------------------------------------


def plan_rows(
    attention: Attention, row: RowName, specialization: Specialization, target: Target, *, per_query_head: bool
) -> RowsPlan:
    """Writes the transformed rows of q, k or v; per_query_head: of k and v too, once per query head."""
    width = specialization.head_dim_v if row == "v" else specialization.head_dim_qk
    transform = simplify_expr(within_width(width, getattr(attention, row)))
    return _plan_elements(
        attention,
        transform,
        row=row,
        name=f"{attention.name}_{row}_rows",
        target=target,
        dtype=specialization.dtype,
        stored=specialization.dtype,
        width=width,
        heads="H" if row == "q" or per_query_head else "HKV",
        tensors=specialization.tensors,
        upstream=False,
    )


def plan_rows_of(forward: RowsPlan, gradient: Expr, name: str, stored: DType) -> RowsPlan:
    """Writes something else of the same rows: a gradient, which reads that of their transform too."""
    return _plan_elements(
        forward.spec,
        simplify_expr(within_width(forward.width, gradient)),
        row=forward.row,
        name=name,
        target=forward.target,
        dtype=forward.dtype,
        stored=stored,
        width=forward.width,
        heads=forward.heads,
        tensors=tuple((tensor.name, tensor.dtype) for tensor in forward.tensors),
        upstream=True,
    )


def _plan_elements(
    attention: Attention,
    value: Expr,
    *,
    row: RowName,
    name: str,
    target: Target,
    dtype: DType,
    stored: DType,
    width: int,
    heads: Literal["H", "HKV"],
    tensors: tuple[tuple[str, DType], ...],
    upstream: bool,
) -> RowsPlan:
    stager = Stager(_ROW_LEVELS, _ROW_SUFFIXES, _row_level, reserved(attention))
    element = stager.staged(value)
    levels = {level: stager.bindings(level) for level in _ROW_LEVELS}
    used = [element.value, *(b.value for b in element.bindings), *values_of(*levels.values())]
    return RowsPlan(
        kernel="rows",
        name=name,
        spec=attention,
        target=target,
        row=row,
        dtype=dtype,
        width=width,
        heads=heads,
        tensors=tensors_in(used, tensors),
        scalars=scalars_in(used, attention),
        element=element,
        stored=stored,
        upstream=upstream,
        **levels,
    )


def within_width(width: int, expr: Expr) -> Expr:
    """`expr` for d in [0, width): comparisons that this decides, as those of a rotation of the whole row, are gone."""
    match expr:
        case Apply(op="lt", args=(Index(name="d"), Constant(value=int(bound)))) if bound >= width:
            return Constant(True)
        case Reduce():
            return expr
        case _:
            return map_children(expr, lambda child: within_width(width, child))


def _row_level(expr: Expr) -> int:
    """The level of an expression within a rows kernel."""
    varies = variance(expr)
    per_head = bool(varies & {"b", "h"})
    if not varies:
        return _ROW_LEVELS.index("call")
    if "d" in varies:
        return len(_ROW_LEVELS) if per_head else _ROW_LEVELS.index("position_element")
    return _ROW_LEVELS.index("row_values" if per_head else "position")


# --- the attention itself -------------------------------------------------------------------------------------------


def _plan_forward(attention: Attention, specialization: Specialization, target: Target) -> ForwardPlan:
    tile = _choose_tile(attention, specialization, target)
    stager = Stager(PAIR_LEVELS, PAIR_SUFFIXES, pair_level, reserved(attention))
    normalizer, weight_clause, sink_clause = normalizer_parts(attention)
    exact_division = specialization.dtype is DType.F64

    scale = stager.hoist(attention.scale)
    scaled = Apply("mul", (attention.scale, Hole("dot")))
    fold_scale = folds_scale(attention, scale)
    score_clause = Hole("dot") if fold_scale else substitute(attention.score, {Hole("qk"): scaled})
    score = stager.staged(cheapened(score_clause, exact_division=exact_division))
    weight = None if weight_clause is None else stager.staged(cheapened(weight_clause, exact_division=exact_division))
    sink = None if sink_clause is None else stager.hoist(sink_clause)
    mask = None if attention.mask == Constant(True) else stager.staged(attention.mask)
    dropout = None if attention.dropout is None else stager.staged(attention.dropout)
    blocks = hoisted_blocks(block_structure(attention.mask), stager)
    levels = {level: stager.bindings(level) for level in PAIR_LEVELS}

    used: list[Expr] = [scale, *values_of(*levels.values()), *block_exprs(blocks)]
    used += [] if sink is None else [sink]
    for staged in (score, mask, weight, dropout):
        used += [] if staged is None else [staged.value, *(b.value for b in staged.bindings)]
    return ForwardPlan(
        kernel="forward",
        name=f"{attention.name}_{'statistics_' if specialization.statistics else ''}forward",
        spec=attention,
        target=target,
        dtype=specialization.dtype,
        head_dim_qk=specialization.head_dim_qk,
        head_dim_v=specialization.head_dim_v,
        tensors=tensors_in(used, specialization.tensors),
        scalars=scalars_in(used, attention),
        scale=scale,
        fold_scale=fold_scale,
        score=score,
        mask=mask,
        normalizer=normalizer,
        weight=weight,
        sink=sink,
        dropout=dropout,
        statistics=specialization.statistics,
        blocks=blocks,
        tile=tile,
        **levels,
    )


def folds_scale(attention: Attention, scale: Expr) -> bool:
    """Whether a kernel may leave the scores unscaled and multiply within the exponential.

    Not beside a sink: in the units of unscaled scores one of 1e38 would be infinite.
    """
    return (
        attention.normalizer == Softmax()
        and attention.score == Hole("qk")
        and isinstance(scale, Constant)
        and scale.value > 0
    )


def pair_level(expr: Expr) -> int:
    """The level of an expression within the forward kernel; tile corners and summaries stay where they stand."""
    if any(isinstance(node, Hole | Summary) or _is_corner(node) for node in walk(expr)):
        return len(PAIR_LEVELS)
    varies = variance(expr)
    if {"q", "kv"} <= varies:
        return len(PAIR_LEVELS)
    for coordinate, level in (("q", "row"), ("kv", "key")):
        if coordinate in varies:
            return PAIR_LEVELS.index(level)
    return PAIR_LEVELS.index("head" if varies else "call")


def _is_corner(expr: Expr) -> bool:
    return isinstance(expr, Index) and expr.name in ("q_lo", "q_hi", "kv_lo", "kv_hi")


def normalizer_parts(
    attention: Attention,
) -> tuple[Literal["softmax", "sum", "none"], Expr | None, Expr | None]:
    """The kind of normalizer, its weight and its sink."""
    match attention.normalizer:
        case Softmax(sink=sink):
            return "softmax", None, sink
        case Sum(weight=weight):
            return "sum", weight, None
        case Elementwise(weight=weight):
            return "none", weight, None


def cheapened(expr: Expr, *, exact_division: bool) -> Expr:
    """Small powers as products, and division by what does not vary within a pair as a product with its reciprocal.

    The reciprocal differs from the quotient by one rounding; f64 kernels keep the division.
    """
    expr = map_children(expr, lambda child: cheapened(child, exact_division=exact_division))
    match expr:
        case Apply(op="pow", args=(base, Constant(value=float(exponent)))) if exponent in (2.0, 3.0, 4.0):
            square = Apply("mul", (base, base))
            return {2.0: square, 3.0: Apply("mul", (square, base)), 4.0: Apply("mul", (square, square))}[exponent]
        case Apply(op="div", args=(dividend, divisor)) if (
            not exact_division and pair_level(dividend) > pair_level(divisor) and pair_level(divisor) < 2
        ):
            reciprocal = (
                Constant(1.0 / divisor.value)
                if isinstance(divisor, Constant) and divisor.value
                else Apply("div", (Constant(1.0), divisor))
            )
            return _scaled(dividend, reciprocal)
        case Apply(op="mul", args=(left, right)) if not exact_division and _is_factor(right) and not _is_factor(left):
            return _scaled(left, right)
        case _:
            return expr


def _is_factor(expr: Expr) -> bool:
    """Whether `expr` is constant within a head."""
    return pair_level(expr) < PAIR_LEVELS.index("row")


def _scaled(value: Expr, factor: Expr) -> Expr:
    """value * factor, with the factors that are constant within a head gathered: one product per pair. Differs from
    multiplying one by one by a rounding."""
    match value:
        case Apply(op="mul", args=(first, rest)) if _is_factor(first):
            if isinstance(first, Constant) and isinstance(factor, Constant):
                return Apply("mul", (Constant(first.value * factor.value), rest))
            return Apply("mul", (Apply("mul", (first, factor)), rest))
        case _:
            return Apply("mul", (value, factor))


def hoisted_blocks(blocks: BlockStructure, stager: Stager) -> BlockStructure:
    """Loads and arithmetic that do not depend on the tile move to the head and call levels."""

    def hoisted(key_range: KeyRange) -> KeyRange:
        return KeyRange(
            lo=stager.hoist(key_range.lo),
            hi=stager.hoist(key_range.hi),
            full_lo=stager.hoist(key_range.full_lo),
            full_hi=stager.hoist(key_range.full_hi),
        )

    varies = frozenset[str]().union(*map(variance, block_exprs(blocks)))
    return replace(
        blocks,
        per_batch="b" in varies,
        per_head="h" in varies,
        ranges=tuple(hoisted(key_range) for key_range in blocks.ranges),
        possible=stager.hoist(blocks.possible),
        certain=stager.hoist(blocks.certain),
    )


def plan_tiles(plan: ForwardPlan | BackwardPlan) -> TilesPlan:
    """The tables that `plan` reads, from the same expressions and the same tiles."""
    name = f"{plan.name.removesuffix('_forward')}_tiles"
    structure = replace(block_structure(plan.spec.mask), summaries=plan.blocks.summaries)
    return tables_of(plan, structure, plan.tile, name)


def tables_of(plan: ForwardPlan | BackwardPlan, structure: BlockStructure, tile: Tile, name: str) -> TilesPlan:
    """The tables of a block structure for tiles of that size."""
    stager = Stager(PAIR_LEVELS, PAIR_SUFFIXES, pair_level, reserved(plan.spec))
    blocks = hoisted_blocks(structure, stager)
    call, head = stager.bindings("call"), stager.bindings("head")
    used = [*values_of(call, head), *block_exprs(blocks)]
    names = {node.tensor for expr in used for node in walk(expr) if isinstance(node, Load)}
    return TilesPlan(
        kernel="tiles",
        name=name,
        spec=plan.spec,
        target=plan.target,
        tensors=tuple(t for t in plan.tensors if t.name in names),
        scalars=scalars_in(used, plan.spec),
        call=call,
        head=head,
        blocks=blocks,
        tile=tile,
    )


def _choose_tile(attention: Attention, specialization: Specialization, target: Target) -> Tile:
    sizes = (specialization.dtype, specialization.head_dim_qk, specialization.head_dim_v)
    if target.backend == "cpp":
        return choose_cpp_tile(target.arch, *sizes)
    _, weight, _ = normalizer_parts(attention)
    clauses = (attention.score, attention.mask, *(() if weight is None else (weight,)))
    loads = [node for clause in clauses for node in walk(clause) if isinstance(node, Load)]
    # Random numbers and logarithms of weights take as much room as what is read at every pair.
    fills_pairs = attention.dropout is not None or specialization.statistics
    reads_pairs = any({"q", "kv"} <= variance(load) for load in loads)
    return choose_triton_tile(target.arch, *sizes, reads_pairs=reads_pairs or fills_pairs)


# --- what a kernel reads --------------------------------------------------------------------------------------------


def values_of(*levels: Iterable[Binding]) -> list[Expr]:
    return [binding.value for level in levels for binding in level]


def block_exprs(blocks: BlockStructure) -> list[Expr]:
    corners = [e for r in blocks.ranges for e in (r.lo, r.hi, r.full_lo, r.full_hi)]
    return [*corners, blocks.possible, blocks.certain, *blocks.summaries]


def tensors_in(exprs: Iterable[Expr], dtypes: tuple[tuple[str, DType], ...]) -> tuple[TensorArgument, ...]:
    ranks = {node.tensor: len(node.indices) for expr in exprs for node in walk(expr) if isinstance(node, Load)}
    return tuple(TensorArgument(name, dtype, ranks[name]) for name, dtype in dtypes if name in ranks)


def scalars_in(exprs: Iterable[Expr], attention: Attention) -> tuple[ScalarArgument, ...]:
    used = {node.name for expr in exprs for node in walk(expr) if isinstance(node, Parameter)}
    declared = [ScalarArgument(p.name, p.kind) for p in attention.scalars if p.name in used]
    return (*declared, *([ScalarArgument(GROUP_SIZE, Kind.INT)] if GROUP_SIZE in used else []))


def reserved(attention: Attention) -> set[str]:
    """Names that no binding may take: those of the specification."""
    return {parameter.name for parameter in attention.parameters}
