"""What a plan holds, for the C++ printer: its bindings by level, and every expression that its template prints."""

from __future__ import annotations

from typing import assert_never

from attncc.emit.cpp_rows import RowLevels
from attncc.ir.nodes import Constant, Expr, Index
from attncc.plan.nodes import Adjoint, BackwardPlan, Binding, ForwardPlan, KernelPlan, PairsPlan, RowsPlan, TilesPlan


def levels_of(plan: KernelPlan, row_levels: RowLevels | None) -> list[tuple[tuple[Binding, ...], str]]:
    """The bindings of a plan, outermost first, with the name of their level."""
    match plan:
        case ForwardPlan() | BackwardPlan():
            pair = [(bindings, "pair") for bindings, _ in stages_of(plan)]
            return [(plan.call, "call"), (plan.head, "head"), (plan.row, "row"), (plan.key, "key"), *pair]
        case RowsPlan():
            assert row_levels is not None
            return [
                (plan.call, "call"),
                (row_levels.elements, "element"),
                (plan.position, "position"),
                (row_levels.position_element, "position_element"),
                (row_levels.row_values, "row"),
                (row_levels.element.bindings, "staged"),
            ]
        case TilesPlan():
            return [(plan.call, "call"), (plan.head, "head")]
        case _:
            assert_never(plan)


def stages_of(plan: PairsPlan) -> list[tuple[tuple[Binding, ...], tuple[Expr, ...]]]:
    """What is computed at a pair, the mask last: bindings and the values that follow."""
    found: list[tuple[tuple[Binding, ...], tuple[Expr, ...]]] = []
    if isinstance(plan, ForwardPlan):
        found += [(stage.bindings, (stage.value,)) for stage in (plan.score, plan.weight) if stage is not None]
    else:
        found.append((plan.pair.bindings, plan.pair.values))
    return [*found, *((stage.bindings, (stage.value,)) for stage in (plan.dropout, plan.mask) if stage is not None)]


def expressions_of(plan: KernelPlan, row_levels: RowLevels | None) -> list[Expr]:
    """Every expression that the kernel's template prints."""
    exprs = [binding.value for bindings, _ in levels_of(plan, row_levels) for binding in bindings]
    match plan:
        case ForwardPlan():
            exprs += [value for _, values in stages_of(plan) for value in values]
            exprs += [plan.scale] if plan.sink is None else [plan.scale, plan.sink]
        case BackwardPlan():
            exprs += [value for _, values in stages_of(plan) for value in values]
            exprs += [plan.scale, plan.dot_factor]
            exprs += [index for adjoint in plan.adjoints if adjoint.place for index in adjoint.place.indices]
        case RowsPlan():
            exprs.append(row_levels.element.value if row_levels else plan.element.value)
        case TilesPlan():
            pass
        case _:
            assert_never(plan)
    if not isinstance(plan, RowsPlan):
        exprs += [e for r in plan.blocks.ranges for e in (r.lo, r.hi, r.full_lo, r.full_hi)]
        exprs += [plan.blocks.possible, plan.blocks.certain, *plan.blocks.summaries]
    return exprs


def varying_partials(plan: BackwardPlan) -> list[int]:
    """Which derivatives of a pair's value are no constants: 0 is that by the product, 1 + i that of adjoint i."""
    return [number for number, value in enumerate(plan.pair.values[1:]) if not isinstance(value, Constant)]


def own_axes(adjoint: Adjoint) -> dict[str, int]:
    """The axes of what a pair's adjoint adds to along which each batch, query head or query has entries of its own."""
    indices = () if adjoint.place is None else adjoint.place.indices
    return {i.name: axis for axis, i in enumerate(indices) if isinstance(i, Index) and i.name in ("b", "h", "q_row")}
