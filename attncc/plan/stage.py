"""Hoisting: each subexpression is computed once, at the outermost loop level where it is constant.

Before: one expression over coordinates, loads and parameters.
After:  the same expression over `Variable`s, and for each outer level the `Binding`s that define them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attncc.ir.nodes import Apply, Constant, Expr, Hole, Index, Load, Parameter, Reduce, Size, Summary, Variable
from attncc.ir.rewrite import children, has_free_d, kind_of, map_children
from attncc.plan.nodes import Binding, Staged, StagedValues

# The innermost level is where the expressions themselves stand; it gets no bindings of its own.
LevelOf = Callable[[Expr], int]


@dataclass(slots=True)
class Stager:
    """Collects the bindings of one kernel. `level_of` gives a level's position in `levels`, outermost first; what
    `level_of` puts at `len(levels)` stays where it is. `suffixes` name a load by the level that it is hoisted to."""

    levels: Sequence[str]
    suffixes: Sequence[str]
    level_of: LevelOf
    taken: set[str]
    _bound: dict[Expr, Variable] = field(default_factory=dict)
    _bindings: dict[str, list[Binding]] = field(default_factory=dict)

    def hoist(self, expr: Expr) -> Expr:
        """`expr` with every subexpression that is constant at an outer level replaced by a variable of that level."""
        return self._hoist(expr, len(self.levels), inside_reduce=False)

    def staged(self, expr: Expr) -> Staged:
        """As `hoist`, with the subexpressions that occur more than once in what remains bound first."""
        return share(self.hoist(expr), self.taken)

    def bindings(self, level: str) -> tuple[Binding, ...]:
        return tuple(self._bindings.get(level, ()))

    def _hoist(self, expr: Expr, level: int, *, inside_reduce: bool) -> Expr:
        if expr in self._bound and not inside_reduce:
            return self._bound[expr]
        own = self.level_of(expr)
        if own < level and not is_trivial(expr) and not (inside_reduce and has_free_d(expr)):
            return self._bind(expr, own)
        if isinstance(expr, Summary):  # The table stands for its load, whose indices are no values of a level.
            return expr
        inner = inside_reduce or isinstance(expr, Reduce)
        return map_children(expr, lambda child: self._hoist(child, level, inside_reduce=inner))

    def _bind(self, expr: Expr, level: int) -> Variable:
        if expr not in self._bound:
            value = map_children(expr, lambda child: self._hoist(child, level, inside_reduce=isinstance(expr, Reduce)))
            name = self._name(expr, level)
            kind = kind_of(expr)
            self._bindings.setdefault(self.levels[level], []).append(Binding(name, kind, value))
            self._bound[expr] = Variable(name, kind)
        return self._bound[expr]

    def _name(self, expr: Expr, level: int) -> str:
        match expr:
            case Load(tensor=tensor):
                stem = f"{tensor}_{self.suffixes[level]}"
            case Apply(op="to_float", args=(Index(name=name),)):
                stem = f"{name}_float"
            case _:
                stem = f"{self.levels[level]}_{len(self._bindings.get(self.levels[level], ()))}"
        return fresh(stem, self.taken)


def is_trivial(expr: Expr) -> bool:
    """A leaf that costs nothing to name again."""
    return isinstance(expr, Constant | Parameter | Index | Size | Variable | Hole)


def share(expr: Expr, taken: set[str]) -> Staged:
    """Binds each operation that occurs more than once in `expr`, innermost first."""
    staged = share_all([expr], taken)
    return Staged(staged.bindings, staged.values[0])


def share_all(exprs: Sequence[Expr], taken: set[str]) -> StagedValues:
    """As `share`, for operations that occur more than once in all of `exprs` together."""
    uses: Counter[Expr] = Counter()
    order: list[Expr] = []

    def visit(node: Expr) -> None:
        if is_trivial(node):
            return
        uses[node] += 1
        if uses[node] == 1:
            if not isinstance(node, Reduce):
                for child in children(node):
                    visit(child)
            order.append(node)

    for expr in exprs:
        visit(expr)
    bound: dict[Expr, Variable] = {}

    def rewrite(node: Expr) -> Expr:
        if node in bound:
            return bound[node]
        return node if isinstance(node, Reduce) else map_children(node, rewrite)

    bindings: list[Binding] = []
    for node in order:
        if uses[node] > 1:
            value = rewrite(node)
            variable = Variable(fresh(f"t{len(bindings)}", taken), kind_of(node))
            bindings.append(Binding(variable.name, variable.kind, value))
            bound[node] = variable
    return StagedValues(tuple(bindings), tuple(rewrite(expr) for expr in exprs))


def fresh(stem: str, taken: set[str]) -> str:
    """`stem`, or `stem` with the first number that makes it new. The name is taken from then on."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name
