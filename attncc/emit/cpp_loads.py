"""Captured tensors that a pair reads: which of them can be read better than element by element.

A load that varies with both query and key is a gather: one scalar load per pair. It is done for a whole tile before
the product, which then has all registers to itself. Two shapes of it are frequent and have a better form:

  a plane    `bias[b, h, q_idx, kv_idx]`: one axis is the key (plus what is constant within a head), others the query.
             A tile of it is read along the key and transposed, so that lanes are queries.
  a band     `table[h, q_idx - kv_idx + c]`: the one axis that varies with the query advances by one from lane to lane.
             Where the tensor is contiguous along it, the lanes are one vector load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncc.emit.cpp_plan import stages_of
from attncc.ir.nodes import Apply, Expr, Hole, Index, Load, Variable
from attncc.ir.rewrite import substitute, walk
from attncc.ir.types import DType
from attncc.plan.nodes import PairsPlan, Staged
from attncc.plan.stage import share

# Element types that are transposed as they are or as floats; 64-bit ints would need vectors of their own.
_PLANE_TYPES = frozenset(DType) - {DType.I64}


@dataclass(frozen=True, slots=True)
class TiledLoad:
    """A load that a kernel does for a tile of pairs at once.

    name      of the tile
    load      as score, weight or mask have it
    value     the same in terms of values outside the pair
    staged    that, with its shared parts bound first
    axis      of the tensor, along which keys lie; None where the load is no plane
    masked    only masks read it, so that tiles without masked pairs do without
    """

    name: str
    load: Load
    value: Load
    staged: Staged
    axis: int | None
    masked: bool


def tiled_loads(plan: PairsPlan, dtypes: Mapping[str, DType]) -> tuple[TiledLoad, ...]:
    """The loads of a pair's values and mask that vary with query and key, but not with the product of the two."""
    definitions = Definitions(plan)
    found: dict[Load, TiledLoad] = {}
    levels = (plan.call, plan.head, plan.row, plan.key)
    taken = {binding.name for level in levels for binding in level} | {p.name for p in plan.spec.parameters}
    stages = stages_of(plan)
    taken |= {binding.name for bindings, _ in stages for binding in bindings}
    for number, (bindings, values) in enumerate(stages):
        masked = plan.mask is not None and number == len(stages) - 1
        for load in _loads([*(binding.value for binding in bindings), *values]):
            value = definitions.outside_pair(load)
            if (
                load in found
                or not definitions.varies_with_both(value)
                or any(isinstance(n, Hole) for n in walk(value))
            ):
                continue
            axis = definitions.key_axis(value) if dtypes[load.tensor] in _PLANE_TYPES else None
            found[load] = TiledLoad(f"{load.tensor}_tile_{len(found)}", load, value, share(value, taken), axis, masked)
    return tuple(found.values())


def _loads(exprs: list[Expr]) -> list[Load]:
    return [node for expr in exprs for node in walk(expr) if isinstance(node, Load)]


class Definitions:
    """What the variables of a plan stand for."""

    def __init__(self, plan: PairsPlan) -> None:
        self._pair: dict[Expr, Expr] = {}
        for bindings, _ in stages_of(plan):
            for binding in bindings:
                self._pair[Variable(binding.name, binding.kind)] = substitute(binding.value, self._pair)
        self._outer: dict[Expr, Expr] = {}
        for level in (plan.row, plan.key):
            for binding in level:
                self._outer[Variable(binding.name, binding.kind)] = substitute(binding.value, self._outer)

    def outside_pair(self, load: Load) -> Load:
        """`load` with the values bound at a pair written out."""
        result = substitute(load, self._pair)
        assert isinstance(result, Load)
        return result

    def _indices(self, load: Load) -> list[Expr]:
        return [substitute(substitute(index, self._pair), self._outer) for index in load.indices]

    def varies_with_both(self, load: Load) -> bool:
        """Whether the indices of `load` read the query and the key."""
        indices = self._indices(load)
        return any(_reads(i, "kv_idx") for i in indices) and any(_reads(i, "q_row", "q_idx") for i in indices)

    def key_axis(self, load: Load) -> int | None:
        """The axis of a plane along which keys lie; None where the load is no plane."""
        indices = self._indices(load)
        along_key = [i for i, index in enumerate(indices) if _reads(index, "kv_idx")]
        along_query = [i for i, index in enumerate(indices) if _reads(index, "q_row", "q_idx")]
        if len(along_key) != 1 or not along_query or along_key[0] in along_query:
            return None
        return along_key[0] if _advances(indices[along_key[0]], "kv_idx") else None

    def is_band(self, load: Load) -> bool:
        """Whether one axis varies with the query, and by one from query to query."""
        indices = self._indices(load)
        along_query = [index for index in indices if _reads(index, "q_row", "q_idx")]
        return len(along_query) == 1 and _advances(along_query[0], "q_row", "q_idx")


def _reads(expr: Expr, *names: str) -> bool:
    return any(isinstance(node, Index) and node.name in names for node in walk(expr))


def _advances(expr: Expr, *names: str) -> bool:
    """Whether `expr` is the coordinate plus what does not read it."""
    match expr:
        case Index(name=name):
            return name in names
        case Apply(op="add", args=(left, right)):
            return (_advances(left, *names) and not _reads(right, *names)) or (
                _advances(right, *names) and not _reads(left, *names)
            )
        case Apply(op="sub", args=(left, right)):
            return _advances(left, *names) and not _reads(right, *names)
        case _:
            return False
