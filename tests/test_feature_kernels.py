"""Features and weights that separate on the kernels of recurrences: what a call gives, beside the reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from recurrent_formulas import FEATURE_FORMULAS
from tiers import tiered
from torch import Tensor

import attncc
from attncc.runtime.recurrent import RecurrentAttention

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
B, N, D, E = 2, 75, 8, 5
HEADS = [(2, 2, 2), (4, 2, 2), (1, 2, 4)]
VARIANT = pytest.mark.parametrize("name", FEATURE_FORMULAS)


def example(name: str) -> RecurrentAttention:
    attn = attncc.build(EXAMPLES / f"{name}.attn")
    assert isinstance(attn, RecurrentAttention)
    return attn


def operands(heads: tuple[int, int, int] = (2, 2, 2), tokens: int = N, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    widths = zip(heads, (D, D, E), strict=True)
    return tuple(torch.randn(B, h, tokens, width, dtype=torch.float64).to(dtype) for h, width in widths)


def inputs_of(
    name: str, heads: tuple[int, int, int] = (2, 2, 2), dtype: torch.dtype = torch.float64
) -> dict[str, object]:
    drawn = FEATURE_FORMULAS[name].draw(B, max(heads), N, D, E, heads[1])
    drawn |= {"length": N} if "length" in drawn else {}
    # Exponents of features that are as large as those of a model are.
    return {n: (0.3 * x).to(dtype) if isinstance(x, Tensor) else x for n, x in drawn.items()}


def state_of(name: str, heads: int = 2) -> Tensor:
    shape = FEATURE_FORMULAS[name].state_shape(B, heads, D, E)
    return torch.rand(shape, dtype=torch.float64) + 0.5


def gradients(o: Tensor, state: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    total = (o * torch.arange(o.numel(), dtype=o.dtype).reshape(o.shape).cos()).sum() + state.square().mean()
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.representative(3)
@VARIANT
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_call_and_its_gradients_are_those_of_the_reference(name: str, heads: tuple[int, int, int]) -> None:
    attn, inputs, state = example(name), inputs_of(name, heads), state_of(name, max(heads))
    rows = operands(heads)
    leaves = [x.requires_grad_() for x in (*rows, state, *inputs.values()) if isinstance(x, Tensor)]
    results = [f(*rows, initial_state=state, return_state=True, **inputs) for f in (attn, attn.reference)]
    for found, exact in zip(*results, strict=True):
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-9)
    for found, exact in zip(*(gradients(*result, leaves) for result in results), strict=True):
        assert torch.allclose(found, exact, rtol=1e-7, atol=1e-8)


@pytest.mark.representative(3)
@VARIANT
def test_sequences_are_split_resumed_and_packed(name: str) -> None:
    attn, inputs = example(name), inputs_of(name)
    q, k, v = operands()
    whole, last = attn(q, k, v, return_state=True, **inputs)
    parts, state = [], None
    for start, end in itertools.pairwise((0, 33, 34, N)):
        rows = (x[:, :, start:end] for x in (q, k, v))
        o, state = attn(*rows, initial_state=state, return_state=True, q_offset=start, **inputs)
        parts.append(o)
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=1e-9, atol=1e-9)
    assert torch.allclose(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize(("queries", "keys"), [(9, 70), (70, 9), (5, 0), (0, 5)])
def test_all_queries_read_all_keys(normalize: str, queries: int, keys: int) -> None:
    attn = attncc.build(
        f"attention whole(R: const int = 12, W: float[H, D, R]):\n"
        f"    feature = exp(x @ W[h] - norm(x))\n    normalize = {normalize}\n"
    )
    q, k, v = operands()
    W = torch.randn(2, D, 12, dtype=torch.float64) / 3
    leaves = [x.requires_grad_() for x in (q, k, v, W)]
    rows = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]
    results = [f(*rows, W=W, return_state=True) for f in (attn, attn.reference)]
    for found, exact in zip(*results, strict=True):
        assert found.shape == exact.shape
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-9)
    for found, exact in zip(*(gradients(*result, leaves) for result in results), strict=True):
        assert torch.allclose(found, exact, rtol=1e-7, atol=1e-8)


WEIGHTS = {
    "decay": "qk * gamma[h] ** (q_idx - kv_idx)",
    "gate": "qk * exp(G[b, h, q_idx] - G[b, h, kv_idx] + i[b, h, kv_idx])",
    "cumulative": "qk * exp(S_[q_idx] - S_[kv_idx]) * sigmoid(G[b, h, q_idx])",
}


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("weight", "normalize"),
    tiered(lambda weight, normalize: (normalize == "sum") != (weight == "gate"), WEIGHTS, ("sum", "none")),
)
def test_weights_that_separate_are_the_same_for_any_call(weight: str, normalize: str) -> None:
    attn = attncc.build(
        "attention pairs(gamma: float[H], G: float[B, H, N], i: float[B, H, N]):\n    let S_ = cumsum(i[b, h, :])\n"
        f"    mask = causal\n    weight = {WEIGHTS[weight]}\n    normalize = {normalize}\n"
    )
    q, k, v = operands((4, 2, 2))
    logs = -torch.rand(B, 4, N, dtype=torch.float64)
    given = {"gamma": torch.rand(4, dtype=torch.float64), "G": logs.cumsum(-1), "i": -torch.rand_like(logs)}
    # Positive products: no sum of weights lies near 0.
    leaves = [x.requires_grad_() for x in (q.abs_(), k.abs_(), v, *given.values())]
    for queries in (N, 3):
        results = [f(q[:, :, -queries:], k, v, **given) for f in (attn, attn.reference)]
        assert torch.allclose(*results, rtol=1e-8, atol=1e-9)
        found, exact = (
            torch.autograd.grad(o.cos().sum(), leaves, allow_unused=True, materialize_grads=True) for o in results
        )
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(found, exact, strict=True))
