"""From an attention to the kernels of its backward pass.

    transforms of rows, again ─▶ tables of tiles, again ─▶ the backward kernel ─▶ transforms of rows, transposed

Captured tensors are differentiated in two steps. A kernel adds up the gradient of each part of the pair's value that
reads one (`attncc.passes.parts`), over all pairs that share it; what leads from the tensor to the part, index map
included, is left to `attncc.runtime`, which does it once per entry.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Apply, Attention, Constant, Expr, Hole, Load, Softmax
from attncc.ir.rewrite import substitute
from attncc.ir.types import DType
from attncc.passes.blocks import block_structure
from attncc.passes.differentiate import Product, tangent_of, tangents_of
from attncc.passes.differentiate_rows import part_gradients, transposed_row
from attncc.passes.parts import learned_elements, learned_parts
from attncc.passes.simplify import simplify_expr
from attncc.passes.transpose import transposed_block_structure
from attncc.plan.cpp_tiles import choose_backward_tile as choose_cpp_tile
from attncc.plan.nodes import (
    Adjoint,
    BackwardPlan,
    BackwardProgram,
    RowAdjoint,
    RowsPlan,
    RowTypes,
    Specialization,
    Target,
    Tile,
    TilesPlan,
)
from attncc.plan.pairs import (
    PAIR_LEVELS,
    PAIR_SUFFIXES,
    cheapened,
    folds_scale,
    hoisted_blocks,
    normalizer_parts,
    pair_level,
)
from attncc.plan.reads import block_exprs, reserved, scalars_in, tensors_in, values_of
from attncc.plan.rows import plan_operands, plan_rows_of, within_width
from attncc.plan.stage import Stager, share_all
from attncc.plan.tables import plan_tiles, tables_of
from attncc.plan.triton_tiles import choose_backward_tiles as choose_triton_tiles


def plan_backward(
    attention: Attention, specialization: Specialization, target: Target, wanted: AbstractSet[str]
) -> BackwardProgram:
    """The kernels of a backward pass. wanted: the captured tensors whose gradients are asked for, beside q, k and v."""
    operands = plan_operands(attention, specialization, target)
    attention, rows = operands.spec, operands.rows
    stored = _stored_gradients(specialization.dtype, rows)
    backward = _plan_pairs(attention, specialization, target, wanted, stored)
    sink = attention.normalizer.sink if isinstance(attention.normalizer, Softmax) else None
    return BackwardProgram(
        rows=rows,
        tiles=plan_tiles(backward) if backward.blocks.summaries or backward.blocks.strategy == "list" else None,
        key_tiles=_plan_key_tiles(backward),
        backward=backward,
        row_adjoints=tuple(adjoint for forward in rows for adjoint in _row_adjoints(forward, wanted)),
        transposed=tuple(_plan_transposed(forward, shared_by_heads=operands.heads == "H") for forward in rows),
        sink=sink if backward.writes_delta else None,
        specialization=specialization,
        target=target,
        operand_heads=operands.heads,
    )


# --- transforms of rows ---------------------------------------------------------------------------------------------


def _transform(forward: RowsPlan) -> Expr:
    return within_width(forward.width, getattr(forward.spec, forward.row))


def _stored_gradients(dtype: DType, rows: tuple[RowsPlan, ...]) -> RowTypes:
    """The types of the gradients of the transformed rows."""
    transformed = {forward.row for forward in rows}
    q, k, v = (dtype.accumulator if row in transformed else dtype for row in ("q", "k", "v"))
    return RowTypes(q, k, v)


def _plan_transposed(forward: RowsPlan, *, shared_by_heads: bool) -> RowsPlan:
    """From the gradient of the transformed rows to that of the rows; shared_by_heads: of k and v, to what each of the
    query heads gives that share them, which is added up afterwards."""
    gradient = transposed_row(_transform(forward), forward.row, forward.width)
    added_up = shared_by_heads and forward.row != "q"
    return plan_rows_of(
        forward,
        gradient,
        f"{forward.spec.name}_d{forward.row}_rows",
        upstream=forward.dtype.accumulator,
        stored=forward.dtype.accumulator if added_up else forward.dtype,
    )


def _row_adjoints(forward: RowsPlan, wanted: AbstractSet[str]) -> list[RowAdjoint]:
    transform = _transform(forward)
    sums = forward.dtype.accumulator
    found: list[RowAdjoint] = []
    parts = learned_elements(transform, wanted)
    gradients = part_gradients(transform, parts, forward.row, forward.width)
    for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
        name = f"{forward.spec.name}_{forward.row}_part_{number}"
        found.append(RowAdjoint(part, plan_rows_of(forward, gradient, name, upstream=sums, stored=sums)))
    return found


# --- pairs ----------------------------------------------------------------------------------------------------------


def _plan_pairs(
    attention: Attention, specialization: Specialization, target: Target, wanted: AbstractSet[str], stored: RowTypes
) -> BackwardPlan:
    stager = Stager(PAIR_LEVELS, PAIR_SUFFIXES, pair_level, reserved(attention))
    normalizer, weight, sink = normalizer_parts(attention)
    exact = specialization.dtype is DType.F64
    scale = stager.hoist(attention.scale)
    fold_scale = folds_scale(attention, scale)

    value = _pair_value(attention, weight, fold_scale=fold_scale)
    parts = () if fold_scale else learned_parts(value, wanted)
    by_dot = tangent_of(value, Hole("dot")) or Product(0.0)
    dot_factor, rest = (attention.scale, Product()) if fold_scale else _factored(by_dot)
    by_parts = tangents_of(value, [part for part, _ in parts])
    exprs = [value, *(product.expr() for product in (rest, *by_parts))]
    pair = share_all([stager.hoist(cheapened(expr, exact_division=exact)) for expr in exprs], stager.taken)
    places = [stager.hoist(part) if along == "pair" else None for part, along in parts]
    adjoints = tuple(
        Adjoint(part, along, place if isinstance(place, Load) else None)
        for (part, along), place in zip(parts, places, strict=True)
    )
    dot_factor = stager.hoist(dot_factor)
    mask = None if attention.mask == Constant(True) else stager.staged(attention.mask)
    dropout = None if attention.dropout is None else stager.staged(attention.dropout)
    blocks, key_blocks = _structures(attention.mask, target)
    blocks = hoisted_blocks(blocks, stager)
    key_blocks = None if key_blocks is None else hoisted_blocks(key_blocks, stager)
    levels = {level: stager.bindings(level) for level in PAIR_LEVELS}

    used: list[Expr] = [scale, dot_factor, *values_of(*levels.values()), *block_exprs(blocks)]
    used += [] if key_blocks is None else block_exprs(key_blocks)
    used += [*pair.values, *values_of(pair.bindings), *(place for place in places if place is not None)]
    for staged in (mask, dropout):
        used += [] if staged is None else [staged.value, *values_of(staged.bindings)]
    tile, key_tile = _choose_tiles(specialization, target)
    return BackwardPlan(
        kernel="backward",
        name=f"{attention.name}_backward",
        spec=attention,
        target=target,
        dtype=specialization.dtype,
        head_dim_qk=specialization.head_dim_qk,
        head_dim_v=specialization.head_dim_v,
        tensors=tensors_in(used, specialization.tensors),
        scalars=scalars_in(used, attention),
        scale=scale,
        fold_scale=fold_scale,
        pair=pair,
        dot_factor=dot_factor,
        adjoints=adjoints,
        mask=mask,
        normalizer=normalizer,
        dropout=dropout,
        stored=stored,
        writes_delta=sink is not None and bool(learned_parts(sink, wanted)),
        blocks=blocks,
        tile=tile,
        key_blocks=key_blocks,
        key_tile=key_tile,
        **levels,
    )


def _structures(mask: Expr, target: Target) -> tuple[BlockStructure, BlockStructure | None]:
    """Which keys a tile of queries sees and, for Triton, which queries a tile of keys: both over the same summaries."""
    structure = block_structure(mask)
    if target.backend == "cpp":
        return structure, None
    transposed = transposed_block_structure(mask)
    summaries = tuple(dict.fromkeys((*structure.summaries, *transposed.summaries)))
    return replace(structure, summaries=summaries), replace(transposed, summaries=summaries)


def _plan_key_tiles(plan: BackwardPlan) -> TilesPlan | None:
    """The tables that `plan` reads with its tiles of keys."""
    if plan.key_blocks is None or plan.key_tile is None or not plan.key_blocks.summaries:
        return None
    _, structure = _structures(plan.spec.mask, plan.target)
    assert structure is not None
    return tables_of(plan, structure, plan.key_tile, f"{plan.name}_key_tiles")


def _pair_value(attention: Attention, weight: Expr | None, *, fold_scale: bool) -> Expr:
    """The score, or the weight where it is no softmax, over the product of query and key."""
    if fold_scale:
        return Hole("dot")
    score = substitute(attention.score, {Hole("qk"): Apply("mul", (attention.scale, Hole("dot")))})
    return simplify_expr(score if weight is None else substitute(weight, {Hole("score"): score}))


def _factored(product: Product) -> tuple[Expr, Product]:
    """The factors of a derivative that are constant within a head, and the others."""

    def split(exprs: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
        outer = tuple(expr for expr in exprs if pair_level(expr) <= PAIR_LEVELS.index("head"))
        return outer, tuple(expr for expr in exprs if expr not in outer)

    (factors, rest_factors), (divisors, rest_divisors) = split(product.factors), split(product.divisors)
    outer = Product(product.coefficient, factors, divisors)
    return outer.expr(), replace(product, coefficient=1.0, factors=rest_factors, divisors=rest_divisors)


def _choose_tiles(specialization: Specialization, target: Target) -> tuple[Tile, Tile | None]:
    sizes = (specialization.dtype, specialization.head_dim_qk, specialization.head_dim_v)
    if target.backend == "cpp":
        return choose_cpp_tile(target.arch, *sizes), None
    return choose_triton_tiles(target.arch, *sizes)
