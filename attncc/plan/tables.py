"""Kernels that fill the tables of tiles that others read: summaries of loads, lists of live tiles."""

from __future__ import annotations

from dataclasses import replace

from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Load
from attncc.ir.rewrite import walk
from attncc.passes.blocks import block_structure
from attncc.plan.nodes import BackwardPlan, ForwardPlan, Tile, TilesPlan
from attncc.plan.pairs import PAIR_LEVELS, PAIR_SUFFIXES, hoisted_blocks, pair_level
from attncc.plan.reads import block_exprs, reserved, scalars_in, values_of
from attncc.plan.stage import Stager


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
