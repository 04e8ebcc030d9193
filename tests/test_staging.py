"""Cores that make their operands themselves: the same results as with operands that PyTorch made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc.build import check
from attncc.error_rule import compare
from attncc.ir.recurrence import Recurrence
from attncc.ir.types import DType
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.passes.updates import update_form
from attncc.plan.staging import NotStaged, plan_staging
from attncc.recurrent_eager import token_loop
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_kernels import RecurrentKernels

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Inputs of every sort: numbers for a token, a head or all, rows, ints and bools, run-time scalars, a constant index.
EVERYTHING = """
attention everything(
    rate: float = 0.5, steps: int = 3, sharp: bool = true,
    g: float[B, H, N, 2], gain: float[H, D], reset: bool[B, N], level: i32[B, N], bias: float[HKV, E], tau: float,
):
    q = l2norm(q) * gain[h]
    k = silu(k) / (1 + max(abs(k)))
    v = tanh(v) + bias[hkv]
    recurrence:
        S *= where(reset[b, t], 0.5, exp(-rate * sigmoid(g[b, h, t, 1])))
        S += outer(k, v * g[b, h, t, 0] * (level[b, t] % steps + 1))
        out = (q @ S) * (1 if sharp else 2) * tau + v
"""


def staging_of(spec: str):
    """Of an example by its name, or of a specification."""
    recurrence = check(EXAMPLES / f"{spec}.attn" if spec.isidentifier() else spec)
    assert isinstance(recurrence, Recurrence)
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm)
    dtypes = {p.name: DType.F32 for p in recurrence.tensors} | dict.fromkeys("qkv", DType.F32)
    return plan_staging(recurrence, update_form(form), dtypes, 64, 64)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.attn")))
def test_every_example_is_staged(name: str) -> None:
    staging = staging_of(name)
    names = [step.name for step in staging.steps]
    assert len(set(names)) == len(names)
    assert {"query", "key_0"} <= set(names)


NOT_STAGED = {
    "outputs are read after all tokens": "attention a():\n    feature = relu(x)\n    normalize = sum",
    "a matrix of each token": "attention a(W: float[N, D, D]):\n    feature = x @ W[t]\n    mask = causal",
    "ints or bools of channels": "attention a(on: bool[D]):\n    feature = where(on, x, 0)\n    mask = causal",
    "place that is computed": "attention a(g: float[N]):\n    feature = x * g[t // 2]\n    mask = causal",
}


@pytest.mark.parametrize("why", NOT_STAGED)
def test_what_is_not_staged_says_why(why: str) -> None:
    with pytest.raises(NotStaged, match=why):
        staging_of(NOT_STAGED[why])


def test_shared_values_are_computed_once() -> None:
    steps = staging_of("gated_deltanet").steps
    assert sum(step.over is not None for step in steps) == 2  # the norms of q and of k


def problem(
    dtype: torch.dtype, widths: tuple[int, int], heads: tuple[int, int, int]
) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    batch, tokens, H = 2, 37, max(heads)
    q, k, v = (torch.randn(batch, h, tokens, w).to(dtype) for h, w in zip(heads, (widths[0], *widths), strict=True))
    wide = F64 if dtype is F64 else F32
    inputs = {
        "g": torch.randn(batch, tokens, H, 2, dtype=wide).transpose(1, 2),  # strided
        "gain": torch.rand(H, widths[0], dtype=wide) + 0.5,
        "reset": torch.rand(batch, tokens) < 0.1,
        "level": torch.randint(0, 9, (batch, tokens), dtype=torch.int32),
        "bias": torch.randn(widths[1], heads[1], dtype=wide).T,
        "tau": torch.tensor(0.7, dtype=wide),
    }
    return [q, k, v], inputs


HEADS = [(4, 4, 4), (4, 2, 2), (1, 2, 4)]
QUICK = [(F32, (7, 5)), (BF16, (33, 70)), (F16, (16, 32)), (F64, (1, 1))]
EVERY = [(dtype, widths) for dtype in (F32, BF16, F16, F64) for widths in ((16, 32), (7, 5), (33, 70), (1, 1))]
CASES = [pytest.param(*case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in EVERY]


@pytest.mark.representative(4)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("dtype", "widths"), CASES)
def test_every_sort_of_input(dtype: torch.dtype, widths: tuple[int, int], heads: tuple[int, int, int]) -> None:
    attn = attncc.build(EVERYTHING)
    assert isinstance(attn, RecurrentAttention)
    assert isinstance(attn.kernels, RecurrentKernels)
    rows, inputs = problem(dtype, widths, heads)
    scalars = {"rate": 0.25, "steps": 4, "sharp": False}
    with torch.no_grad():
        o, state = attn(*rows, return_state=True, **inputs, **scalars)
    assert list(attn.kernels.staged), "it is staged"
    exact = attn.reference(*rows, return_state=True, **inputs, **scalars)
    plain = token_loop(attn.attention, attn.kernels.form, *rows, {**inputs, **scalars})
    for name, found, oracle, formula in zip(("o", "state"), (o, state), exact, plain, strict=True):
        message = compare(name, found, oracle, formula)
        assert message is None, message


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
def test_steps(tokens: int) -> None:
    attn = attncc.build(EVERYTHING)
    (q, k, v), inputs = problem(F64, (12, 20), (4, 2, 2))
    whole, last = attn(q, k, v, return_state=True, **inputs)
    state = torch.zeros_like(last)
    for start in range(0, 37, tokens):
        at = slice(start, start + tokens)
        part = {n: x[:, :, at] if n == "g" else x[:, at] if n in ("reset", "level") else x for n, x in inputs.items()}
        o = attn.step(q[:, :, at], k[:, :, at], v[:, :, at], state=state, **part)
        assert torch.allclose(o, whole[:, :, at], rtol=1e-9, atol=1e-9)
    assert torch.allclose(state, last, rtol=1e-9, atol=1e-9)
