"""Calls with NaN, infinities and numbers near the ends of their type."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from call_support import BF16, F16, F32, INTERPRETED, SLOW, TARGETS, assert_right, built, captured, operands

import attncc
from attncc import CompiledAttention
from attncc.eager import eager
from attncc.error_rule import compare
from attncc.ir.operators import OPERATORS
from attncc.ir.types import Kind

# A key past the middle, seen by the later queries of the causal masks and by one document of the other.
_AT = 21
POISONS = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
MASKED_SPECS = pytest.mark.parametrize("spec", ["causal", "window", "documents", "sigmoid", "summed", "sink", "rows"])


@pytest.mark.representative(15)
@pytest.mark.parametrize(
    ("target", "dtype"),
    [("cpp", F32), ("cpp", BF16), ("cpp:portable", F32), pytest.param("cpp:avx2", F16, marks=SLOW)],
    ids=str,
)
@MASKED_SPECS
@POISONS
def test_numbers_that_are_none(target: str, dtype: torch.dtype, spec: str, poison: float) -> None:
    """A masked one changes nothing; a kept one shows where the mathematics has it, and nowhere else."""
    for number in range(3):
        x = operands(M=40, N=40, dtype=dtype)
        inputs = captured(spec, *x[:2])
        x[number][:, :, _AT, 3] = poison
        o = assert_right(built(spec, target), *x, **inputs)
        # Queries that do not see the key: those before it, or of other documents.
        unseen = o[:, :, :_AT] if number == 0 or spec != "documents" else o[:, :, 28:]
        assert unseen.isfinite().all()


@pytest.mark.representative(10)
@MASKED_SPECS
@POISONS
def test_numbers_that_are_none_interpreted(spec: str, poison: float) -> None:
    for number in range(3):
        x = operands(M=40, N=40)
        inputs = captured(spec, *x[:2])
        x[number][:, :, _AT, 3] = poison
        assert_right(built(spec, INTERPRETED), *x, **inputs)


@TARGETS
@POISONS
def test_captured_numbers_that_are_none(target: str, poison: float) -> None:
    q, k, v = operands(M=40, N=40)
    inputs = captured("biased", q, k)
    inputs["bias"][0, 3, 5] = poison  # kept: of one document
    inputs["bias"][0, 3, 30] = poison  # masked: of another
    inputs["bias"][1, 9, 30] = poison  # masked, and the row keeps nothing like it
    o = assert_right(built("biased", target), q, k, v, **inputs)
    assert o[:, 1].isfinite().all()


@TARGETS
def test_a_row_whose_kept_scores_are_all_minus_infinity_is_zero(target: str) -> None:
    q, k, v = operands(M=40, N=40)
    inputs = captured("biased", q, k)
    inputs["bias"][0, 3] = -math.inf
    o, lse = built("biased", target)(q, k, v, return_lse=True, **inputs)
    assert not o[0, 0, 3].any()
    assert lse[0, 0, 3] == -math.inf
    assert lse.flatten().isfinite().sum() == lse.numel() - 1


@TARGETS
@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_large_scores(target: str, size: float) -> None:
    """As far from float64 as the plain formula in f32 is, or nearer."""
    q, k, v = operands(M=40, N=40)
    inputs = captured("biased", q, k)
    inputs["bias"] = torch.where(inputs["bias"] > 0, size, -size)
    attn = built("biased", target)
    plain = eager(attn.attention, q, k, v, {"rate": 1.0, "flag": True, **inputs})
    message = compare("o", attn(q, k, v, **inputs), attn.reference(q, k, v, **inputs), plain)
    assert message is None, message


@TARGETS
@pytest.mark.parametrize("low", [-1e30, torch.finfo(F32).min, -math.inf], ids=str)
def test_masks_by_adding_a_low_number(target: str, low: float) -> None:
    q, k, v = operands(M=40, N=40)
    bias = torch.zeros(2, 40, 40).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), low)
    found = built("biased", target)(q, k, v, bias=bias, docs=torch.zeros(1, 40, dtype=torch.int32))
    torch.testing.assert_close(found, built("causal", target)(q, k, v), rtol=1e-5, atol=1e-6)


FUNCTIONS = [name for name, row in OPERATORS.items() if row.result((Kind.FLOAT,)) is Kind.FLOAT and name != "neg"]
NUMBERS = torch.tensor(
    [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1e-30, 1e30, -1e30, 3e38, -3e38, 88.9, -87.0, -104.0,
     127.9, -127.5, -150.0, 1.0, -1.0, -0.99999994, 0.5, -3.7, 2.5, 3.5]
)  # fmt: skip


@functools.cache
def every_function(target: str) -> CompiledAttention:
    """A head for each function: its value at each number, as the weight of the only key."""
    choice = " else ".join(f"{name}(x[q_row]) if h == {i}" for i, name in enumerate(FUNCTIONS[:-1]))
    return attncc.build(
        f"attention all(x: f32[M]):\n    score = {choice} else {FUNCTIONS[-1]}(x[q_row])\n    weight = score\n",
        target=target,
    )


@pytest.mark.parametrize("target", ["cpp", "cpp:portable", INTERPRETED])
def test_functions_at_numbers_out_of_the_ordinary(target: str) -> None:
    attn, H, M = every_function(target), len(FUNCTIONS), len(NUMBERS)
    q, k, v = torch.zeros(1, H, M, 1), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    found = attn(q, k, v, x=NUMBERS)
    expected = attn.reference(q, k, v, x=NUMBERS).float()
    for i, name in enumerate(FUNCTIONS):
        close = found[0, i, :, 0].isclose(expected[0, i, :, 0], rtol=1e-5, atol=1e-7, equal_nan=True)
        wrong = [(x.item(), f.item()) for x, f in zip(NUMBERS[~close], found[0, i, ~close, 0], strict=True)]
        assert not wrong, name


@TARGETS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0], ids=str)
def test_scalars_that_are_no_numbers(target: str, value: float) -> None:
    q, k, v = operands(M=40, N=40)
    assert_right(built("biased", target), q, k, v, rate=value, **captured("biased", q, k))
