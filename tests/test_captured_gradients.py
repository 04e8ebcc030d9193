"""Gradients of captured tensors where they hold what no pair uses: 0 times a derivative that may be infinite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attncc

F64 = torch.float64
H, M, N, D = 2, 9, 11, 4

# What is read of t, where no kept pair uses its first entries.
SPECS = {
    "column": ("t: float[N]", "score = qk + log(t[kv_idx])\n    mask = kv_idx >= 2"),
    "row": ("t: float[M]", "score = qk + sqrt(t[q_row])\n    mask = q_row >= 2"),
    "head": ("t: float[H]", "scale = sqrt(t[h])\n    mask = h >= 1"),
    "distance": ("t: float[2 * N]", "score = qk + log(t[kv_idx - q_row + N])\n    mask = kv_idx - q_row >= 4 - N"),
    "choice": ("t: float[N]", "score = qk + (log(t[kv_idx]) if kv_idx >= 2 else 0.5)"),
    "sink": ("t: float[M]", "weight = softmax(score, sink=log(t[q_row]))\n    mask = q_row >= 2"),
    "rows": ("t: float[N]", "k = k / t[kv_idx]\n    v = v * log(t[kv_idx])\n    mask = kv_idx >= 2"),
    "rows of heads": ("t: float[H, D]", "q = q / sum(sqrt(t[h, :]))\n    mask = h >= 1"),
}
FIRST = {"head": 1, "rows of heads": 1}


def check(spec: str, **captured: Tensor) -> Tensor:
    """The gradient of t, which is that of the reference."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, n, D, generator=generator, dtype=F64) for n in (M, N, N))
    attn = attncc.build(spec)
    t = captured["t"].requires_grad_()
    (found,) = torch.autograd.grad(attn(q, k, v, **captured).square().sum(), t)
    (exact,) = torch.autograd.grad(attn.reference(q, k, v, **captured).square().sum(), t)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    return found


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", SPECS)
def test_what_no_pair_uses_has_gradient_zero_whatever_it_holds(name: str) -> None:
    parameter, clauses = SPECS[name]
    shape = {"t: float[N]": (N,), "t: float[M]": (M,), "t: float[H]": (H,), "t: float[H, D]": (H, D)}
    t = torch.rand(shape.get(parameter, (2 * N,)), generator=torch.Generator().manual_seed(1), dtype=F64) + 0.5
    first = FIRST.get(name, 2)
    for value in (0.0, torch.nan, torch.inf):
        # A sink of NaN leaves its row without a result.
        if name == "sink" and value != value:
            continue
        held = t.clone()
        held[:first] = value
        assert (check(f"attention a({parameter}):\n    {clauses}\n", t=held)[:first] == 0).all()


def test_an_infinite_sink_has_gradient_zero() -> None:
    t = torch.tensor([torch.inf, 1.0], dtype=F64)
    assert check("attention a(t: float[H]):\n    weight = softmax(score, sink=t[h])\n", t=t)[0] == 0


def test_no_heads_at_all() -> None:
    """With rows of keys that would be written once per query head."""
    q, k, v = (torch.zeros(1, 0, n, D, requires_grad=True) for n in (M, N, N))
    t = torch.zeros(0, D, requires_grad=True)
    attn = attncc.build("attention a(t: float[H, D]):\n    k = k * t[h, :]\n")
    found = torch.autograd.grad(attn(q, k, v, t=t).sum(), (q, k, v, t))
    assert [x.shape for x in found] == [x.shape for x in (q, k, v, t)]


def test_an_index_may_need_more_bits_than_the_tensor_that_it_is_computed_of() -> None:
    doc = torch.arange(N, dtype=torch.int32) * 30_011
    t = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=F64)
    check("attention a(t: float[50], doc: int[N]):\n    score = qk + t[doc[kv_idx] * 70000 % 50]\n", t=t, doc=doc)
