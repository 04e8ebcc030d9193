"""Rows times a number for each token: a core reads such a row where the caller has it, and applies the number itself.

    query = 0.125 * x0 * rsqrt(z0 + 1e-6)        query        = x0
                                                 query_factor = 0.125 * rsqrt(z0 + 1e-6)

A product of rows has then nothing to wait for but a sum of squares, say, and nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from attncc.ir.nodes import Apply, Constant, Expr, Variable
from attncc.ir.rewrite import kind_of, walk
from attncc.ir.types import Kind
from attncc.passes.simplify import simplify_expr
from attncc.plan.sequential import Step

FACTOR = "_factor"

_SCALED = ("query", "key", "erase", "value", "gate", "bonus")


def take_factors_out(steps: Sequence[Step], inputs: Collection[str], in_place: Collection[str]) -> tuple[Step, ...]:
    """The steps, with factors of operands as steps of their own where what is left of an operand is an input.

    inputs: those that have channels; in_place: and those of them that an operand may be as they lie in memory. Steps
    that nothing reads any more are left out.
    """
    rows = _Rows(
        frozenset(in_place),
        frozenset(inputs) | {step.name for step in steps if step.axes},
        {step.name: step.value for step in steps if step.axes},
    )
    result: list[Step] = []
    for step in steps:
        match rows.split(step.value) if step.name.startswith(_SCALED) else None:
            case (row, factor) if factor is not None:
                result.append(Step(step.name, Kind.FLOAT, step.axes, row))
                result.append(Step(step.name + FACTOR, Kind.FLOAT, (), simplify_expr(factor)))
            case _:
                result.append(step)
    return _needed(result)


@dataclass(frozen=True, slots=True)
class _Rows:
    in_place: frozenset[str]
    with_channels: frozenset[str]
    values: Mapping[str, Expr]  # of steps with channels

    def split(self, value: Expr) -> tuple[Variable, Expr | None] | None:
        """The input that an expression is, and what all its channels are multiplied by; None where it is no such."""
        match value:
            case Variable(name=name) if name in self.in_place:
                return value, None
            case Variable(name=name) if name in self.values:
                return self.split(self.values[name])
            case Apply(op="neg", args=(a,)):
                return _times(self.split(a), Constant(-1.0))
            case Apply(op="mul", args=(factor, a)) if not self._has_channels(factor):
                return _times(self.split(a), factor)
            case Apply(op="mul", args=(a, factor)) if not self._has_channels(factor):
                return _times(self.split(a), factor)
            case Apply(op="div", args=(a, b)) if not self._has_channels(b):
                return _times(self.split(a), Apply("div", (Constant(1.0), b)))
            case _:
                return None

    def _has_channels(self, expr: Expr) -> bool:
        return any(isinstance(node, Variable) and node.name in self.with_channels for node in walk(expr))


def _times(found: tuple[Variable, Expr | None] | None, factor: Expr) -> tuple[Variable, Expr | None] | None:
    if found is None:
        return None
    row, other = found
    # A product of ints could overflow where that of a row did not.
    factor = factor if kind_of(factor) is Kind.FLOAT else Apply("mul", (Constant(1.0), factor))
    return row, factor if other is None else Apply("mul", (factor, other))


def _needed(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Operands, and what they are made of."""
    needed: list[Step] = []
    read = set[str]()
    for step in reversed(steps):
        if not step.name.startswith("z") or step.name in read:
            needed.append(step)
            read |= {node.name for node in walk(step.value) if isinstance(node, Variable)}
    return tuple(reversed(needed))
