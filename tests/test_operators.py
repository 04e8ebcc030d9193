"""The operator table: every row is complete, total, exact where it says so, and bounded by its interval rule."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

from attncc.ir.errors import IRError
from attncc.ir.nodes import Apply, Constant, Expr
from attncc.ir.operators import OPERATORS, Operator, Signature
from attncc.ir.types import Kind
from attncc.reference import Scope, value

OVERLOADS = [(operator, overload) for operator in OPERATORS.values() for overload in operator.overloads]
NAMES = [f"{operator.name}-{overload.arguments[-1].value}" for operator, overload in OVERLOADS]
DTYPES = {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.FLOAT: torch.float64}
EDGES: dict[Kind, list[bool | float]] = {
    Kind.BOOL: [False, True],
    Kind.INT: [0, 1, -1, 2, -3, 7, 63, 64, 100, -100, 2**31, -(2**40), 2**62],
    Kind.FLOAT: [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -3.5, 88.8, 1e300, 5e-324, math.inf, -math.inf, math.nan],
}
EVERY = pytest.mark.parametrize(("operator", "overload"), OVERLOADS, ids=NAMES)


def tensor(kind: Kind, values: list[bool | float]) -> torch.Tensor:
    return torch.tensor(values, dtype=DTYPES[kind])


@EVERY
def test_rows_are_complete(operator: Operator, overload: Signature) -> None:
    assert OPERATORS[operator.name] is operator
    assert len(overload.arguments) == operator.arity
    assert operator.doc
    kind = overload.arguments[-1]
    assert operator.result(overload.arguments) is overload.result is operator.result_of_last(kind)
    placeholders = [f"<{i}>" for i in range(operator.arity)]
    for family in ("cpp", "triton"):
        printed = operator.spelling(family, kind).format(*placeholders)
        assert all(placeholder in printed for placeholder in placeholders), printed


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_the_last_argument_tells_overloads_apart(operator: Operator) -> None:
    last = [overload.arguments[-1] for overload in operator.overloads]
    assert len(set(last)) == len(last)
    assert operator.result((Kind.BOOL,) * 4) is None
    for kind in set(Kind) - set(last):
        with pytest.raises(IRError):
            operator.result_of_last(kind)


@EVERY
def test_meanings_are_total_and_of_their_kind(operator: Operator, overload: Signature) -> None:
    columns = zip(*product(*(EDGES[kind] for kind in overload.arguments)), strict=True)
    arguments = [tensor(kind, list(column)) for kind, column in zip(overload.arguments, columns, strict=True)]
    result = operator.torch(*arguments)
    assert result.dtype == DTYPES[overload.result] and result.shape == arguments[0].shape


INTS = st.integers(-200, 200) | st.integers(-(2**40), 2**40)
PYTHON = {
    "floordiv": lambda x, y: x // y if y else 0,
    "mod": lambda x, y: x % y if y else 0,
    "shl": lambda x, y: x << min(max(y, 0), 63),
    "shr": lambda x, y: x >> min(max(y, 0), 63),
    "popcount": int.bit_count,
    "bit_length": int.bit_length,
    "bit_and": int.__and__,
    "bit_or": int.__or__,
    "bit_xor": int.__xor__,
    "bit_not": int.__invert__,
    "add": int.__add__,
    "sub": int.__sub__,
    "neg": int.__neg__,
    "abs": abs,
    "min": min,
    "max": max,
    "sign": lambda x: (x > 0) - (x < 0),
    "relu": lambda x: max(x, 0),
    "lt": int.__lt__,
    "le": int.__le__,
    "gt": int.__gt__,
    "ge": int.__ge__,
    "eq": int.__eq__,
    "ne": int.__ne__,
}


@pytest.mark.parametrize("name", PYTHON)
@settings(deadline=None, max_examples=by_tier(100))
@given(st.data())
def test_ints_are_those_of_python(name: str, data: st.DataObject) -> None:
    second = st.integers(-10, 20) if name in ("shl", "shr") else st.just(0) | INTS
    values = [data.draw(INTS), data.draw(second)][: OPERATORS[name].arity]
    if name == "shl":
        values[0] %= 1000
        values[1] = min(values[1], 50)
    assert OPERATORS[name].torch(*(torch.tensor(x) for x in values)).item() == PYTHON[name](*values)


MATH = {
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": math.log,
    "log2": math.log2,
    "log1p": math.log1p,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "relu": lambda x: max(x, 0.0),
    "sin": math.sin,
    "cos": math.cos,
    "erf": math.erf,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "abs": abs,
    "sign": lambda x: math.copysign(1.0, x),
    "pow": math.pow,
    "div": lambda x, y: x / y,
}


@pytest.mark.parametrize("name", MATH)
def test_floats_are_those_of_mathematics(name: str) -> None:
    values = [0.25, 0.5, 1.5, 2.0, 2.5, 7.25, 20.0]
    if name not in ("log", "log2", "sqrt", "rsqrt", "log1p", "pow"):
        values += [-x for x in values]
    pairs = [(x, y) for x in values for y in ((0.5, 3.0) if OPERATORS[name].arity == 2 else (0.0,))]
    arguments = [torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)]
    found = OPERATORS[name].torch(*arguments[: OPERATORS[name].arity])
    expected = [MATH[name](*pair[: OPERATORS[name].arity]) for pair in pairs]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-16)


def test_conversions() -> None:
    to_int, to_float = OPERATORS["to_int"].torch, OPERATORS["to_float"].torch
    floats = torch.tensor([1.9, -1.9, 0.0, math.inf, -math.inf, math.nan, 1e300], dtype=torch.float64)
    assert to_int(floats).tolist() == [1, -1, 0, 2**30, -(2**30), 0, 2**30]
    assert to_int(torch.tensor([True, False])).tolist() == [1, 0]
    assert to_float(torch.tensor([3, -(2**53)])).tolist() == [3.0, -(2.0**53)]


@pytest.mark.parametrize("name", sorted(set(MATH) - {"floor", "ceil", "round", "sign", "pow", "div"}))
def test_gradients_are_finite(name: str) -> None:
    """Also where a branch that is not taken would have an infinite one."""
    x = torch.tensor([-30.0, -1.5, -0.25, 0.25, 1.5, 30.0, 800.0], dtype=torch.float64, requires_grad=True)
    positive = name in ("log", "log2", "sqrt", "rsqrt", "log1p")
    arguments = x.abs() if positive else x[:6] if name in ("exp", "exp2") else x
    (gradient,) = torch.autograd.grad(OPERATORS[name].torch(arguments).sum(), x)
    assert gradient.isfinite().all()


# --- intervals ------------------------------------------------------------------------------------------------------


def evaluated(expr: Expr) -> bool | float:
    return value(expr, Scope({}, {}, {}, [], {}, {})).item()


def enclosed(kind: Kind) -> st.SearchStrategy[tuple[tuple[bool | float, bool | float], bool | float]]:
    """Bounds, now and then a point, and something within them."""
    match kind:
        case Kind.BOOL:
            rows = [((False, False), False), ((False, True), False), ((False, True), True), ((True, True), True)]
            return st.sampled_from(rows)
        case Kind.INT:
            numbers: st.SearchStrategy[float] = st.integers(-40, 40) | st.integers(-3, 3)
        case Kind.FLOAT:
            numbers = st.integers(-40, 40).map(lambda n: n / 8) | st.sampled_from((math.inf, -math.inf, 0.1, -1e300))
    points = numbers.map(lambda x: ((x, x), x))
    return points | st.tuples(numbers, numbers, numbers).map(sorted).map(lambda x: ((x[0], x[2]), x[1]))


@pytest.mark.representative(30)
@EVERY
@settings(deadline=None, max_examples=by_tier(50))
@given(st.data())
def test_interval_rules_are_sound(operator: Operator, overload: Signature, data: st.DataObject) -> None:
    assert_sound(operator, overload, data)


@pytest.mark.slow
@EVERY
@settings(deadline=None, max_examples=500)
@given(st.data())
def test_interval_rules_are_sound_many_times(operator: Operator, overload: Signature, data: st.DataObject) -> None:
    assert_sound(operator, overload, data)


def assert_sound(operator: Operator, overload: Signature, data: st.DataObject) -> None:
    drawn = [data.draw(enclosed(kind)) for kind in overload.arguments]
    bounds = tuple((Constant(low), Constant(high)) for (low, high), _ in drawn)
    result = operator.bounds(overload.arguments[-1], bounds)
    if result is None:
        return
    low, high = (evaluated(bound) for bound in result)
    inner = evaluated(Apply(operator.name, tuple(Constant(x) for _, x in drawn)))
    if overload.result is Kind.BOOL:
        assert low <= inner <= high
    elif not (math.isnan(low) or math.isnan(high)):
        # An end that is NaN claims nothing; ends that are numbers hold every element that is one.
        assert math.isnan(inner) or low <= inner <= high


@EVERY
def test_points_stay_points(operator: Operator, overload: Signature) -> None:
    """Also where the operator has no rule."""
    expr = Constant(1)
    assert (
        operator.bounds(overload.arguments[-1], ((expr, expr),) * operator.arity)
        == (Apply(operator.name, (expr,) * operator.arity),) * 2
    )
