"""The C++ kernel of transformed rows: what depends on the position alone is computed in f64, whatever it is made of."""

from __future__ import annotations

import pytest
import torch
from cpp_support import normal, run
from error_rule import check_kernel
from tiers import tiered

from attncc.build import check
from attncc.reference import evaluate


@pytest.mark.parametrize("q_offset", [2**24 + 1, 2**27 + 3, 2**29 + 5])
def test_rotations_at_positions_that_f32_cannot_hold(q_offset: int) -> None:
    spec = check("attention rotated():\n    q = rope(q, q_idx)\n    k = rope(k, kv_idx)\n")
    q, k, v = (normal(1, 1, 8, 16, seed=seed) for seed in (1, 2, 3))
    o, lse = run(spec, q, k, v, q_offset=q_offset)
    exact, exact_lse = evaluate(spec, q, k, v, {}, q_offset)
    assert lse is not None
    assert (o - exact).abs().max() < 2e-6
    assert (lse - exact_lse).abs().max() < 4e-6


@pytest.mark.representative(3)
@pytest.mark.parametrize(
    ("factor", "dtype"),
    tiered(
        lambda factor, dtype: dtype != torch.float64 or "pow" in factor,
        [
            "q_idx if q_idx < 2 else 0.5",
            "gain[q_idx] if q_idx < 2 else 0.5",
            "min(gain[q_idx], scalar, q_idx * 1.0)",
            "pow(abs(gain[q_idx]), scalar) + log1p(q_idx) * max(gain[0], q_idx / 3)",
            "where(gain[q_idx] > 0, gain[q_idx], softplus(q_idx - 3))",
        ],
        (torch.float32, torch.bfloat16, torch.float64),
    ),
    ids=str,
)
def test_positions_scalars_and_tensors_in_one_expression(factor: str, dtype: torch.dtype) -> None:
    spec = check(f"attention mixed(gain: float[N], scalar: float):\n    q = q * ({factor})\n")
    q, k, v = (normal(1, 2, 6, 8, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    inputs = {"gain": normal(6, dtype=dtype, seed=4), "scalar": 0.3}
    o, lse = run(spec, q, k, v, inputs)
    check_kernel(o, lse, spec, q, k, v, inputs)
