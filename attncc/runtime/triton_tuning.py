"""The same program with each tile of the tuning set, to measure on a GPU which is fastest.

Tiles are part of a kernel's source, so that each candidate is a program of its own. No length is part of the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.nodes import Attention
from attncc.plan.build import plan_attention
from attncc.plan.nodes import KernelPlan, Program, RowsPlan, Specialization, Target, TritonTile
from attncc.plan.triton_tiles import candidates
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES, Bound
from attncc.runtime.programs import TritonProgram


def tiled_programs(
    attention: Attention, bound: Bound, dtype: torch.dtype, head_dim: int, arch: str
) -> Iterator[tuple[TritonProgram, TritonTile]]:
    """Programs for calls like `bound`, one per tile of the tuning set, the default one first."""
    for program, tile in tiled_plans(attention, bound, dtype, head_dim, arch):
        sources = [render(plan, printer_of(plan)) for plan in program.kernels]
        yield TritonProgram(program, sources, "", cache.folder()), tile


def tiled_plans(
    attention: Attention, bound: Bound, dtype: torch.dtype, head_dim: int, arch: str
) -> Iterator[tuple[Program, TritonTile]]:
    """The plans of `tiled_programs`."""
    tensors = tuple((name, DTYPES[tensor.dtype]) for name, tensor in bound.tensors.items())
    specialization = Specialization(DTYPES[dtype], head_dim, bound.sizes.E, tensors)
    program = plan_attention(attention, specialization, Target("triton", arch))
    first = program.forward.tile
    others = candidates(arch, DTYPES[dtype], head_dim, bound.sizes.E)
    for tile in dict.fromkeys((first, *others)):
        if isinstance(tile, TritonTile):
            yield replace(program, kernels=tuple(_with_tile(plan, tile) for plan in program.kernels)), tile


def _with_tile(plan: KernelPlan, tile: TritonTile) -> KernelPlan:
    return plan if isinstance(plan, RowsPlan) else replace(plan, tile=tile)
