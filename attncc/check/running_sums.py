"""`cumsum`: a tensor along one axis, read by its running sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attncc.check.limit_errors import SummedAndRead
from attncc.check.reporter import Reporter
from attncc.check.values import Tensor, Value, element_index
from attncc.ir.nodes import Attention, Expr, Load, TensorParameter
from attncc.ir.rewrite import clauses, map_children, map_clauses, walk
from attncc.ir.types import FLOATS, Kind
from attncc.source import Span

_MARK = "cumsum of "


@dataclass(frozen=True, slots=True)
class RunningSum(Tensor):
    """The running sum of a tensor along one axis: a tensor of that axis alone. `indices` are those of the other axes,
    None in its place. Loads of it carry a name of their own until `resolved`."""

    source: str
    indices: tuple[Expr | None, ...]

    def load(self, indices: tuple[Expr, ...], span: Span | None) -> Expr:
        (along,) = indices
        filled = tuple(along if index is None else index for index in self.indices)
        return Load(f"{_MARK}{self.source}, {self.indices.index(None)}", filled, Kind.FLOAT, span)


def running_sum(row: Value, span: Span) -> RunningSum | None:
    """That of a row which is a tensor of floats along one axis; None of any other row."""
    match row:
        case Value(expr=Load(tensor=name, indices=indices), size=size) if size is not None:
            parameter = TensorParameter(span.text, FLOATS, (size,), span)
            return RunningSum(parameter, span, name, tuple(None if i == element_index() else i for i in indices))
        case _:
            return None


def resolved(attention: Attention, reporter: Reporter) -> Attention:
    """The attention whose parameters say which of them are summed, and along which axis."""
    axes: dict[str, dict[int | None, Span | None]] = {}
    if not any(load.tensor.startswith(_MARK) for load in _loads(attention)):
        return attention
    for load in _loads(attention):
        name, axis = _source(load)
        axes.setdefault(name, {}).setdefault(axis, load.span)
    for name, found in axes.items():
        if len(found) > 1:
            axis, span = next((axis, span) for axis, span in found.items() if axis is not None)
            reporter.report(SummedAndRead(span, name))
    summed = {name: next(iter(found)) for name, found in axes.items()}
    parameters = tuple(
        replace(p, summed=summed[p.name]) if isinstance(p, TensorParameter) and p.name in summed else p
        for p in attention.parameters
    )
    return replace(map_clauses(attention, _renamed), parameters=parameters)


def _loads(attention: Attention) -> Iterator[Load]:
    for _, clause in clauses(attention):
        yield from (node for node in walk(clause) if isinstance(node, Load))


def _source(load: Load) -> tuple[str, int | None]:
    """The tensor that a load reads, and the axis that it is summed along."""
    if not load.tensor.startswith(_MARK):
        return load.tensor, None
    name, axis = load.tensor.removeprefix(_MARK).split(", ")
    return name, int(axis)


def _renamed(expr: Expr) -> Expr:
    expr = map_children(expr, _renamed)
    return replace(expr, tensor=_source(expr)[0]) if isinstance(expr, Load) else expr
