"""Statistics of rows and columns of weights, on both targets, against formulas written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from call_support import BF16, F16, F32, F64, INTERPRETED, SPECS, built, captured, operands
from torch import Tensor

from attncc.ir.nodes import identity_row
from attncc.reference import evaluate

ALL = ("max", "entropy", "column_sums")
NAMES = [n for n in SPECS if n not in ("chosen", "rates", "required", "table") and "weight = s" not in SPECS[n]]
NAMES = [*[n for n in NAMES if n != "summed"], "sink"]


def by_hand(attn: Any, q: Tensor, k: Tensor, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """From the weights themselves: with values that tell keys apart, o is the matrix of weights. Scores are their
    logarithms plus lse."""
    n = k.shape[2]
    eye = torch.eye(n, dtype=F64).expand(*k.shape[:2], n, n)
    plain_values = replace(attn.attention, v=identity_row("v"))
    weights, lse = evaluate(plain_values, q.double(), k.double(), eye, inputs, **options)
    assert lse is not None
    score = weights.log() + lse[..., None]  # -inf where masked, and where the weight is too small to matter
    return {
        "max": score.nan_to_num(nan=-torch.inf, neginf=-torch.inf).amax(-1) if n else lse,
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "column_sums": weights.sum(2),
    }


def assert_right(
    name: str, target: str, dtype: torch.dtype, options: dict[str, Any] | None = None, **sizes: int
) -> None:
    attn, options = built(name, target), options or {}
    q, k, v = operands(**{"M": 37, "N": 53, "H": 4, "HKV": 2, "B": 2, **sizes}, dtype=dtype)
    inputs = captured(name, q, k)
    o, lse, found = attn(q, k, v, return_lse=True, stats=ALL, **inputs, **options)
    assert list(found) == list(ALL)
    plain_o, plain_lse = attn(q, k, v, return_lse=True, **inputs, **options)
    torch.testing.assert_close(o, plain_o, rtol=0, atol=0)
    torch.testing.assert_close(lse, plain_lse, rtol=0, atol=0)
    tensors = {n: torch.as_tensor(x) for n, x in inputs.items()}
    expected = by_hand(attn, q, k, tensors, **options)
    tolerance = {F64: 1e-11, F32: 2e-5, F16: 2e-3, BF16: 2e-2}[dtype]
    for n, x in found.items():
        assert x.dtype == (F64 if dtype == F64 else F32)
        torch.testing.assert_close(
            x.double(), expected[n], rtol=tolerance, atol=tolerance, msg=lambda m, n=n: f"{name} {n}: {m}"
        )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpp(name: str, dtype: torch.dtype) -> None:
    assert_right(name, "cpp", dtype)


@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
def test_cpp_in_other_types(dtype: torch.dtype) -> None:
    assert_right("sink", "cpp", dtype)
    assert_right("rows", "cpp", dtype)


@pytest.mark.parametrize("name", NAMES)
def test_triton(name: str) -> None:
    assert_right(name, INTERPRETED, F32)
