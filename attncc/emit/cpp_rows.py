"""One more level for rows kernels: what varies with the element of the row alone, whatever the position.

Before: a rows plan, whose outermost level with `d` is that of position and element.
After:  the same, with each maximal subexpression over `d`, scalars and call-level values bound to an array of one value
        per element (`theta_d` of rope, the partner of an element), computed once per call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attncc.ir.nodes import Constant, Element, Expr, Hole, Index, Parameter, Reduce, Size, Summary, Variable
from attncc.ir.rewrite import children, has_free_d, kind_of, map_children
from attncc.plan.nodes import Binding, RowsPlan, Staged


@dataclass(frozen=True, slots=True)
class RowLevels:
    """The bindings of a rows plan that read elements, with those of elements alone taken out. A value of `elements` or
    `position_element` is an array over d."""

    elements: tuple[Binding, ...]
    position_element: tuple[Binding, ...]
    row_values: tuple[Binding, ...]
    element: Staged


def split_levels(plan: RowsPlan) -> RowLevels:
    """The levels of `plan` with that of elements alone."""
    taken = {b.name for level in (plan.call, plan.position, plan.position_element, plan.row_values) for b in level}
    taken |= {b.name for b in plan.element.bindings} | {p.name for p in plan.spec.parameters}
    splitter = _Splitter(frozenset(b.name for b in plan.call), taken)
    return RowLevels(
        position_element=splitter.bindings(plan.position_element),
        row_values=plan.row_values,
        element=Staged(splitter.bindings(plan.element.bindings), splitter.expr(plan.element.value)),
        elements=tuple(splitter.found),
    )


@dataclass(slots=True)
class _Splitter:
    call_level: frozenset[str]
    taken: set[str]
    found: list[Binding] = field(default_factory=list)
    _variables: dict[Expr, Variable] = field(default_factory=dict)

    def bindings(self, bindings: tuple[Binding, ...]) -> tuple[Binding, ...]:
        return tuple(replace(binding, value=self.expr(binding.value)) for binding in bindings)

    def expr(self, expr: Expr) -> Expr:
        if isinstance(expr, Constant | Index | Size | Parameter | Variable | Reduce):
            return expr
        if has_free_d(expr) and self._of_element_alone(expr):
            return self._bind(expr)
        return map_children(expr, self.expr)

    def _bind(self, expr: Expr) -> Variable:
        if expr not in self._variables:
            number = len(self.found)
            while (name := f"element_{number}") in self.taken:
                number += 1
            self.taken.add(name)
            self._variables[expr] = Variable(name, kind_of(expr))
            self.found.append(Binding(name, kind_of(expr), expr))
        return self._variables[expr]

    def _of_element_alone(self, expr: Expr) -> bool:
        match expr:
            case Variable(name=name):
                return name in self.call_level
            case Index(name=name):
                return name == "d"
            case Element() | Hole() | Summary() | Reduce():
                return False
            case _:
                return all(self._of_element_alone(child) for child in children(expr))
