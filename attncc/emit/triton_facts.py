"""What the Triton templates ask about a plan: passes over keys, runs of tiles, what is bound and how it varies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from attncc.ir.blocks import BlockStructure
from attncc.ir.errors import IRError
from attncc.ir.nodes import Constant, Expr, Index, Reduce, Variable
from attncc.ir.rewrite import walk
from attncc.plan.nodes import (
    BackwardPlan,
    Binding,
    ForwardPlan,
    KernelPlan,
    RowsPlan,
    Staged,
    StagedValues,
    TilesPlan,
    TritonTile,
)
from attncc.plan.triton_tiles import power_of_two

LOG2_E = 1.4426950408889634


class Axis(Enum):
    """Along which axis of a tile a value varies. BOTH is a matrix."""

    NONE = 0
    FIRST = 1
    SECOND = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tiles: the names of its first tile and of the one past its last."""

    begin: str
    end: str


def to_log2(plan: ForwardPlan | BackwardPlan) -> str:
    """The factor from the kernel's scores to base-2 logarithms of weights."""
    if not plan.fold_scale:
        return repr(LOG2_E)
    if not isinstance(plan.scale, Constant):
        raise IRError("a folded scale is a constant")
    return repr(float(plan.scale.value) * LOG2_E)


def passes(blocks: BlockStructure) -> tuple[bool, ...]:
    """The passes over the tiles, by whether they apply the mask: full tiles need no mask where any can be proven."""
    proven = any(r.full_lo != r.full_hi for r in blocks.ranges)
    return (False, True) if proven else (True,)


def segments(blocks: BlockStructure, masked: bool | None) -> tuple[Segment, ...]:
    """The runs of tiles that a pass visits, ascending: full tiles, the partial ones around them, or (None) all."""
    result: list[Segment] = []
    for number, r in enumerate(blocks.ranges):
        first, last, full_first, full_last = (
            f"{name}_{number}" for name in ("first", "last", "full_first", "full_last")
        )
        if masked is None or (masked and r.full_lo == r.full_hi):
            result.append(Segment(first, last))
        elif masked:
            # A full part that begins with the first key of all leaves nothing partial before it.
            starts_full = r.lo == r.full_lo == Constant(0)
            result += [] if starts_full else [Segment(first, full_first)]
            result.append(Segment(full_last, last))
        elif r.full_lo != r.full_hi:
            result.append(Segment(full_first, full_last))
    return tuple(result)


def longest_first(blocks: BlockStructure) -> bool:
    """Whether later queries see more keys: the upper end of a range follows the queries and the lower end does not."""

    def follows(expr: Expr) -> bool:
        return any(isinstance(node, Index) and node.name in ("q_lo", "q_hi") for node in walk(expr))

    return any(follows(r.hi) and not follows(r.lo) for r in blocks.ranges)


def per_head(plan: BackwardPlan) -> bool:
    """Whether the factor of dq and dk differs between the heads of a call."""
    of_head = {binding.name for binding in plan.head}

    def differs(node: Expr) -> bool:
        return (isinstance(node, Variable) and node.name in of_head) or (
            isinstance(node, Index) and node.name in ("b", "h", "hkv")
        )

    return any(differs(node) for node in walk(plan.dot_factor))


def reduce_sizes(plan: RowsPlan) -> tuple[int, ...]:
    """The lengths of the reductions of a rows kernel, each once."""
    sizes = {node.size for expr in expressions_of(plan) for node in walk(expr) if isinstance(node, Reduce)}
    return tuple(sorted(int(size.value) for size in sizes if isinstance(size, Constant)))


def block_rows(plan: RowsPlan) -> int:
    """Rows that a program of a rows kernel transforms: 4096 elements of output, four warps with 32 each."""
    if plan.target.arch == "interpret":
        return 1024
    return max(4096 // power_of_two(plan.width), 1)


def delta_rows(plan: BackwardPlan) -> int:
    """Queries that a program of `delta` reads, as for a rows kernel."""
    if plan.target.arch == "interpret":
        return 1024
    return max(4096 // power_of_two(plan.head_dim_v), 1)


def diagonal_block(plan: BackwardPlan) -> int:
    """Queries, and keys, of a square tile of `diagonals`."""
    assert isinstance(plan.tile, TritonTile)
    return min(plan.tile.block_m, plan.tile.block_n)


def blocks_of(plan: KernelPlan) -> BlockStructure:
    if isinstance(plan, RowsPlan):
        raise IRError("a rows kernel has no tiles")
    return plan.blocks


def bindings_of(plan: KernelPlan) -> list[tuple[Axis, Binding]]:
    """Every binding with the axis along which its value varies, in the order of the kernel."""

    def staged(value: Staged | StagedValues | None, axis: Axis) -> list[tuple[Axis, Binding]]:
        return [] if value is None else [(axis, b) for b in value.bindings]

    match plan:
        case ForwardPlan() | BackwardPlan():
            levels = ((Axis.NONE, plan.call), (Axis.NONE, plan.head), (Axis.FIRST, plan.row), (Axis.SECOND, plan.key))
            of_value = (plan.score, plan.weight) if isinstance(plan, ForwardPlan) else (plan.pair,)
            tail = [b for value in (*of_value, plan.mask, plan.dropout) for b in staged(value, Axis.BOTH)]
        case RowsPlan():
            levels = (
                (Axis.NONE, plan.call),
                (Axis.FIRST, plan.position),
                (Axis.BOTH, plan.position_element),
                (Axis.FIRST, plan.row_values),
            )
            tail = staged(plan.element, Axis.BOTH)
        case TilesPlan():
            levels, tail = ((Axis.NONE, plan.call), (Axis.NONE, plan.head)), []
        case _:
            assert_never(plan)
    return [(axis, binding) for axis, level in levels for binding in level] + tail


def expressions_of(plan: KernelPlan) -> list[Expr]:
    """Every expression that the kernel of `plan` prints."""
    values = [binding.value for _, binding in bindings_of(plan)]
    match plan:
        case ForwardPlan():
            staged = [s.value for s in (plan.score, plan.mask, plan.weight, plan.dropout) if s is not None]
            return [*values, *staged, *([] if plan.sink is None else [plan.sink])]
        case BackwardPlan():
            places = [adjoint.place for adjoint in plan.adjoints if adjoint.place is not None]
            staged = [s.value for s in (plan.mask, plan.dropout) if s is not None]
            return [*values, *plan.pair.values, *places, *staged]
        case RowsPlan():
            return [*values, plan.element.value]
        case TilesPlan():
            return [*values, *plan.blocks.summaries]
        case _:
            assert_never(plan)
