"""The error rule accepts what it should and refuses what it should."""

from __future__ import annotations

import pytest
import torch
from error_rule import assert_close, check_kernel, check_tensor, same_dtype_formula
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, attentions, calls, cases
from test_reference import CAUSAL, spec
from tiers import by_tier

from attncc.build import check
from attncc.eager import eager
from attncc.error_rule import ULPS
from attncc.ir.nodes import Attention
from attncc.reference import evaluate


@settings(deadline=None, max_examples=by_tier(100))
@given(cases(dtype=torch.float64, longest=40, widest=17))
def test_in_float64_the_plain_formula_is_the_reference(case: tuple[Attention, Call]) -> None:
    """Two evaluations of the same IR that share only the meaning of its operators: dense and masked against the
    kept pairs alone, all heads at once against one by one."""
    attention, call = case
    arguments = (attention, call.q, call.k, call.v, call.inputs, call.q_offset)
    o, lse = evaluate(*arguments)
    plain_o, plain_lse = same_dtype_formula(*arguments)
    torch.testing.assert_close(plain_o, o, rtol=1e-9, atol=1e-10)
    assert (lse is None) == (plain_lse is None)
    if lse is not None:
        torch.testing.assert_close(plain_lse, lse, rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=by_tier(100))
@given(cases(dtype=torch.float64, longest=30, widest=9))
def test_in_float64_the_eager_formula_is_the_reference(case: tuple[Attention, Call]) -> None:
    attention, call = case
    arguments = (call.q, call.k, call.v)
    wide = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in call.inputs.items()
    }
    o = eager(attention, *arguments, wide, call.q_offset)
    expected, _ = evaluate(attention, *arguments, call.inputs, call.q_offset)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=by_tier(60))
@given(st.data(), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_the_plain_formula_itself_passes(data: st.DataObject, dtype: torch.dtype) -> None:
    attention = data.draw(attentions())
    call = data.draw(calls(attention, dtype=dtype, longest=40, widest=17))
    arguments = (attention, call.q, call.k, call.v, call.inputs, call.q_offset)
    o, lse = same_dtype_formula(*arguments)
    assert o.dtype == dtype
    assert lse is None or lse.dtype == torch.float32
    check_kernel(o, lse, *arguments)


@pytest.mark.parametrize("dtype", ULPS)
def test_the_bound_is_tight_enough_to_notice(dtype: torch.dtype) -> None:
    """One row's mask off by one is an error in every dtype; so is an lse that is a little off."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 128, 32, generator=generator).to(dtype) for _ in range(3))
    reference, plain = evaluate(spec(mask=CAUSAL), q, k, v, {}), same_dtype_formula(spec(mask=CAUSAL), q, k, v, {})
    assert_close(plain[0], plain[1], reference, plain)
    out = plain[0].clone()
    out[0, 1, 6] = evaluate(spec(mask=CAUSAL), q, k, v, {}, 1)[0][0, 1, 6].to(dtype)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(out, plain[1], reference, plain)
    lse = reference[1].float() + (0.1 if dtype.itemsize == 2 else 1e-4)
    with pytest.raises(AssertionError, match="lse"):
        assert_close(plain[0], lse, reference, plain)


def test_a_plain_formula_that_is_exact_by_luck_sets_no_standard_for_rounded_rows() -> None:
    """One pair in bf16: the plain formula rounds q * gain and the product, and the second undoes what the first did.
    A kernel rounds the row too, as the language says, and nothing after it."""
    attention = check("attention gained(gain: float[H, D]):\n    q = q * gain[h]\n")
    q, k, v = (torch.full((1, 1, 1, 1), x, dtype=torch.bfloat16) for x in (1.5390625, -0.29296875, 1.0))
    inputs = {"gain": torch.tensor([[0.875]])}
    exact = 1.5390625 * 0.875 * -0.29296875
    kernel = torch.tensor(1.5390625 * 0.875).bfloat16().float() * -0.29296875
    plain = same_dtype_formula(attention, q, k, v, inputs)[1]
    assert plain is not None and abs(plain.item() - exact) < 4e-6
    assert abs(kernel.item() - exact) > 8e-4
    check_kernel(v, kernel.reshape(1, 1, 1), attention, q, k, v, inputs)
    with pytest.raises(AssertionError, match="lse"):
        check_kernel(v, torch.full((1, 1, 1), exact + 3 * (kernel.item() - exact)), attention, q, k, v, inputs)


def test_special_values_must_stand_where_the_reference_has_them() -> None:
    reference = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    plain = reference.float()
    check_tensor("out", plain, reference, plain)
    nan, inf = torch.nan, torch.inf
    for wrong in ([1.0, 2.0, inf], [nan, nan, inf], [1, nan, -inf], [1, nan, 9], [1.1, nan, inf]):
        with pytest.raises(AssertionError):
            check_tensor("out", torch.tensor(wrong), reference, plain)
    with pytest.raises(AssertionError, match="shape"):
        check_tensor("out", plain[:2], reference, plain)
