"""Mistakes that were made once, each with the smallest case that showed it."""

from __future__ import annotations

import torch

import attncc


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_tensor_in_score_and_mask_still_masks_values_that_are_not_finite() -> None:
    """Where values were not finite, the mask was asked again without what it shares with the score."""
    attn = attncc.build(
        "attention both(bias: f32[M, N]):\n"
        "    score = qk + bias[q_row, kv_idx]\n"
        "    mask  = bias[q_row, kv_idx] > 0\n",
        target="cpp",
    )
    q, k, v = normal(1, 1, 40, 16), normal(1, 1, 70, 16), normal(1, 1, 70, 16)
    bias = normal(40, 70)
    bias[:, 5], bias[:, 33] = -1, -2
    v[:, :, 5], v[:, :, 33] = torch.nan, torch.inf
    torch.testing.assert_close(attn(q, k, v, bias=bias).double(), attn.reference(q, k, v, bias=bias), rtol=0, atol=1e-5)
