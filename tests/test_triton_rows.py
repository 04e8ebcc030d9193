"""The Triton kernel of transformed rows: what depends on the position alone is computed in f64, whatever it is made of.

Interpreted, and compiled ahead of time for every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cpp_support import normal
from error_rule import check_kernel
from torch import Tensor

import attncc
from attncc.diagnostics import BuildError
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.types import DType
from attncc.plan.build import plan_attention
from attncc.plan.nodes import RowsPlan, Specialization, Target
from attncc.plan.triton_tiles import MACHINES
from attncc.reference import evaluate
from attncc.runtime.triton_aot import Request, compile_all


def rotated(scaling: str, parameters: str = "", offset: str = "") -> str:
    q, k = (f"rope({row}, {index}{offset}, {scaling})" for row, index in (("q", "q_idx"), ("k", "kv_idx")))
    return f"attention rotated({parameters}):\n    q = {q}\n    k = {k}\n"


ROTATIONS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "plain": ("base=10000.0", "", {}),
    "base": ("base=base", "base: float", {"base": 654321.123}),
    "yarn": ("scaling=yarn(factor, original)", "factor: float, original: int", {"factor": 16.1, "original": 4096}),
    "longrope": (
        "scaling=longrope(factors, original, factor)",
        "factors: f32[D // 2], factor: float, original: int",
        {"factors": torch.linspace(1.0, 9.7, 16), "factor": 32.3, "original": 4096},
    ),
}


def run(
    text: str, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Any], q_offset: int | None = None
) -> tuple[Tensor, Tensor | None]:
    attention = attncc.build(text, target="triton:interpret")
    return attention(q, k, v, q_offset=q_offset, return_lse=True, **inputs)


@pytest.mark.representative(4)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_at_position_100_000(rotation: str, dtype: torch.dtype) -> None:
    scaling, parameters, inputs = ROTATIONS[rotation]
    text = rotated(scaling, parameters, offset=" + 100000")
    q, k, v = (4 * normal(1, 2, rows, 32, seed=seed, dtype=dtype) for rows, seed in ((9, 1), (13, 2), (13, 3)))
    o, lse = run(text, q, k, v, inputs)
    check_kernel(o, lse, attncc.check(text), q, k, v, inputs)


@pytest.mark.parametrize("q_offset", [2**24 + 1, 2**27 + 3, 2**29 + 5])
@pytest.mark.parametrize("rotation", ["plain", "base"])
def test_rotations_at_positions_that_f32_cannot_hold(rotation: str, q_offset: int) -> None:
    scaling, parameters, inputs = ROTATIONS[rotation]
    text = rotated(scaling, parameters)
    q, k, v = (normal(1, 1, 8, 16, seed=seed) for seed in (1, 2, 3))
    o, lse = run(text, q, k, v, inputs, q_offset)
    exact, exact_lse = evaluate(attncc.check(text), q, k, v, inputs, q_offset)
    assert lse is not None and exact_lse is not None
    assert (o - exact).abs().max() < 2e-6
    assert (lse - exact_lse).abs().max() < 4e-6


@pytest.mark.representative(10)
@pytest.mark.parametrize(
    "factor",
    [
        "q_idx if q_idx < 2 else 0.5",
        "gain[q_idx] if q_idx < 2 else 0.5",
        "min(gain[q_idx], scalar, q_idx * 1.0)",
        "pow(abs(gain[q_idx]), scalar) + log1p(q_idx) * max(gain[0], q_idx / 3)",
        "where(gain[q_idx] > 0, gain[q_idx], softplus(q_idx - 3))",
        "scalar * (sin(q_idx * scalar) + pow(scalar, q_idx) * cos(gain[q_idx]) + tanh(scalar))",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_positions_scalars_and_tensors_in_one_expression(factor: str, dtype: torch.dtype) -> None:
    text = f"attention mixed(gain: float[N], scalar: float):\n    q = q * ({factor})\n"
    q, k, v = (normal(1, 2, 6, 8, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    inputs = {"gain": normal(6, dtype=dtype, seed=4), "scalar": 0.3}
    o, lse = run(text, q, k, v, inputs)
    check_kernel(o, lse, attncc.check(text), q, k, v, inputs)


EVERY_FUNCTION = """attention mixed(gain: float[N], scalar: float):
    q = q * (exp(-scalar) + exp2(-q_idx) + log2(q_idx + 1) + rsqrt(q_idx + 1) + tanh(q_idx * scalar) * erf(scalar))
    k = k * (sqrt(gain[kv_idx]) + sin(gain[kv_idx]) + softplus(scalar) + round(kv_idx / 3) + gelu(scalar) + elu(scalar))
    v = v * max(silu(scalar * kv_idx), sigmoid(scalar), log1p(kv_idx)) ** (scalar / (kv_idx + 1))
"""


@pytest.mark.representative(3)
@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("rows", [*ROTATIONS, "every function"])
def test_f64_outside_rows_compiles_ahead_of_time(rows: str, arch: str, dtype: DType) -> None:
    attention = attncc.check(rotated(*ROTATIONS[rows][:2]) if rows in ROTATIONS else EVERY_FUNCTION)
    tensors = tuple((tensor.name, tensor.dtypes[0]) for tensor in attention.tensors)
    program = plan_attention(attention, Specialization(dtype, 32, 32, tensors), Target("triton", arch))
    plans = [plan for plan in program.kernels if isinstance(plan, RowsPlan)]
    requests = [Request(plan, render(plan, printer_of(plan)), arch) for plan in plans]
    assert len(requests) == (2 if rows in ROTATIONS else 3)
    for request, result in zip(requests, compile_all(requests), strict=True):
        assert not isinstance(result, BuildError), result
        spilled = sum(resources.spilled for resources in result.values())
        assert not spilled or request.plan.spec.name == "mixed", f"{request.plan.name}: {spilled}"
