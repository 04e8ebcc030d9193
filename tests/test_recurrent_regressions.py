"""Calls of recurrences that once went wrong."""

from __future__ import annotations

from typing import Any

import torch

import attncc


def compare(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tolerance: float = 1e-4, **inputs: Any):
    """Output and state of the kernel that makes its operands and of the one that PyTorch makes them for, against the
    statements in float64."""
    expected = attn.reference(q, k, v, return_state=True, **inputs)
    with torch.no_grad():
        made_by_kernel = attn(q, k, v, return_state=True, **inputs)
    made_by_pytorch = attn(q.clone().requires_grad_(), k, v, return_state=True, **inputs)
    for found in (made_by_kernel, made_by_pytorch):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def rows(tokens: int, heads: tuple[int, int, int] = (2, 2, 2), width: int = 4) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, h, tokens, width) for h in heads)


def test_an_int_given_at_run_time_meets_an_int_of_the_text() -> None:
    attn = attncc.build("""
attention example(flag: bool, n: int, c: float, m: bool[B, N], w: int[H], g: float[B, HKV, N]):
    recurrence:
        S *= exp(g[b, hkv, t])
        S += outer(k, where(m[b, t], v, c)) * where(flag, 1, n)
        out = q @ S + where(flag, n, w[h] // 2) * v
""")
    q, k, v = rows(20, (4, 2, 1))
    inputs = {"m": torch.rand(2, 20) > 0.5, "w": torch.arange(4), "g": -torch.rand(2, 2, 20), "c": 0.3, "n": 3}
    for flag in (False, True):
        compare(attn, q, k, v, flag=flag, **inputs)
