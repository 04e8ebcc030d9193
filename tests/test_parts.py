"""Parts that carry captured tensors into a score: which they are, and what they vary along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expr_strategies import DISTANCE, KV_IDX, PLAIN_INTS, Q_IDX, Q_ROW, B, H, bool_exprs, int_exprs, number, op, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

import attncc
from attncc.ir.nodes import Constant, Expr, Hole, Load, Parameter, Size
from attncc.ir.rewrite import walk
from attncc.ir.text import to_text
from attncc.ir.types import Kind
from attncc.passes.differentiate import tangents_of
from attncc.passes.parts import along_of, learned_elements, learned_parts
from attncc.reference import Scope, value

SPECS = {
    # attention, score or weight -> parts
    "alibi(slope: float[H])": ("qk + alibi(slope)", [("-slope[h]", "head")]),
    "temperature(tau: float[])": ("qk / tau", [("tau[]", "head")]),
    "nothing(bias: float[H])": ("qk * 2.0", []),
    "row(r: float[B, M])": ("qk + r[b, q_row]", [("r[b, q_row]", "row")]),
    "column(c: float[B, N])": ("qk * sigmoid(c[b, kv_idx])", [("sigmoid(c[b, kv_idx])", "column")]),
    "forgetting(G: float[B, H, N])": (
        "qk + G[b, h, q_idx] - G[b, h, kv_idx]",
        [("G[b, h, q_idx]", "row"), ("G[b, h, kv_idx]", "column")],
    ),
    "relative(bias: float[H, M + N])": (
        "qk + bias[h, q_idx - kv_idx + N]",
        [("bias[h, q_idx - kv_idx + N]", "diagonal")],
    ),
    "rows_and_keys(bias: float[H, M + N])": (
        "qk + bias[h, q_row - kv_idx + N]",
        [("bias[h, q_row - kv_idx + N]", "diagonal")],
    ),
    "buckets(bias: float[H, 8], tau: float[H])": (
        "qk * tau[h] + tau[h] * bias[h, min(abs(q_idx - kv_idx) // 2, 7)]",
        [("tau[h]", "head"), ("tau[h] * bias[h, min(abs(q_idx - kv_idx) // 2, 7)]", "diagonal")],
    ),
    "slopes_of_distance(tau: float[H])": ("qk + tau[h] * sin(q_idx - kv_idx)", [("tau[h]", "head")]),
    "pair(bias: float[H, M, N])": ("qk + tanh(bias[h, q_row, kv_idx])", [("bias[h, q_row, kv_idx]", "pair")]),
    "gathered(bias: float[4, 4])": ("qk + bias[q_idx % 4, kv_idx % 4]", [("bias[q_idx % 4, kv_idx % 4]", "pair")]),
    "nested(t: float[H])": (
        "qk * exp(t[h]) + t[h] * (q_idx - kv_idx)",
        [("exp(t[h])", "head"), ("t[h]", "head")],
    ),
    "one_of_two(t: float[H], u: float[H])": ("qk * t[h] + u[h]", [("t[h]", "head")]),
    "condition(t: float[H])": ("qk if t[h] > 0 else 2 * qk", []),
}


@pytest.mark.parametrize("head", SPECS)
def test_parts_of_scores(head: str) -> None:
    clause, expected = SPECS[head]
    attention = attncc.check(f"attention {head}:\n    score = {clause}\n")
    wanted = {tensor.name for tensor in attention.tensors} - {"u"}
    assert [(to_text(part), along) for part, along in learned_parts(attention.score, wanted)] == expected


def test_the_whole_bucket_of_t5_is_one_part_along_the_diagonal() -> None:
    attention = attncc.check(Path(__file__).parent.parent / "examples" / "t5_bias.attn")
    ((part, along),) = learned_parts(attention.score, {"bias"})
    assert along == "diagonal"
    assert isinstance(part, Load)
    assert part.tensor == "bias"


def test_parts_of_rows_are_the_greatest_without_an_element() -> None:
    text = "attention a(g: float[H, D], s: float[3], t: float[H]):\n"
    text += "    q = rmsnorm(q * exp(t[h])) * (1 + g[h, :]) * sum(s)\n"
    found = learned_elements(attncc.check(text).q, {"g", "s", "t"})
    assert [to_text(part) for part in found] == ["exp(t[h])", "1.0 + g[h, d]", "sum(d < 3: s[d])"]


# --- what random expressions vary along ------------------------------------------------------------------------------

SIZES = {"B": 2, "H": 2, "HKV": 1, "M": 5, "N": 7, "D": 4, "E": 3, "q_offset": 3}
GRID = {
    "q_row": torch.arange(5)[:, None],
    "q_idx": torch.arange(5)[:, None] + 3,
    "kv_idx": torch.arange(7)[None, :],
    "b": torch.tensor(1),
    "h": torch.tensor(1),
    "hkv": torch.tensor(0),
}
LEAVES = (*PLAIN_INTS, DISTANCE, op("sub", Q_ROW, KV_IDX), op("abs", op("sub", KV_IDX, Q_IDX)))


def grid(expr: Expr) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = {"window": torch.tensor(3), "shift": torch.tensor(-2), "flag": torch.tensor(True)}
    for node in walk(expr):
        if isinstance(node, Load):
            shape = [40] * len(node.indices)
            drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
            inputs[node.tensor] = drawn if node.kind is Kind.FLOAT else (drawn * 3).to(torch.int64)
        elif isinstance(node, Parameter):
            inputs.setdefault(node.name, torch.tensor(1.7, dtype=torch.float64))
    return value(expr, Scope(GRID, SIZES, inputs, [], {}, {})).broadcast_to(5, 7)


@st.composite
def floats(draw: st.DrawFn, depth: int = 2) -> Expr:
    """Float expressions of coordinates and of loads at random indices."""
    index = int_exprs(LEAVES, 2)
    match draw(st.sampled_from(("number", "load", "load", "sum", "choice") if depth else ("number", "load"))):
        case "number":
            return op("to_float", draw(index))
        case "load":
            place = op("min", op("abs", draw(index)), Constant(39))
            return (
                Load("relative", (H, place), Kind.FLOAT) if draw(st.booleans()) else Load("one", (place,), Kind.FLOAT)
            )
        case "sum":
            return op(draw(st.sampled_from(("add", "mul", "min"))), draw(floats(depth - 1)), draw(floats(depth - 1)))
        case _:
            return op("where", draw(bool_exprs(LEAVES, (), 1)), draw(floats(depth - 1)), draw(floats(depth - 1)))


@settings(deadline=None, max_examples=by_tier(400))
@given(floats())
def test_what_is_claimed_to_be_shared_is(expr: Expr) -> None:
    values, along = grid(expr), along_of(expr)
    match along:
        case "head":
            assert (values == values[0, 0]).all()
        case "row":
            assert (values == values[:, :1]).all()
        case "column":
            assert (values == values[:1]).all()
        case "diagonal":
            assert torch.equal(values[1:, 1:], values[:-1, :-1])
        case "pair":
            assert isinstance(expr, Load)
        case _:
            assert along is None and not isinstance(expr, Load)


@pytest.mark.parametrize(
    ("expr", "along"),
    [
        (op("to_float", op("mod", DISTANCE, Constant(3))), "diagonal"),
        (op("where", op("ge", Q_IDX, KV_IDX), number(1), number(2)), "diagonal"),
        (op("where", op("lt", Q_ROW, KV_IDX), number(1), number(2)), "diagonal"),
        (
            Load("bias", (op("sub", op("mul", Constant(2), KV_IDX), op("mul", Constant(2), Q_IDX)),), Kind.FLOAT),
            "diagonal",
        ),
        (op("to_float", op("sub", op("floordiv", Q_IDX, Constant(2)), op("floordiv", KV_IDX, Constant(2)))), None),
        (op("to_float", op("add", Q_IDX, KV_IDX)), None),
        (op("to_float", op("sub", Q_IDX, Q_ROW)), "row"),
        (op("to_float", Size("N")), "head"),
        (op("to_float", B), "head"),
        (op("mul", Hole("qk"), number(2)), None),
    ],
)
def test_what_expressions_vary_along(expr: Expr, along: str | None) -> None:
    assert along_of(expr) == along


# --- parts carry the whole gradient ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=by_tier(150))
@given(scores(3))
def test_parts_carry_all_of_the_gradient(score: Expr) -> None:
    """The derivative by each part, times the part's by the tensors, adds up to that of the score."""
    score = op("add", op("mul", score, op("exp", Load("slope", (H,), Kind.FLOAT))), op("sin", score))
    generator = torch.Generator().manual_seed(5)
    inputs: dict[str, torch.Tensor] = {"window": torch.tensor(3), "shift": torch.tensor(-2), "flag": torch.tensor(True)}
    inputs["cap"] = torch.tensor(1.7, dtype=torch.float64)
    for node in walk(score):
        if isinstance(node, Load):
            drawn = torch.randn([20] * len(node.indices), dtype=torch.float64, generator=generator)
            inputs[node.tensor] = drawn.requires_grad_() if node.kind is Kind.FLOAT else (drawn * 3).to(torch.int64)
    learned = sorted(name for name, tensor in inputs.items() if tensor.requires_grad)
    leaves = [inputs[name] for name in learned]
    qk = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    scope = Scope(GRID, SIZES, inputs, [], {"qk": qk}, {})
    upstream = torch.randn(5, 7, dtype=torch.float64, generator=generator)

    expected = torch.autograd.grad(value(score, scope).broadcast_to(5, 7), leaves, upstream)
    parts = [part for part, _ in learned_parts(score, set(learned))]
    found = [torch.zeros_like(leaf) for leaf in leaves]
    for part, partial in zip(parts, tangents_of(score, parts), strict=True):
        entries = (value(partial.expr(), scope) * upstream).detach().broadcast_to(5, 7)
        values = value(part, scope).broadcast_to(5, 7)
        through = torch.autograd.grad(values, leaves, entries, materialize_grads=True)
        found = [total + more for total, more in zip(found, through, strict=True)]
    for total, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-10)
