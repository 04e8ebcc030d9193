"""`cumsum` in clauses of pairs: the running sum of a captured tensor, taken before any kernel runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attncc
from attncc.ir.errors import IRError
from attncc.ir.nodes import Attention, TensorParameter
from attncc.ir.text import to_text
from attncc.ir.verify import verify

EXAMPLE = Path(__file__).parent.parent / "examples" / "forgetting_transformer.attn"
B, H, N, D = 1, 2, 65, 16
torch.manual_seed(0)
Q, K, V = torch.randn(3, B, H, N, D).unbind()
LOGS = torch.nn.functional.logsigmoid(torch.randn(B, H, N) + 2)


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    sums = logs.cumsum(-1)
    bias = sums[..., :, None] - sums[..., None, :]
    seen = torch.ones(N, N, dtype=torch.bool).tril()[-q.shape[2] :]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[..., -q.shape[2] :, :].masked_fill(~seen, -torch.inf)
    )


def test_the_sum_reaches_up_to_its_element_and_with_it() -> None:
    attn = attncc.build(
        "attention first(x: float[B, N]):\n    let s = cumsum(x[b, :])\n    score = s[kv_idx]\n    mask = causal\n"
    )
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    q = torch.zeros(1, 1, 3, 1, dtype=torch.float64)
    _, lse = attn.reference(q, q, q, x=x, return_lse=True)
    assert torch.allclose(lse.flatten(), torch.tensor([1.0, 3.0, 7.0]).double().logcumsumexp(0))
    _, found = attn(q, q, q, x=x, return_lse=True)
    assert torch.allclose(found, lse)


def test_any_axis_is_summed_along() -> None:
    attn = attncc.build(
        "attention tilted(x: float[N, H]):\n    score = qk + cumsum(x[:, h])[kv_idx]\n    mask = causal\n"
    )
    x = torch.randn(N, H)
    bias = attncc.build("attention biased(x: float[N, H]):\n    score = qk + x[kv_idx, h]\n    mask = causal\n")
    assert torch.allclose(attn(Q, K, V, x=x), bias(Q, K, V, x=x.cumsum(0)), atol=1e-5)


def test_sums_are_kept_in_f32_beside_tensors_of_16_bits() -> None:
    attn = attncc.build(EXAMPLE)
    logs = LOGS.bfloat16()
    assert torch.equal(attn(Q, K, V, log_forget=logs), attn(Q, K, V, log_forget=logs.float()))


def test_a_call_decodes_traces_and_differentiates() -> None:
    attn = attncc.build(EXAMPLE)
    leaves = [x.clone().requires_grad_() for x in (Q, K, V, LOGS)]
    o = attn(*leaves[:3], log_forget=leaves[3])
    expected = formula(*leaves)
    assert torch.allclose(o, expected, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (o, expected)]
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(*gradients, strict=True))
    assert torch.allclose(attn(Q[:, :, -3:], K, V, log_forget=LOGS), expected[:, :, -3:], atol=1e-5)
    graph = torch.export.export(_Module(attn), (Q, K, V, LOGS)).module()
    assert torch.allclose(graph(Q, K, V, LOGS), expected, atol=1e-5)


class _Module(torch.nn.Module):
    def __init__(self, attn: object) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
        return self.attn(q, k, v, log_forget=logs)  # type: ignore[operator]


def test_statistics_and_dropout_see_the_same_sums() -> None:
    attn = attncc.build(EXAMPLE)
    o, found = attn(Q, K, V, log_forget=LOGS, stats=["column_sums"])
    sums = LOGS.cumsum(-1)
    score = Q @ K.mT / D**0.5 + (sums[..., :, None] - sums[..., None, :])
    weights = score.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(found["column_sums"], weights.sum(2), atol=1e-4)
    dropped = attn(Q, K, V, log_forget=LOGS, dropout_p=0.5, seed=1)
    exact = attn.reference(Q, K, V, log_forget=LOGS, dropout_p=0.5, seed=1)
    assert torch.allclose(dropped.double(), exact, atol=1e-5)
    assert not torch.allclose(dropped, o)


def test_the_ir_says_what_is_summed() -> None:
    attention = attncc.check(EXAMPLE)
    assert isinstance(attention, Attention)
    verify(attention)
    assert "log_forget: f16|bf16|f32|f64[B, H, N] summed along 2" in to_text(attention)
    assert "log_forget[b, h, q_idx] - log_forget[b, h, kv_idx]" in to_text(attention)


@pytest.mark.parametrize("axis", [-1, 3])
def test_an_axis_that_is_not_there_is_refused(axis: int) -> None:
    attention = attncc.check(EXAMPLE)
    assert isinstance(attention, Attention)
    (parameter,) = attention.parameters
    assert isinstance(parameter, TensorParameter)
    with pytest.raises(IRError, match="sums"):
        verify(replace(attention, parameters=(replace(parameter, summed=axis),)))


@pytest.mark.parametrize("tokens", [N, 3])
def test_decays_by_a_running_sum_are_the_same_as_pairs_and_as_a_recurrence(tokens: int) -> None:
    attn = attncc.build(
        "attention decayed(x: float[B, H, N]):\n    let G = cumsum(x[b, h, :])\n    mask = causal\n"
        "    weight = qk * exp(G[q_idx] - G[kv_idx])\n"
    )
    leaves = [x.clone().requires_grad_() for x in (Q[:, :, -tokens:], K, V, LOGS)]
    results = [f(*leaves[:3], x=leaves[3]) for f in (attn, attn.reference)]
    assert torch.allclose(results[0].double(), results[1], atol=1e-5)
    gradients = [torch.autograd.grad(o.square().sum(), leaves) for o in results]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*gradients, strict=True))
