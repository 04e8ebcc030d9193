"""Pairwise specifications as recurrences: the same numbers in float64, or the term that prevents it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

import attncc
from attncc import recurrent_reference, reference
from attncc.ir.nodes import Apply, Attention, Constant, Elementwise, Expr
from attncc.ir.recurrence import Recurrence
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.ir.rewrite import kind_of, map_children
from attncc.ir.text import to_text
from attncc.ir.types import Kind
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.passes.reassociate import Refusal, recurrence_of

B, H, HKV, N, D, E = 2, 4, 2, 7, 3, 5
torch.manual_seed(0)
Q = torch.randn(B, H, N, D, dtype=torch.float64)
K = torch.randn(B, HKV, N, D, dtype=torch.float64)
V = torch.randn(B, HKV, N, E, dtype=torch.float64)
PARAMETERS = (
    "gamma: float[H], slope: float[H], G: float[B, H, N], F: float[B, HKV, N], i: float[B, H, N], gate: float[B, H, M]"
    ", rate: float = 0.25"
)
INPUTS = {
    "gamma": torch.rand(H, dtype=torch.float64),
    "slope": torch.rand(H, dtype=torch.float64),
    "G": -torch.rand(B, H, N, dtype=torch.float64).cumsum(-1),
    "F": torch.randn(B, HKV, N, dtype=torch.float64),
    "i": torch.randn(B, H, N, dtype=torch.float64),
    "gate": torch.randn(B, H, N, dtype=torch.float64),
}


def attention_of(weight: str, mask: str | None = "causal", *lines: str) -> Attention:
    clauses = [*lines, *([] if mask is None else [f"mask = {mask}"]), f"weight = {weight}"]
    attention = attncc.check(f"attention pairs({PARAMETERS}):\n" + "".join(f"    {line}\n" for line in clauses))
    assert isinstance(attention, Attention)
    return attention


def assert_same(attention: Attention) -> Recurrence:
    found = recurrence_of(attention)
    assert isinstance(found, Recurrence), (found, to_text(attention))
    verify_recurrence(found)
    expected, _ = reference.evaluate(attention, Q, K, V, INPUTS)
    o, _ = recurrent_reference.evaluate(found, Q, K, V, INPUTS)
    assert torch.allclose(o, expected, rtol=1e-9, atol=1e-10), to_text(found)
    return found


# Factors of which any product reassociates.
DECAYS = st.sampled_from(
    [
        "gamma[h] ** (q_idx - kv_idx)",
        "1.0 / (1.0 + slope[h]) ** (q_idx - kv_idx)",
        "exp(G[b, h, q_idx] - G[b, h, kv_idx])",
        "exp(slope[h] * (G[b, h, q_row] - G[b, h, kv_idx]))",
        "exp(-(F[b, hkv, kv_idx] - F[b, hkv, q_idx]))",
        "exp(-slope[h] * (q_idx - kv_idx) / 4)",
        "exp(-rate * abs(kv_idx - q_idx) - slope[h] * (q_idx - kv_idx))",
        "exp2(slope[h] * (kv_idx - q_idx))",
        "0.5 ** (q_idx - kv_idx - 1)",
        "gamma[h] ** ((G[b, h, kv_idx] - G[b, h, q_idx]) / 2)",
        "exp(G[b, h, q_idx]) / exp(G[b, h, kv_idx])",
        "exp(G[b, h, q_idx] + i[b, h, kv_idx] - G[b, h, kv_idx] - 0.5)",
        "exp(G[b, h, q_idx] - G[b, h, kv_idx] - slope[h] * q_idx)",
    ]
)
FACTORS = st.sampled_from(
    ["2.0", "rate", "-gate[b, h, q_row]", "sigmoid(i[b, h, kv_idx])", "exp(i[b, h, kv_idx])", "exp(gate[b, h, q_row])",
     "(1 + F[b, hkv, kv_idx])", "cos(q_idx)", "exp(-1.0)", "(2 if kv_idx > 3 else 1)"]
)  # fmt: skip
MASKS = ["causal", "q_idx - kv_idx >= 0", "not (kv_idx > q_idx)", "kv_idx < q_idx + 1", "kv_idx - N <= q_row - M"]


@given(st.lists(DECAYS, max_size=2), st.lists(FACTORS, max_size=2), st.sampled_from(MASKS), st.booleans(), st.data())
@settings(deadline=None, max_examples=by_tier(80))
def test_separable_weights_are_recurrences(
    decays: list[str], factors: list[str], mask: str, normalized: bool, data: st.DataObject
) -> None:
    parts = data.draw(st.permutations(["qk", *decays, *factors]))
    weight = " * ".join(parts)
    if factors and data.draw(st.booleans()):
        weight = weight.replace(f" * {factors[0]}", f" / {factors[0]}")
    lines = data.draw(
        st.sampled_from([[], ["scale = gamma[h] * q_idx"], ["q = rope(q, q_idx, dim=2)", "k = l2norm(k)"]])
    )
    normalize = ["normalize = sum"] if normalized else []
    found = assert_same(attention_of(weight, mask, *lines, *normalize))
    form = normal_form(found)
    assert isinstance(form, NormalForm)
    assert form.side == ("scalar" if decays else "none")


@given(st.lists(DECAYS, min_size=1, max_size=2), st.lists(FACTORS, max_size=1), st.data())
@settings(deadline=None, max_examples=by_tier(40))
def test_rewritings_of_a_weight_are_the_same_recurrence(
    decays: list[str], factors: list[str], data: st.DataObject
) -> None:
    attention = attention_of(" * ".join(["qk", *decays, *factors]))
    assert isinstance(attention.normalizer, Elementwise)
    weight = rewritten(attention.normalizer.weight, data.draw)
    found = assert_same(replace(attention, normalizer=Elementwise(weight)))
    assert normal_form(found).side == "scalar"


def rewritten(expr: Expr, draw: st.DrawFn) -> Expr:
    """The same value, written otherwise: commuted, reassociated, multiplied out, or with quotients for products."""
    expr = map_children(expr, lambda child: rewritten(child, draw))
    if kind_of(expr) is not Kind.FLOAT or not isinstance(expr, Apply) or not draw(st.booleans()):
        return expr
    one = Constant(1.0)
    match expr:
        case Apply(op="mul", args=(a, Apply(op="mul", args=(b, c)))):
            return Apply("mul", (Apply("mul", (b, a)), c))
        case Apply(op="mul", args=(a, Apply(op="exp" | "pow") as b)) if draw(st.booleans()):
            return Apply("div", (a, Apply("div", (one, b))))
        case Apply(op="mul", args=(a, b)):
            return Apply("mul", (b, a))
        case Apply(op="sub", args=(a, b)):
            return Apply("add", (Apply("neg", (b,)), a))
        case Apply(op="add", args=(a, b)):
            return Apply("sub", (b, Apply("neg", (a,))))
        case Apply(op="exp", args=(Apply(op="add", args=(a, b)),)):
            return Apply("mul", (Apply("exp", (a,)), Apply("exp", (b,))))
        case Apply(op="to_float", args=(Apply(op="sub", args=(a, b)),)):
            return Apply("sub", (Apply("to_float", (a,)), Apply("to_float", (b,))))
        case _:
            return expr


@pytest.mark.parametrize(
    ("lines", "weight"),
    [
        (["score = qk * exp(G[b, h, q_idx] - G[b, h, kv_idx])"], "score"),
        (["score = 2.0 * qk", "normalize = sum"], "score * gamma[h] ** (q_idx - kv_idx)"),
        (["let distance = q_idx - kv_idx", "score = qk"], "score * gamma[h] ** distance"),
    ],
)
def test_scores_are_part_of_weights(lines: list[str], weight: str) -> None:
    assert_same(attention_of(weight, "causal", *lines))


@pytest.mark.parametrize("mask", [None, "true", "q_idx - q_idx <= 0"])
@pytest.mark.parametrize("lines", [[], ["normalize = sum"]])
def test_without_a_mask_every_query_reads_all_keys(mask: str | None, lines: list[str]) -> None:
    weight = "qk * exp(i[b, h, kv_idx]) * gate[b, h, q_row]"
    assert assert_same(attention_of(weight, mask, *lines)).bidirectional


@pytest.mark.parametrize(
    "weight", ["qk * exp(S_[q_idx] - S_[kv_idx])", "exp2(2 * S_[q_row]) * qk / exp2(2 * S_[kv_idx])"]
)
def test_differences_of_a_running_sum_are_what_is_summed(weight: str) -> None:
    lines = ["let S_ = cumsum(G[b, h, :])", "normalize = sum"]
    found = assert_same(attention_of(weight, "causal", *lines))
    assert all(p.summed is None for p in found.tensors)
    decay = to_text(found.statements[0].value)
    assert "G[b, h, t]" in decay
    assert "t - 1" not in decay


def test_a_running_sum_by_itself_is_refused() -> None:
    found = recurrence_of(attention_of("qk * exp(S_[q_idx])", "causal", "let S_ = cumsum(G[b, h, :])"))
    assert isinstance(found, Refusal)
    assert "running sum" in found.why


def test_no_exponential_of_a_cumulative_gate_alone_is_taken() -> None:
    attention = attention_of("qk * exp(G[b, h, q_idx] - G[b, h, kv_idx])")
    found = recurrence_of(attention)
    assert isinstance(found, Recurrence)
    inputs = {**INPUTS, "G": 1e6 * INPUTS["G"]}
    o, _ = recurrent_reference.evaluate(found, Q, K, V, inputs)
    assert torch.allclose(o, reference.evaluate(attention, Q, K, V, inputs)[0])
    inputs = {**INPUTS, "G": 1e6 - INPUTS["G"]}  # neither this nor its negative has an exponential
    o, _ = recurrent_reference.evaluate(found, Q, K, V, inputs)
    assert o.isfinite().all()
    assert torch.allclose(o, reference.evaluate(attention, Q, K, V, inputs)[0])


@pytest.mark.parametrize(
    ("weight", "mask", "why", "at"),
    [
        ("softmax(score)", "causal", "softmax", None),
        ("relu(qk)", "causal", "no multiple of qk", "relu(qk)"),
        ("qk ** 2", "causal", "no multiple of qk", None),
        ("1.0 / qk", "causal", "no multiple of qk", None),
        ("exp(i[b, h, kv_idx])", "causal", "no factor qk", "exp(i[b, h, kv_idx])"),
        ("qk", "window(3)", "mask", None),
        ("qk", "causal and kv_idx > 0", "mask", "causal and kv_idx > 0"),
        ("qk", "kv_idx < q_idx", "mask", "kv_idx < q_idx"),
        ("qk * gamma[h] ** (q_idx - kv_idx)", None, "without a causal mask", "gamma[h] ** (q_idx - kv_idx)"),
        ("qk * exp(-abs(G[b, h, q_idx] - G[b, h, kv_idx]))", "causal", "no difference", None),
        ("qk * exp(G[b, h, q_idx] - i[b, h, kv_idx])", "causal", "may leave all floats", None),
        ("qk * exp(-rate * (2 * q_idx - kv_idx))", "causal", "may leave all floats", None),
        ("qk * exp(-rate * (q_idx - kv_idx) ** 2)", "causal", "no difference", None),
        ("qk * sigmoid(G[b, h, q_idx] - G[b, h, kv_idx])", "causal", "no product", None),
        ("qk / (1 + q_idx - kv_idx)", "causal", "no product", None),
        ("qk * G[b, h, q_idx - kv_idx]", "causal", "no product", "G[b, h, q_idx - kv_idx]"),
        ("qk * (-0.5) ** (q_idx - kv_idx)", "causal", "sign", None),
        ("qk * 0.0 ** (q_idx - kv_idx)", "causal", "nothing is kept", None),
        ("qk * (gamma[h] + q_idx) ** (q_idx - kv_idx)", "causal", "no product", None),
    ],
)
def test_what_prevents_a_recurrence_is_named(weight: str, mask: str | None, why: str, at: str | None) -> None:
    found = recurrence_of(attention_of(weight, mask))
    assert isinstance(found, Refusal), to_text(found)
    assert why in found.why
    if at is not None:
        assert found.span is not None
        assert found.span.text == at


def test_explain_shows_the_recurrence_or_what_prevents_it() -> None:
    spec = "attention a(gamma: float[H]):\n    mask = causal\n    weight = qk * gamma[h] ** (q_idx - kv_idx)\n"
    text = attncc.build(spec).explain()
    assert "this recurrence too" in text
    assert "S   = S[b, h, d, e] * gamma[h]" in text
    text = attncc.build(spec.replace("weight = qk", "weight = relu(qk)")).explain()
    assert "not a recurrence: the weight is no multiple of qk, at <spec>:3:14: relu(qk)" in text
