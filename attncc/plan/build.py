"""From an attention to the kernels of one specialization: the choices that are neither meaning nor spelling."""

from __future__ import annotations

from attncc.ir.nodes import Apply, Attention, Constant, Expr, Hole, Load
from attncc.ir.rewrite import substitute, walk
from attncc.ir.types import DType
from attncc.passes.blocks import block_structure
from attncc.passes.variance import variance
from attncc.plan.cpp_tiles import choose_tile as choose_cpp_tile
from attncc.plan.nodes import ForwardPlan, KernelPlan, Program, Specialization, Target, Tile
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
from attncc.plan.rows import plan_operands
from attncc.plan.stage import Stager
from attncc.plan.tables import plan_tiles
from attncc.plan.triton_tiles import choose_tile as choose_triton_tile


def plan_attention(attention: Attention, specialization: Specialization, target: Target) -> Program:
    """The kernels of a call, in the order of launch: transforms of rows, tables of tiles, the attention itself."""
    operands = plan_operands(attention, specialization, target)
    forward = _plan_forward(operands.spec, specialization, target)
    tiles = (plan_tiles(forward),) if forward.blocks.summaries or forward.blocks.strategy == "list" else ()
    kernels: tuple[KernelPlan, ...] = (*operands.rows, *tiles, forward)
    return Program(kernels, specialization, target, operands.heads)


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
