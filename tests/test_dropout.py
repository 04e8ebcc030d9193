"""Calls with dropout on both targets: what the reference gives with the same weights dropped, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from call_support import BF16, F16, F32, F64, INTERPRETED, SPECS, built, captured, operands
from torch import Tensor

from attncc.error_rule import compare
from attncc.eager import eager
from attncc.passes.dropout import dropout_scalars, with_dropout
from attncc.reference import evaluate

DROPPED: dict[str, Any] = {"dropout_p": 0.3, "seed": 5}


def assert_by_the_error_rule(
    name: str, target: str, dtype: torch.dtype, *, gradients: bool = True, **sizes: int
) -> None:
    """o and the gradients of q, k, v and every captured tensor of floats."""
    attn = built(name, target)
    q, k, v = operands(**{"M": 37, "N": 53, "H": 4, "HKV": 2, "B": 2, **sizes}, dtype=dtype)
    inputs = {n: torch.as_tensor(x) for n, x in captured(name, q, k).items()}
    of_floats = {n: x for n, x in inputs.items() if x.is_floating_point()}
    do = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(3)).to(dtype)
    attention, scalars = with_dropout(attn.attention), dropout_scalars(DROPPED["dropout_p"], DROPPED["seed"])

    def results(run: Any, wide: bool) -> dict[str, Tensor]:
        leaves = {n: x.detach().clone() for n, x in {"q": q, "k": k, "v": v, **of_floats}.items()}
        leaves = {n: (x.double() if wide else x).requires_grad_(gradients) for n, x in leaves.items()}
        others = {n: leaves.get(n, x) for n, x in inputs.items()}
        o = run(leaves["q"], leaves["k"], leaves["v"], others)
        if not gradients:
            return {"o": o}
        found = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        return {"o": o, **{f"d{n}": x for n, x in zip(leaves, found, strict=True)}}

    found = results(lambda q, k, v, others: attn(q, k, v, **DROPPED, **others), wide=False)
    oracle = results(lambda q, k, v, others: evaluate(attention, q, k, v, {**others, **scalars})[0], wide=True)
    plain = results(lambda q, k, v, others: eager(attention, q, k, v, {**others, **scalars}), wide=False)
    for n, x in found.items():
        assert (message := compare(n, x, oracle[n].detach(), plain[n].detach())) is None, message
    kept = attn.reference(q, k, v, **inputs)
    assert not torch.allclose(oracle["o"], kept, atol=1e-2), "nothing was dropped"


NAMES = [name for name in SPECS if name not in ("chosen", "rates", "required", "table", "window", "plain")]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpp(name: str, dtype: torch.dtype) -> None:
    assert_by_the_error_rule(name, "cpp", dtype)


@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
@pytest.mark.parametrize("name", ["causal", "sigmoid", "summed"])
def test_cpp_in_other_types(name: str, dtype: torch.dtype) -> None:
    assert_by_the_error_rule(name, "cpp", dtype)


@pytest.mark.parametrize("name", NAMES)
def test_triton_forward(name: str) -> None:
    assert_by_the_error_rule(name, INTERPRETED, F32, gradients=False)


@pytest.mark.parametrize("name", ["causal", "biased", "sigmoid", "summed", "sink", "rows", "slopes"])
def test_triton_backward(name: str) -> None:
    assert_by_the_error_rule(name, INTERPRETED, F32)
