"""The attention of one specialization, and the kernels that transform its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.ir.nodes import Apply, Attention, Constant, Expr, Index, Parameter, Reduce, RowName, Size, identity_row
from attncc.ir.rewrite import map_children, map_clauses, substitute, walk
from attncc.ir.types import DType, Kind
from attncc.passes.simplify import simplify, simplify_expr
from attncc.passes.variance import variance
from attncc.plan.nodes import GROUP_SIZE, RowsPlan, Specialization, Target
from attncc.plan.reads import reserved, scalars_in, tensors_in, values_of
from attncc.plan.stage import Stager

_ROWS: tuple[RowName, ...] = ("q", "k", "v")
_ROW_LEVELS = ("call", "position", "position_element", "row_values")
_ROW_SUFFIXES = ("c", "p", "d", "r")


@dataclass(frozen=True, slots=True)
class Operands:
    """What the forward and the backward pass begin with.

    spec    the attention of these head dimensions
    rows    the kernels that transform rows of q, k and v
    heads   those of k and v as the kernels of pairs read them: "H" where a transform of k or v reads the query head
    """

    spec: Attention
    rows: tuple[RowsPlan, ...]
    heads: Literal["H", "HKV"]


def plan_operands(attention: Attention, specialization: Specialization, target: Target) -> Operands:
    attention = specialize(attention, specialization)
    per_query_head = any(_varies_with_head(transform) for transform in (attention.k, attention.v))
    if per_query_head:
        attention = _with_group_size(attention)
    rows = tuple(
        _plan_rows(attention, row, specialization, target, per_query_head=per_query_head)
        for row in _ROWS
        if getattr(attention, row) != identity_row(row) or (per_query_head and row != "q")
    )
    return Operands(attention, rows, "H" if per_query_head else "HKV")


def specialize(attention: Attention, specialization: Specialization) -> Attention:
    """The attention with the head dimensions filled in, simplified."""
    sizes: dict[Expr, Expr] = {
        Size("D"): Constant(specialization.head_dim_qk),
        Size("E"): Constant(specialization.head_dim_v),
    }
    return simplify(map_clauses(attention, lambda clause: substitute(clause, sizes)))


def _varies_with_head(transform: Expr) -> bool:
    """Whether a transform of k or v reads the query head, and so differs between the heads that share the row."""
    return any(isinstance(node, Index) and node.name == "h" for node in walk(transform))


def _with_group_size(attention: Attention) -> Attention:
    group = Parameter(GROUP_SIZE, Kind.INT)
    mapping: dict[Expr, Expr] = {
        Index("hkv"): Apply("floordiv", (Index("h"), group)),
        Size("HKV"): Apply("floordiv", (Size("H"), group)),
    }
    return map_clauses(attention, lambda clause: substitute(clause, mapping))


def _plan_rows(
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
        upstream=None,
    )


def plan_rows_of(forward: RowsPlan, gradient: Expr, name: str, *, upstream: DType, stored: DType) -> RowsPlan:
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
        upstream=upstream,
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
    upstream: DType | None,
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
