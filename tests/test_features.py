"""`feature`: its rows, its weights, and what goes with it, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier
from torch import Tensor
from torch.nn.functional import elu, scaled_dot_product_attention

import attncc
from attncc import random_features
from attncc.explain_recurrence import explain_recurrence
from attncc.ir.errors import IRError
from attncc.ir.nodes import Size
from attncc.ir.recurrence import QUERY, STATE, VALUE, Bind, Output, Recurrence, Update, linear_statements
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.recurrent_reference import evaluate
from attncc.runtime.arguments import Sizes, size_function

B, H, N, D, E, R = 2, 3, 6, 4, 3, 5
torch.manual_seed(0)
Q, K = torch.randn(2, B, H, N, D, dtype=torch.float64)
V = torch.randn(B, H, N, E, dtype=torch.float64)
W = torch.randn(H, D, R, dtype=torch.float64)
U = torch.randn(R, D, dtype=torch.float64)
EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
HEADER = f"attention featured(R: const int = {R}, W: float[H, D, R], U: float[R, D]):\n"


def checked(*lines: str) -> Recurrence:
    recurrence = attncc.check(HEADER + "".join(f"    {line}\n" for line in lines))
    assert isinstance(recurrence, Recurrence)
    verify_recurrence(recurrence)
    return recurrence


def run(recurrence: Recurrence, q: Tensor = Q, k: Tensor = K, v: Tensor = V, **more: object) -> tuple[Tensor, Tensor]:
    return evaluate(recurrence, q, k, v, {"W": W, "U": U}, **more)  # type: ignore[arg-type]


def weighted(q: Tensor, k: Tensor, v: Tensor = V, *, causal: bool = True, normalized: bool = True) -> Tensor:
    """The output of features, by the whole matrix of weights."""
    weights = q @ k.mT
    weights = weights.tril() if causal else weights
    # 0 / 0 where a row has no weights.
    return (weights @ v / weights.sum(-1, keepdim=True)).nan_to_num(0) if normalized else weights @ v


def taylor(x: Tensor) -> Tensor:
    second = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)


def cosine(x: Tensor) -> Tensor:
    angle = (math.pi / 2 * torch.arange(x.shape[2], dtype=torch.float64) / x.shape[2])[:, None]
    return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)


MAPS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "elementwise": ("elu(x) + 1", lambda x: elu(x) + 1),
    "of a matrix": ("exp(x @ W[h])", lambda x: (x @ W).exp()),
    "of two matrices": ("sigmoid(x @ W[h] @ U)", lambda x: (x @ W @ U).sigmoid()),
    "matrices on both sides": ("exp(U @ relu(x @ W[h] @ U))", lambda x: ((x @ W @ U).relu() @ U.mT).exp()),
    "of reductions": (
        "exp(x - max(x)) * dot(x, x) / (sum(abs(x)) + norm(x))",
        lambda x: (
            (x - x.amax(-1, keepdim=True)).exp()
            * x.square().sum(-1, keepdim=True)
            / (x.abs().sum(-1, keepdim=True) + x.norm(dim=-1, keepdim=True))
        ),
    ),
    "reductions of a product": ("softmax(x @ W[h])", lambda x: (x @ W).softmax(-1)),
    "with positions": (
        "concat(relu(x) * cos(pi / 2 * q_idx / N), relu(x) * sin(pi / 2 * kv_idx / M))",
        cosine,
    ),
    "outer product": ("concat(1, x, outer(x, x) / sqrt(2))", taylor),
    "hedgehog": ("concat(softmax(x @ W[h]), softmax(-(x @ W[h])))", lambda x: _hedgehog(x @ W)),
    "a row with itself": ("exp(x) * (x @ x)", lambda x: x.exp() * x.square().sum(-1, keepdim=True)),
}


def _hedgehog(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_weights_are_products_of_features(name: str, causal: bool) -> None:
    text, phi = MAPS[name]
    mask = ["mask = causal"] if causal else []
    q, k = phi(Q), phi(K)
    for normalized in (True, False):
        recurrence = checked(f"feature = {text}", *mask, f"normalize = {'sum' if normalized else 'none'}")
        assert recurrence.bidirectional is not causal
        o, state = run(recurrence)
        assert torch.allclose(o, weighted(q, k, causal=causal, normalized=normalized), rtol=1e-9, atol=1e-9)
        columns = torch.cat([V, torch.ones(B, H, N, 1, dtype=V.dtype)], -1) if normalized else V
        assert torch.allclose(state, k.mT @ columns)


# Random maps: what is written, and what it makes of rows (B, H, N, width) at positions (N, 1).

Map: TypeAlias = tuple[str, Callable[[Tensor], Tensor], int]
POSITIONS = torch.arange(N, dtype=torch.float64)[:, None]
ROW: Map = ("x", lambda x: x, D)


@st.composite
def maps(draw: st.DrawFn, depth: int = 3) -> Map:
    if depth == 0:
        return ROW
    text, f, width = draw(maps(depth=depth - 1))
    other, g, other_width = draw(maps(depth=draw(st.integers(0, depth - 1))))
    unary: list[Map] = [
        (f"sigmoid({text})", lambda x: f(x).sigmoid(), width),
        (f"({text}) * cos(q_idx)", lambda x: f(x) * POSITIONS.cos(), width),
        (f"({text}) / (1 + norm({text}))", lambda x: f(x) / (1 + f(x).norm(dim=-1, keepdim=True)), width),
        (f"relu({text} - max({text}) / 2)", lambda x: (f(x) - f(x).amax(-1, keepdim=True) / 2).relu(), width),
        (f"concat({text}, {other})", lambda x: torch.cat([f(x), g(x)], -1), width + other_width),
    ]

    def product(x: Tensor) -> Tensor:
        return (f(x)[..., :, None] * g(x)[..., None, :]).flatten(-2)

    if width == D:
        unary += [(f"({text}) @ W[h]", lambda x: f(x) @ W, R), (f"U @ ({text})", lambda x: f(x) @ U.mT, R)]
    if width == R:
        unary += [(f"({text}) @ U", lambda x: f(x) @ U, D)]
    if width == other_width:
        unary += [(f"({text}) * (({other}) @ ({text}))", lambda x: f(x) * (g(x) * f(x)).sum(-1, keepdim=True), width)]
    if width * other_width <= 40:
        unary += [(f"outer({text}, {other})", product, width * other_width)]
    return draw(st.sampled_from(unary))


@given(maps(), st.booleans())
@settings(deadline=None, max_examples=by_tier(60))
def test_random_maps(made: Map, causal: bool) -> None:
    text, phi, width = made
    recurrence = checked(f"feature = {text}", *(["mask = causal"] if causal else []))
    assert size_function(recurrence.key_width)(Sizes(B, H, H, N, N, D, E)) == width
    o, _ = run(recurrence)
    assert torch.allclose(o, weighted(phi(Q), phi(K), causal=causal, normalized=False), rtol=1e-9, atol=1e-9), text


def test_features_of_q_and_k_may_differ_and_come_after_row_transforms() -> None:
    recurrence = checked(
        "q = l2norm(q)",
        "k = k * 2.0",
        "let u = k @ W[h]",
        "feature(q) = exp(q @ W[h])",
        "feature(k) = exp(-u)",
        "mask = q_idx >= kv_idx",
    )
    q = Q / (Q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    expected = weighted((q @ W).exp(), (-2 * K @ W).exp(), normalized=False)
    assert torch.allclose(run(recurrence)[0], expected)


def test_one_of_the_two_may_stay_as_it_is() -> None:
    recurrence = checked("feature(k) = relu(k)", "mask = not (kv_idx > q_idx)")
    assert torch.allclose(run(recurrence)[0], weighted(Q, K.relu(), normalized=False))


def test_a_let_that_reads_the_row_is_that_of_each_feature() -> None:
    recurrence = checked("let u = x @ W[h]", "let shifted = u - max(u)", "feature = exp(shifted)", "mask = causal")
    phi = [(x - x.amax(-1, keepdim=True)).exp() for x in (Q @ W, K @ W)]
    assert torch.allclose(run(recurrence)[0], weighted(*phi, normalized=False))


def test_nothing_is_scaled_but_by_the_scale_that_is_written() -> None:
    plain = checked("feature = elu(x) + 1", "mask = causal")
    scaled = checked("scale = 0.5 * q_idx", "feature = elu(x) + 1", "mask = causal")
    factor = 0.5 * torch.arange(N)[:, None]
    assert torch.allclose(run(scaled)[0], factor * run(plain)[0])


def test_a_row_whose_weights_sum_to_nothing_gives_nothing() -> None:
    recurrence = checked("feature = relu(x)", "mask = causal", "normalize = sum")
    k = K.clone()
    k[:, :, :3] = -1.0
    o, _ = run(recurrence, k=k)
    assert not o[:, :, :3].any()
    assert o.isfinite().all()


def test_all_queries_see_all_keys_and_their_numbers_differ() -> None:
    recurrence = checked("feature = elu(x) + 1", "normalize = sum")
    o, _ = run(recurrence, q=Q[:, :, :2])
    assert torch.allclose(o, weighted(elu(Q[:, :, :2]) + 1, elu(K) + 1, causal=False))
    empty, state = run(recurrence, k=K[:, :, :0], v=V[:, :, :0])
    assert not empty.any()
    assert not state.any()


@given(cut=st.integers(0, N), normalized=st.booleans())
@settings(deadline=None, max_examples=10)
def test_a_sequence_may_be_split_and_resumed(cut: int, normalized: bool) -> None:
    recurrence = checked(
        "feature = concat(elu(x) + 1, exp(x) * sin(q_idx)**2)",
        "mask = causal",
        f"normalize = {'sum' if normalized else 'none'}",
    )
    whole, last = run(recurrence)
    first, middle = run(recurrence, Q[:, :, :cut], K[:, :, :cut], V[:, :, :cut])
    rest, end = run(recurrence, Q[:, :, cut:], K[:, :, cut:], V[:, :, cut:], initial_state=middle, q_offset=cut)
    assert torch.allclose(torch.cat([first, rest], 2), whole)
    assert torch.allclose(end, last)


def test_a_recurrence_may_have_features() -> None:
    recurrence = checked(
        "feature = exp(x @ W[h])",
        "recurrence:",
        "    S *= 0.5",
        "    S += outer(k, v - k @ S)",
        "    out = q @ S * dot(k, k)",
    )
    q, k = (Q @ W).exp(), (K @ W).exp()
    state = torch.zeros(B, H, R, E, dtype=torch.float64)
    outputs = []
    for t in range(N):
        state = 0.5 * state
        key = k[:, :, t, :, None]
        state = state + key * (V[:, :, t, None, :] - (key * state).sum(-2, keepdim=True))
        outputs.append((q[:, :, t, :, None] * state).sum(-2) * k[:, :, t].square().sum(-1, keepdim=True))
    o, last = run(recurrence)
    assert torch.allclose(o, torch.stack(outputs, 2))
    assert torch.allclose(last, state)
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm)
    assert len(form.erases) == 1


def test_the_names_of_features_are_free_elsewhere() -> None:
    attncc.check("attention a(x: int, t: int):\n    score = qk + x + t\n")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"key_width": Size("N")}, "width of keys"),
        ({"bidirectional": True, "statements": (Update(QUERY), Output(VALUE))}, "different rows"),
        ({"bidirectional": True, "statements": (Update(STATE), Output(VALUE))}, "different rows"),
        ({"bidirectional": True, "statements": (Bind("z", STATE), *linear_statements(QUERY, Size("D")))}, "bound"),
    ],
)
def test_what_is_malformed_is_refused(change: dict[str, object], why: str) -> None:
    good = checked("feature = elu(x)")
    with pytest.raises(IRError, match=why):
        verify_recurrence(replace(good, **change))


def test_the_column_of_ones_has_no_elements_of_other_tensors() -> None:
    spec = "attention a(w: float[E]):\n    recurrence:\n        S += outer(k, v * w)\n        out = q @ S\n"
    recurrence = attncc.check(spec)
    assert isinstance(recurrence, Recurrence)
    with pytest.raises(IRError, match="sum of weights"):
        verify_recurrence(replace(recurrence, normalizer="sum"))
    summed = attncc.check(spec.replace("v * w", "v * sum(v)").replace("w: float[E]", ""))
    assert isinstance(summed, Recurrence)
    with pytest.raises(IRError, match="sum of weights"):
        verify_recurrence(replace(summed, normalizer="sum"))


def test_explain_says_what_features_make() -> None:
    text = explain_recurrence("", checked("feature = x @ W[h]", "normalize = sum"))
    for line in (f"keys    {R} channels", "order   all tokens; then every query", "divide  by the same of ones"):
        assert f"  {line}" in text
    assert "one product along a key, by which is written\n" in text
    assert "q   = sum(e < D: q[e] * W[h, e, d])" in text


@pytest.mark.parametrize("features", [3, 4, 10])
def test_random_features_are_orthogonal_within_blocks_and_as_long_as_normal_ones(features: int) -> None:
    W = random_features.orthogonal(D, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert W.shape == (D, features)
    for block in W.split(D, 1):
        products = block.mT @ block
        assert torch.allclose(products, products.diagonal().diag_embed(), atol=1e-12)
    many = random_features.orthogonal(D, 4000, generator=torch.Generator().manual_seed(0))
    assert abs(many.square().sum(0).mean() - D) < 0.1
    assert torch.allclose(many @ many.mT / 4000, torch.eye(D), atol=0.1)


def test_many_random_features_make_softmax_and_greatest_exponents_cancel() -> None:
    q, k = Q / 2, K / 2
    W = random_features.orthogonal(D, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    performer = attncc.check(EXAMPLES / "performer.attn", R=4096)
    assert isinstance(performer, Recurrence)
    exact = scaled_dot_product_attention(q, k, V, is_causal=True)
    shift = random_features.greatest_exponent(k, W)
    assert shift.shape == (B, H)
    o, _ = evaluate(performer, q, k, V, {"W": W, "shift": shift})
    assert (o - exact).abs().max() < 0.1
    assert torch.allclose(o, evaluate(performer, q, k, V, {"W": W, "shift": torch.zeros_like(shift)})[0])
    large = random_features.greatest_exponent(100 * k, W)
    o, _ = evaluate(performer, 100 * q, 100 * k, V, {"W": W, "shift": large})
    assert o.isfinite().all()
