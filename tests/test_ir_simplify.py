"""Simplification: what it makes of chosen expressions, and that it never changes what any expression evaluates to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import DISTANCE, KV_IDX, Q_IDX, Call, bool_exprs, cases, int_exprs, masks, op
from tiers import by_tier

from attncc.ir.nodes import Attention, Constant, Element, Expr, Hole, Index, Load, Parameter, Reduce, Size
from attncc.ir.rewrite import clauses, walk
from attncc.ir.text import to_text
from attncc.ir.types import Kind
from attncc.ir.verify import verify
from attncc.passes.simplify import simplify, simplify_expr
from attncc.reference import Scope, evaluate, value
from attncc.source import Source, Span

N, W, QK = Size("N"), Parameter("w", Kind.INT), Hole("qk")
CAUSAL, TRUE, FALSE = op("ge", Q_IDX, KV_IDX), Constant(True), Constant(False)


def c(value: bool | float) -> Constant:
    return Constant(value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Ints.
        (op("add", N, c(0)), "N"),
        (op("add", c(-2), N), "N - 2"),
        (op("sub", op("add", N, c(3)), c(3)), "N"),
        (op("sub", op("add", N, W), N), "w"),
        (op("sub", op("add", N, c(5)), op("add", W, c(7))), "N - w - 2"),
        (op("sub", op("sub", N, W), c(-1)), "N - w + 1"),
        (op("sub", c(0), N), "-N"),
        (op("sub", N, op("sub", N, W)), "w"),
        (op("add", op("neg", N), W), "w - N"),
        (op("neg", op("sub", Q_IDX, KV_IDX)), "kv_idx - q_idx"),
        (op("mul", op("mul", c(2), N), c(3)), "N * 6"),
        (op("mul", N, c(0)), "0"),
        (op("floordiv", op("mul", N, c(64)), c(64)), "N"),
        (op("floordiv", op("floordiv", N, c(4)), c(8)), "N // 32"),
        (op("floordiv", op("floordiv", N, c(-4)), c(8)), "N // -4 // 8"),
        (op("mod", op("mul", N, c(64)), c(64)), "0"),
        (op("mod", op("mod", N, c(8)), c(8)), "N % 8"),
        (op("abs", op("neg", N)), "abs(N)"),
        (op("min", op("min", N, c(7)), c(5)), "min(N, 5)"),
        (op("max", op("min", N, W), N), "N"),
        (op("bit_xor", op("bit_or", N, c(0)), c(0)), "N"),
        (op("floordiv", c(-7), c(2)), "-4"),
        (op("mod", c(-7), c(4)), "1"),
        (op("shl", c(3), c(4)), "48"),
        (op("popcount", c(255)), "8"),
        # Comparisons and logic.
        (op("lt", op("add", N, c(3)), c(10)), "N < 7"),
        (op("le", c(1), op("sub", N, c(1))), "2 <= N"),
        (op("lt", op("add", Q_IDX, c(3)), op("add", KV_IDX, c(5))), "q_idx < kv_idx + 2"),
        (op("not", op("gt", KV_IDX, Q_IDX)), "kv_idx <= q_idx"),
        (op("not", op("lt", QK, c(0.0))), "not qk < 0.0"),
        (op("not", op("eq", QK, c(0.0))), "qk != 0.0"),
        (op("eq", QK, QK), "qk == qk"),
        (op("le", N, N), "true"),
        (op("eq", CAUSAL, TRUE), "q_idx >= kv_idx"),
        (op("ne", CAUSAL, TRUE), "q_idx < kv_idx"),
        (op("and", op("and", CAUSAL, TRUE), CAUSAL), "q_idx >= kv_idx"),
        (op("and", CAUSAL, op("lt", Q_IDX, KV_IDX)), "false"),
        (op("or", CAUSAL, op("lt", Q_IDX, KV_IDX)), "true"),
        (op("and", CAUSAL, op("or", op("lt", N, W), CAUSAL)), "q_idx >= kv_idx"),
        (op("not", op("not", CAUSAL)), "q_idx >= kv_idx"),
        (op("where", op("not", Parameter("flag", Kind.BOOL)), N, W), "where(flag, w, N)"),
        (op("where", CAUSAL, op("where", CAUSAL, N, W), W), "where(q_idx >= kv_idx, N, w)"),
        (op("where", op("lt", c(1), c(2)), N, W), "N"),
        (op("where", CAUSAL, N, N), "N"),
        (op("where", CAUSAL, TRUE, op("lt", N, W)), "q_idx >= kv_idx or N < w"),
        (op("where", CAUSAL, op("lt", N, W), FALSE), "q_idx >= kv_idx and N < w"),
        # Floats: what is exact, and what only looks it.
        (op("mul", QK, c(1.0)), "qk"),
        (op("mul", c(-1.0), QK), "-qk"),
        (op("div", QK, c(4.0)), "qk * 0.25"),
        (op("div", QK, c(3.0)), "qk / 3.0"),
        (op("sub", QK, c(0.0)), "qk"),
        (op("sub", QK, c(-0.0)), "qk - -0.0"),
        (op("add", QK, c(0.0)), "qk + 0.0"),
        (op("mul", QK, c(0.0)), "qk * 0.0"),
        (op("sub", QK, QK), "qk - qk"),
        (op("sub", op("add", QK, c(3.0)), c(3.0)), "qk + 3.0 - 3.0"),
        (op("neg", op("neg", QK)), "qk"),
        (op("max", QK, QK), "qk"),
        (op("pow", op("relu", QK), c(2.0)), "relu(qk) * relu(qk)"),
        (op("pow", c(2.0), QK), "exp2(qk)"),
        (op("rsqrt", op("to_float", c(64))), "0.125"),
        (op("log", c(0.0)), "-inf"),
        (op("log", c(-1.0)), "log(-1.0)"),
        (op("sub", c(math.inf), c(math.inf)), "inf - inf"),
        # Below other nodes.
        (Load("t", (op("add", N, c(0)),), Kind.FLOAT), "t[N]"),
        (Reduce("sum", op("mul", Element("q", Index("d")), c(1.0)), op("mul", c(2), c(4))), "sum(d < 8: q[d])"),
        # Constants that no sum may leave 64 bits with stay where they are.
        (op("add", op("add", N, c(2**62)), c(2**62)), f"N + {2**62} + {2**62}"),
    ],
)
def test_chosen_expressions(before: Expr, after: str) -> None:
    assert to_text(simplify_expr(before)) == after


def test_spans_survive() -> None:
    span = Span(Source("s", "not (a > b)"), 0, 11)
    before = op("not", op("gt", KV_IDX, Q_IDX))
    after = simplify_expr(type(before)(before.op, before.args, span))
    assert after.span == span
    kept = Load("t", (op("add", N, c(0)),), Kind.FLOAT, span)
    assert simplify_expr(op("mul", kept, c(1.0))).span == span


def test_nothing_to_do_gives_the_same_object() -> None:
    mask = op("and", CAUSAL, op("lt", DISTANCE, W))
    assert simplify_expr(mask) is mask


# --- never a different value ----------------------------------------------------------------------------------------

FEW = (Q_IDX, KV_IDX, DISTANCE, c(0), c(1), c(-1), c(3), W)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.1, -3.5, 1e308, 5e-324)
X, Y = Hole("qk"), Hole("score")


def scope() -> Scope:
    """Small coordinates, and every pair of special values in the two holes."""
    q, kv = torch.arange(-5, 9)[:, None], torch.arange(0, 12)[None, :]
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    return Scope(
        indices={"q_row": q + 5, "q_idx": q, "kv_idx": kv, "h": torch.tensor(2), "b": torch.tensor(1)},
        sizes={"N": 12},
        inputs={"w": torch.tensor(-4), "window": torch.tensor(3), "shift": torch.tensor(1), "flag": torch.tensor(True)},
        reads=[],
        holes={"qk": special[:, None], "score": special[None, :]},
        rows={},
    )


def same(before: Expr) -> None:
    after = simplify_expr(before)
    expected, found = torch.broadcast_tensors(value(before, scope()), value(after, scope()))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{to_text(after)}: {m}")
    assert len(list(walk(after))) <= len(list(walk(before)))
    assert simplify_expr(after) == after


@settings(deadline=None, max_examples=by_tier(300))
@given(int_exprs(FEW, 3))
@example(op("floordiv", op("mul", Q_IDX, c(-3)), c(-3)))
@example(op("mod", op("mul", Q_IDX, W), W))
def test_ints(expr: Expr) -> None:
    same(expr)


@settings(deadline=None, max_examples=by_tier(300))
@given(bool_exprs(FEW, (Parameter("flag", Kind.BOOL), TRUE, FALSE, CAUSAL), 4) | masks(tensors=False))
def test_bools(expr: Expr) -> None:
    same(expr)


@st.composite
def float_exprs(draw: st.DrawFn, depth: int = 3) -> Expr:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from((X, Y, c(0.0), c(-0.0), c(1.0), c(-1.0), c(2.0), c(0.3), c(math.inf))))
    inner = float_exprs(depth - 1)
    unary = ("neg", "abs", "relu", "sign", "sqrt", "floor", "exp")
    name = draw(st.sampled_from(("add", "sub", "mul", "div", "min", "max", "where", *unary)))
    if name == "where":
        comparison = op(draw(st.sampled_from(("lt", "ge", "eq", "ne"))), draw(inner), draw(inner))
        return op(name, op("not", comparison) if draw(st.booleans()) else comparison, draw(inner), draw(inner))
    return op(name, *(draw(inner) for _ in range(1 if name in unary else 2)))


@settings(deadline=None, max_examples=by_tier(300))
@given(float_exprs())
@example(op("div", c(1.0), op("sub", X, c(0.0))))
@example(op("div", c(1.0), op("add", X, op("neg", c(0.0)))))
@example(op("where", op("not", op("lt", X, Y)), X, Y))
def test_floats(expr: Expr) -> None:
    same(expr)


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0])
def test_powers_with_a_constant_exponent(exponent: float) -> None:
    for expr in (op("pow", X, c(exponent)), op("pow", c(2.0), X)):
        expected, found = value(expr, scope()), value(simplify_expr(expr), scope())
        torch.testing.assert_close(found.broadcast_to(expected.shape), expected, rtol=1e-15, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=by_tier(100))
@given(cases(longest=20, widest=8))
def test_attentions(case: tuple[Attention, Call]) -> None:
    attention, call = case
    simplified = simplify(attention)
    verify(simplified)
    arguments = (call.q, call.k, call.v, call.inputs, call.q_offset)
    before, after = evaluate(attention, *arguments), evaluate(simplified, *arguments)
    has_power = any(getattr(node, "op", "") == "pow" for _, clause in clauses(attention) for node in walk(clause))
    exact = 1e-13 if has_power else 0.0
    torch.testing.assert_close(after[0], before[0], rtol=exact, atol=exact)
    assert (before[1] is None) == (after[1] is None)
    if before[1] is not None:
        torch.testing.assert_close(after[1], before[1], rtol=exact, atol=exact)
