"""Specifications, operands and the comparison with the reference that the tests of calls share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc import CompiledAttention

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INTERPRETED = "triton:interpret"
SLOW = pytest.mark.slow
TARGETS = pytest.mark.parametrize("target", ["cpp", INTERPRETED])

SPECS = {
    "plain": "attention plain():\n    mask = true\n",
    "causal": "attention masked():\n    mask = causal\n",
    "window": "attention local(window: int = 3):\n    mask = causal and q_idx - kv_idx < window\n",
    "biased": (
        "attention biased(bias: float[H, M, N], docs: int[B, N], rate: float = 1.0, flag: bool = true):\n"
        "    score = qk * rate + bias[h, q_row, kv_idx]\n"
        "    mask = docs[b, q_idx] == docs[b, kv_idx] or not flag\n"
    ),
    "documents": "attention documents(docs: int[B, N]):\n    mask = docs[b, q_idx] == docs[b, kv_idx]\n",
    "slopes": "attention slopes(slope: f32[H]):\n    score = qk - slope[h] * (q_idx - kv_idx)\n    mask = causal\n",
    "required": "attention required(window: int):\n    mask = q_idx - kv_idx < window\n",
    "capped": "attention capped(cap: float[]):\n    score = cap * tanh(qk / cap)\n",
    "scaled": "attention scaled(cap: float = 5.0):\n    score = cap * tanh(qk / cap)\n",
    "chosen": "attention chosen(key: int[]):\n    mask = kv_idx == key\n",
    "rates": "attention rates(rate: f32[M // N]):\n    score = qk * rate[0]\n",
    "table": "attention table(bias: f32[2 * N - 1]):\n    score = qk + bias[kv_idx]\n",
    "sigmoid": "attention gated():\n    weight = sigmoid(score)\n    mask = causal\n",
    "summed": "attention summed():\n    weight = relu(score) ** 2\n    normalize = sum\n    mask = causal\n",
    "sink": "attention sinky(sinks: f32[H]):\n    weight = softmax(score, sink=sinks[h])\n    mask = causal\n",
    "rows": "attention rowwise():\n    q = rope(q, q_idx)\n    k = l2norm(k)\n    v = v * 2.0\n    mask = causal\n",
}


@functools.cache
def built(name: str, target: str | None = None) -> CompiledAttention:
    return attncc.build(SPECS[name], target=target)


def operands(
    M: int = 5, N: int = 5, D: int = 16, E: int = 8, B: int = 1, H: int = 2, HKV: int = 2, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, M, D), k (B, HKV, N, D), v (B, HKV, N, E), the same every time."""
    generator = torch.Generator().manual_seed(M * 1000 + N)
    shapes = ((B, H, M, D), (B, HKV, N, D), (B, HKV, N, E))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def captured(name: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Inputs for the specification `name` beside these operands."""
    B, H, M, _ = q.shape
    N = k.shape[2]
    generator = torch.Generator().manual_seed(7)
    known = {
        "bias": torch.randn(H, M, N, generator=generator),
        "docs": (torch.arange(N) // 7).repeat(B, 1),
        "slope": 2.0 ** -torch.arange(1, H + 1),
        "sinks": torch.randn(H, generator=generator),
        "cap": 5.0,
    }
    return {p.name: known[p.name] for p in built(name).attention.tensors}


def assert_right(attn: CompiledAttention, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """Output, and lse where there is one: as the reference has them, NaN and infinities too. Returns the output."""
    has_lse = "sigmoid" not in attn.text
    found = attn(q, k, v, return_lse=has_lse, **arguments)
    oracle = attn.reference(q, k, v, return_lse=has_lse, **arguments)
    tolerance = 5e-2 if q.dtype in (BF16, F16) else 2e-5
    for x, exact in zip(*((found, oracle) if has_lse else ((found,), (oracle,))), strict=True):
        assert x.shape == exact.shape
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True)
    o = found[0] if has_lse else found
    assert o.dtype == q.dtype
    if has_lse:
        assert found[1].dtype == (F64 if q.dtype == F64 else F32)
    return o
