"""Hoisting puts each subexpression at its outermost level, once, and says the same as before."""

from __future__ import annotations

from attncc.ir.nodes import Apply, Constant, Expr, Hole, Index, Load, Parameter, Variable
from attncc.ir.rewrite import map_children
from attncc.ir.types import Kind
from attncc.passes.variance import variance
from attncc.plan.stage import Stager, share

LEVELS = ("call", "head", "row", "key")


def level_of(expr: Expr) -> int:
    if isinstance(expr, Hole):
        return 4
    varies = variance(expr)
    if {"q", "kv"} <= varies:
        return 4
    return 2 if "q" in varies else 3 if "kv" in varies else 1 if varies else 0


def stager(*taken: str) -> Stager:
    return Stager(LEVELS, ("c", "h", "q", "kv"), level_of, set(taken))


def mul(a: Expr, b: Expr) -> Expr:
    return Apply("mul", (a, b))


def to_float(a: Expr) -> Expr:
    return Apply("to_float", (a,))


SLOPE = Load("slope", (Index("h"),), Kind.FLOAT)
DISTANCE = Apply("sub", (Index("q_idx"), Index("kv_idx")))


def expand(expr: Expr, stage: Stager) -> Expr:
    """`expr` with every variable replaced by what it was bound to."""
    values = {b.name: b.value for level in LEVELS for b in stage.bindings(level)}

    def walk(node: Expr) -> Expr:
        return walk(values[node.name]) if isinstance(node, Variable) else map_children(node, walk)

    return walk(expr)


def test_alibi_loads_its_slope_once_per_head() -> None:
    stage = stager("slope")
    score = Apply("sub", (Hole("dot"), mul(SLOPE, to_float(DISTANCE))))
    hoisted = stage.hoist(score)
    assert [b.value for b in stage.bindings("head")] == [SLOPE]
    assert [stage.bindings(level) for level in ("call", "row", "key")] == [(), (), ()]
    assert expand(hoisted, stage) == score


def test_a_binding_reads_the_levels_outside_it() -> None:
    stage = stager()
    row = mul(mul(SLOPE, Apply("exp", (Parameter("tau", Kind.FLOAT),))), to_float(Index("q_idx")))
    score = Apply("add", (Hole("dot"), row))
    hoisted = stage.hoist(score)
    assert [len(stage.bindings(level)) for level in LEVELS] == [1, 1, 1, 0]
    assert expand(hoisted, stage) == score


def test_equal_subexpressions_are_bound_once_and_names_are_new() -> None:
    stage = stager("slope_h")
    stage.hoist(Apply("add", (Hole("dot"), SLOPE)))
    stage.hoist(Apply("mul", (Hole("dot"), SLOPE)))
    assert [b.name for b in stage.bindings("head")] == ["slope_h_2"]


def test_leaves_stay_where_they_are() -> None:
    stage = stager()
    assert stage.hoist(DISTANCE) == DISTANCE
    assert all(stage.bindings(level) == () for level in LEVELS)


def test_share_binds_repeated_operations_innermost_first() -> None:
    t = Apply("tanh", (Hole("dot"),))
    staged = share(Apply("add", (mul(t, t), Apply("exp", (mul(t, t),)))), set())
    assert [b.value for b in staged.bindings] == [t, mul(Variable("t0", Kind.FLOAT), Variable("t0", Kind.FLOAT))]
    assert staged.value == Apply("add", (Variable("t1", Kind.FLOAT), Apply("exp", (Variable("t1", Kind.FLOAT),))))


def test_share_leaves_what_occurs_once() -> None:
    expr = Apply("add", (Hole("dot"), Constant(1.0)))
    assert share(expr, set()).bindings == ()
    assert share(expr, set()).value == expr
