"""What the expressions of a kernel read: its tensors and scalars, and the names that they take."""

from __future__ import annotations

from collections.abc import Iterable

from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Attention, Expr, Load, Parameter
from attncc.ir.rewrite import walk
from attncc.ir.types import DType, Kind
from attncc.plan.nodes import GROUP_SIZE, Binding, ScalarArgument, TensorArgument


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
