"""Mistakes that were made once, each with the smallest case that showed it."""

from __future__ import annotations

import pytest
import torch

import attncc


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_tensor_in_score_and_mask_still_masks_values_that_are_not_finite() -> None:
    """Where values were not finite, the mask was asked again without what it shares with the score."""
    attn = attncc.build(
        "attention both(bias: f32[M, N]):\n    score = qk + bias[q_row, kv_idx]\n    mask  = bias[q_row, kv_idx] > 0\n",
        target="cpp",
    )
    q, k, v = normal(1, 1, 40, 16), normal(1, 1, 70, 16), normal(1, 1, 70, 16)
    bias = normal(40, 70)
    bias[:, 5], bias[:, 33] = -1, -2
    v[:, :, 5], v[:, :, 33] = torch.nan, torch.inf
    torch.testing.assert_close(attn(q, k, v, bias=bias).double(), attn.reference(q, k, v, bias=bias), rtol=0, atol=1e-5)


@pytest.mark.representative(5)
@pytest.mark.parametrize("target", ["cpp", "cpp:portable", "triton:interpret"])
@pytest.mark.parametrize("low", ["-1e10", "-1e30", "-3e38"])
def test_scores_of_any_size_leave_weights_finite(low: str, target: str) -> None:
    """A fused s * scale - m_i is off by what was rounded off m_i, which for additive masks exceeded every exponent."""
    spec = f"attention a():\n    score = where(causal and q_idx - kv_idx < 20, qk, {low})\n"
    q, k, v = torch.randn(3, 1, 1, 300, 16, generator=torch.Generator().manual_seed(0)).unbind()
    o, lse = attncc.build(spec, target=target)(q, k, v, return_lse=True)
    expected, expected_lse = attncc.build(spec).reference(q, k, v, return_lse=True)
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
