"""Ranges hold every value: random int expressions at random points, against the meaning in the operator table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

from attncc.ir.nodes import Apply, Constant, Expr, Index, Load, Parameter, Size, Variable
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import kind_of
from attncc.ir.types import DType, Kind
from attncc.passes.ranges import ANY, BIT, INT32, Range, fits_int32, int_range
from attncc.passes.variance import variance

Q, KV, N = Index("q_idx"), Index("kv_idx"), Size("N")
X, Y = Parameter("x", Kind.INT), Parameter("y", Kind.INT)


def op(name: str, *args: Expr) -> Apply:
    return Apply(name, args)


INT_OPERATORS = [
    operator
    for operator in OPERATORS.values()
    if any(set(s.arguments) == {Kind.INT} and s.result is Kind.INT for s in operator.overloads)
]


def value_of(expr: Expr, x: int, y: int) -> torch.Tensor:
    match expr:
        case Constant(value=value):
            return torch.tensor(value)
        case Variable(name="x"):
            return torch.tensor(x)
        case Variable(name="y"):
            return torch.tensor(y)
        case Apply(op=name, args=args):
            return OPERATORS[name].torch(*(value_of(arg, x, y) for arg in args))
    raise TypeError(expr)


int_exprs = st.recursive(
    st.one_of(st.integers(-70, 70).map(Constant), st.sampled_from([Variable("x", Kind.INT), Variable("y", Kind.INT)])),
    lambda inner: st.sampled_from(INT_OPERATORS).flatmap(
        lambda operator: st.tuples(*[inner] * operator.arity).map(lambda args: Apply(operator.name, args))
    ),
    max_leaves=6,
)
intervals = st.tuples(st.integers(-100, 100), st.integers(0, 60)).map(lambda t: Range(t[0], t[0] + t[1]))


@settings(max_examples=by_tier(400), deadline=None)
@given(int_exprs, intervals, intervals, st.data())
def test_a_range_holds_every_value(expr: Expr, x: Range, y: Range, data: st.DataObject) -> None:
    bounds = int_range(expr, variables={"x": x, "y": y})
    if bounds == ANY:
        return  # Nothing is claimed, not even that torch's 64 bits suffice.
    for _ in range(5):
        at = data.draw(st.integers(*x)), data.draw(st.integers(*y))
        assert bounds.lo <= int(value_of(expr, *at)) <= bounds.hi, (expr, at)


@pytest.mark.parametrize("operator", INT_OPERATORS, ids=lambda operator: operator.name)
@settings(max_examples=by_tier(100))
@given(intervals, intervals, st.data())
def test_each_operator(operator, x: Range, y: Range, data: st.DataObject) -> None:
    expr = Apply(operator.name, (Variable("x", Kind.INT), Variable("y", Kind.INT))[: operator.arity])
    bounds = int_range(expr, variables={"x": x, "y": y})
    at = data.draw(st.integers(*x)), data.draw(st.integers(*y))
    assert bounds.lo <= int(value_of(expr, *at)) <= bounds.hi


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (op("sub", Q, KV), True),
        (op("sub", KV, Q), True),
        (op("abs", op("sub", Q, KV)), True),
        (op("lt", op("sub", Q, KV), X), True),
        (op("add", Q, X), False),
        (op("mul", Q, Constant(2)), True),
        (op("mul", Q, Constant(3)), False),
        (op("mul", op("floordiv", KV, Constant(64)), Constant(64)), True),
        (op("mod", Q, Constant(64)), True),
        (op("mod", Q, X), True),
        (op("floordiv", Q, X), True),
        (op("floordiv", Y, X), False),
        (op("shl", Constant(1), X), False),
        (op("shr", X, Y), True),
        (op("add", op("mod", Q, Constant(64)), Constant(1)), True),
        (op("to_int", Parameter("f", Kind.FLOAT)), True),
        (op("to_int", op("lt", X, Y)), True),
        (Load("doc", (Index("b"), KV), Kind.INT), False),
        (op("add", op("bit_and", X, Constant(255)), Constant(1)), True),
    ],
)
def test_fits_int32(expr: Expr, expected: bool) -> None:
    assert fits_int32(expr) is expected


def distance_bucket(distance: Expr) -> Expr:
    """As in T5: small distances as they are, larger ones by a logarithm."""
    far = op("min", op("add", Constant(8), op("to_int", Parameter("logarithm", Kind.FLOAT))), Constant(15))
    return op("where", op("lt", distance, Constant(8)), distance, far)


def test_a_choice_knows_its_condition() -> None:
    bucket = distance_bucket(op("abs", op("sub", KV, Q)))
    assert int_range(bucket).hi == 15
    assert fits_int32(op("add", bucket, op("where", op("gt", KV, Q), Constant(16), Constant(0))))


COMPARISONS = ["lt", "le", "gt", "ge", "eq", "ne"]
x_and_y = st.sampled_from([Variable("x", Kind.INT), Variable("y", Kind.INT), Constant(3), Constant(-20)])
conditions = st.recursive(
    st.builds(op, st.sampled_from(COMPARISONS), x_and_y, x_and_y),
    lambda inner: st.one_of(
        st.builds(op, st.sampled_from(["and", "or"]), inner, inner),
        inner.map(lambda a: op("not", a)),
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(conditions, x_and_y, x_and_y, intervals, intervals, st.data())
def test_choices(condition: Expr, a: Expr, b: Expr, x: Range, y: Range, data: st.DataObject) -> None:
    bounds = int_range(op("where", condition, a, b), variables={"x": x, "y": y})
    for _ in range(5):
        at = data.draw(st.integers(*x)), data.draw(st.integers(*y))
        chosen = a if bool(value_of(condition, *at)) else b
        assert bounds.lo <= int(value_of(chosen, *at)) <= bounds.hi


def test_the_element_type_of_a_load_counts() -> None:
    load = Load("doc", (Index("b"), KV), Kind.INT)
    assert fits_int32(load, {"doc": DType.I32})
    assert not fits_int32(load, {"doc": DType.I64})
    assert int_range(op("lt", load, Q), {"doc": DType.I64}) == BIT


def test_what_is_computed_on_the_way_counts() -> None:
    wide = op("sub", op("add", X, Y), Y)
    assert not fits_int32(op("mod", wide, Constant(8)))
    assert int_range(op("mod", wide, Constant(8))).within(INT32)


def test_kinds_of_positions() -> None:
    assert kind_of(N) is Kind.INT
    assert variance(op("add", Index("q_row"), Index("hkv"))) == {"q", "h"}
    assert variance(op("lt", Index("q_lo"), N)) == frozenset()
    with pytest.raises(ValueError, match="planned variable"):
        variance(Variable("t0", Kind.INT))
