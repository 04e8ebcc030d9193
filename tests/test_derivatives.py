"""Derivatives of builtins and of expressions: against finite differences and against autograd of what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from expr_strategies import masks, op, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

import attncc
from attncc.ir.errors import IRError
from attncc.ir.nodes import Apply, Constant, Element, Expr, Hole, Index, Load, Parameter, Reduce, Size
from attncc.ir.operators import OPERATORS, Operator
from attncc.ir.rewrite import substitute, walk
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.passes.differentiate import derivative
from attncc.plan.backward import plan_backward
from attncc.plan.nodes import Specialization, Target
from attncc.reference import Scope, value

X, Y = Parameter("x", Kind.FLOAT), Parameter("y", Kind.FLOAT)
DOT = Hole("dot")
SMOOTH = {
    operator.name: operator
    for operator in OPERATORS.values()
    for overload in operator.overloads
    if set(overload.arguments) == {Kind.FLOAT} and overload.result is Kind.FLOAT
}
EVERY = pytest.mark.parametrize("operator", SMOOTH.values(), ids=SMOOTH)
POSITIVE = ("log", "log2", "sqrt", "rsqrt", "log1p", "pow")
STEPS = ("sign", "floor", "ceil", "round")


def at(expr: Expr, *arguments: torch.Tensor, dot: torch.Tensor | None = None) -> torch.Tensor:
    """`expr` where x and y are `arguments`."""
    scope = Scope({}, {}, dict(zip("xy", arguments, strict=False)), [], {} if dot is None else {"dot": dot}, {})
    return value(expr, scope)


def partials(operator: Operator) -> list[Expr]:
    """The derivatives of one application by each of its arguments."""
    arguments = (X, Y)[: operator.arity]
    whole = Apply(operator.name, arguments)
    return [derivative(whole, argument) or Constant(0.0) for argument in arguments]


def double(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- builtins -------------------------------------------------------------------------------------------------------


def test_every_operator_of_floats_has_a_derivative() -> None:
    assert {name for name, operator in OPERATORS.items() if operator.derivative is not None} == set(SMOOTH)
    assert {"neg", "div", "pow", "min", "tanh", "gelu", "floor"} <= set(SMOOTH)
    assert OPERATORS["where"].derivative is None


@EVERY
def test_a_rule_has_one_derivative_per_argument(operator: Operator) -> None:
    assert operator.derivative is not None
    arguments = (X, Y)[: operator.arity]
    assert len(operator.derivative(arguments, Apply(operator.name, arguments))) == operator.arity


@EVERY
@settings(deadline=None, max_examples=by_tier(60))
@given(st.data())
def test_derivatives_are_limits_of_differences(operator: Operator, data: st.DataObject) -> None:
    """By the five-point rule, away from corners: of |x|, of steps, of x = y, of relu and elu."""
    step = 1e-3
    drawn = [data.draw(st.integers(25, 300)) / 100 for _ in range(operator.arity)]
    if operator.name not in POSITIVE:
        drawn = [x * data.draw(st.sampled_from((1, -1))) for x in drawn]
    if operator.name in ("min", "max") and drawn[0] == drawn[1]:
        drawn[1] += 0.1
    if operator.name in STEPS:
        drawn = [math.floor(2 * x) / 2 + 0.2 for x in drawn]
    point = [double(x) for x in drawn]
    for i, partial in enumerate(partials(operator)):

        def moved(steps: int, i: int = i) -> float:
            return operator.torch(*(x + steps * step if j == i else x for j, x in enumerate(point))).item()

        expected = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
        assert at(partial, *point).item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@EVERY
def test_derivatives_are_those_of_autograd_at_corners_too(operator: Operator) -> None:
    values = [-30.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 20.0]
    columns = zip(*product(values, repeat=operator.arity), strict=True)
    arguments = [double(column).requires_grad_() for column in columns]
    expected = torch.autograd.grad(operator.torch(*arguments).sum(), arguments)
    for partial, grad in zip(partials(operator), expected, strict=True):
        found = at(partial, *arguments).broadcast_to(grad.shape)
        torch.testing.assert_close(found, grad, rtol=1e-13, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("constant", [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
def test_powers_of_and_by_constants(constant: float) -> None:
    x = double([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).requires_grad_()
    for whole in (op("pow", X, Constant(constant)), op("pow", Constant(constant), X)):
        (expected,) = torch.autograd.grad(at(whole, x).sum(), x)
        found = at(derivative(whole, X) or Constant(0.0), x).broadcast_to(6)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15, equal_nan=True)


# --- expressions ----------------------------------------------------------------------------------------------------

REDUCTION = Reduce("sum", op("mul", Element("q", Index("d")), X), Size("D"))


def test_conditions_and_indices_do_not_pass_a_derivative_on() -> None:
    assert derivative(op("where", op("lt", X, Y), Y, Constant(1.0)), X) is None
    assert derivative(op("to_float", op("to_int", X)), X) is None
    assert derivative(Load("bias", (op("to_int", X),), Kind.FLOAT), X) is None
    assert derivative(op("floor", X), X) is None


def test_a_reduction_has_no_derivative_by_what_is_in_it() -> None:
    with pytest.raises(IRError, match="through the reduction"):
        derivative(op("exp", REDUCTION), X)
    assert derivative(op("mul", X, REDUCTION), REDUCTION) == X


def test_what_where_does_not_choose_may_be_infinite() -> None:
    """The derivative of log at 0 is infinite, that of a root of a negative number is NaN."""
    for unsafe in (op("log", X), op("sqrt", X), op("div", Constant(1.0), X)):
        found = derivative(op("where", op("gt", X, Constant(0.0)), unsafe, op("mul", Constant(3.0), X)), X)
        assert found is not None
        assert at(found, double([-1.0, 0.0])).tolist() == [3.0, 3.0]
        assert at(found, double([2.0])).isfinite().all()


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (
            op("mul", X, op("tanh", op("div", op("mul", Y, DOT), X))),
            "(1.0 - tanh(y * dot / x) * tanh(y * dot / x)) * y",
        ),
        (op("add", op("mul", Constant(0.5), DOT), Y), "0.5"),
        (op("mul", op("relu", DOT), op("relu", DOT)), "2.0 * relu(dot) * where(dot > 0.0, 1.0, 0.0)"),
        (op("exp", op("neg", DOT)), "-exp(-dot)"),
        (op("sub", op("neg", DOT), DOT), "-2.0"),
        (op("pow", DOT, Constant(2.0)), "2.0 * dot"),
        (op("div", DOT, X), "1.0 / x"),
        (op("where", op("gt", X, Y), op("add", DOT, X), DOT), "1.0"),
        (op("where", op("gt", X, Y), op("mul", DOT, X), Constant(2.0)), "where(x > y, x, 0.0)"),
        (op("mul", Constant(0.0), DOT), None),
    ],
)
def test_derivatives_read_as_a_person_would_write_them(expr: Expr, expected: str | None) -> None:
    found = derivative(expr, DOT)
    assert (found if found is None else to_text(found)) == expected


def test_soft_cap_multiplies_with_the_tanh_that_it_has() -> None:
    attention = attncc.check("attention softcap(cap: float = 30.0):\n    score = cap * tanh(qk / cap)")
    program = plan_backward(attention, Specialization(DType.F32, 64, 64), Target("cpp", "avx512"), set())
    pair = program.backward.pair
    assert [(b.name, to_text(b.value)) for b in pair.bindings] == [("t0", "tanh(%call_0 * dot)")]
    assert [to_text(v) for v in pair.values] == ["cap * %t0", "1.0 - %t0 * %t0"]


# Where a drawn score is computed: a few pairs, one head.
SIZES = {"B": 1, "H": 2, "HKV": 1, "M": 5, "N": 6, "D": 4, "E": 3, "q_offset": 1}
COORDINATES = {"b": 0, "h": 1, "hkv": 0, "q_row": [0, 1, 2, 3, 4], "q_idx": [1, 2, 3, 4, 5], "kv_idx": [5, 2, 3, 0, 1]}


def drawn_scope(data: st.DataObject, exprs: Sequence[Expr]) -> Scope:
    """Values of all that `exprs` read; floats off the grid of their literals, so that nothing stands at a corner."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    inputs: dict[str, torch.Tensor] = {}
    for node in (node for expr in exprs for node in walk(expr)):
        if isinstance(node, Load):
            shape = [17 if len(node.indices) > 1 else 8] * len(node.indices)
            drawn = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1
            made = {Kind.FLOAT: drawn, Kind.INT: (drawn * 3).to(torch.int64), Kind.BOOL: drawn > 0}[node.kind]
            inputs.setdefault(node.tensor, made)
        elif isinstance(node, Parameter):
            made = {Kind.FLOAT: double(1.7), Kind.INT: torch.tensor(3), Kind.BOOL: torch.tensor(True)}[node.kind]
            inputs.setdefault(node.name, made)
    qk = torch.randn(5, dtype=torch.float64, generator=generator) * 2
    indices = {name: torch.tensor(place) for name, place in COORDINATES.items()}
    return Scope(indices, SIZES, inputs, [], {"qk": qk.requires_grad_()}, {})


@settings(deadline=None, max_examples=by_tier(150))
@given(scores(3), masks(), st.data())
def test_scores_by_the_product_of_query_and_key(score: Expr, condition: Expr, data: st.DataObject) -> None:
    score = op("where", condition, score, op("mul", Constant(0.5), op("mul", score, score)))
    scope = drawn_scope(data, [score])
    found = value(derivative(score, Hole("qk")) or Constant(0.0), scope).broadcast_to(5)
    total = value(score, scope).broadcast_to(5).sum()
    qk = scope.holes["qk"]
    expected = torch.autograd.grad(total, qk, allow_unused=True)[0] if total.requires_grad else None
    torch.testing.assert_close(found, torch.zeros(5).double() if expected is None else expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=by_tier(150))
@given(scores(3), st.data())
def test_scores_by_what_they_load(score: Expr, data: st.DataObject) -> None:
    """Each occurrence of a load is the one variable."""
    score = op("mul", score, op("sub", score, op("sigmoid", Load("slope", (Index("h"),), Kind.FLOAT))))
    scope = drawn_scope(data, [score])
    loads = {n for n in walk(score) if isinstance(n, Load) and n.kind is Kind.FLOAT}
    for load in sorted(loads, key=to_text):
        partial = derivative(score, load)
        # One number per pair in place of the load, so that autograd gives the derivative at each pair.
        number = value(load, scope).broadcast_to(5).clone().requires_grad_()
        at_number = replace(scope, holes={**scope.holes, "score": number})
        total = value(substitute(score, {load: Hole("score")}), at_number).sum()
        expected = torch.autograd.grad(total, number, allow_unused=True)[0]
        found = value(partial or Constant(0.0), scope).broadcast_to(5)
        expected = torch.zeros_like(found) if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
