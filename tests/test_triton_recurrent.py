"""Recurrent cores on Triton, interpreted, against the token loop in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_core import core
from tiers import by_tier
from triton_recurrent_support import CASES, calls, check_forward, compiled, draw, draw_state, plan_of

from attncc.ir.types import DType

BOTH_WAYS = [(True, "pre"), (False, "post")]
# One plan of each kind of code for each side.
QUICK = [case for case in CASES if case[0] in ("write", "erase and write") and case[2:] in BOTH_WAYS]


def check_case(updates: str, side: str, before: bool, read: str, tokens: int, **drawn: float) -> None:
    plan = plan_of(updates, side, before=before, read=read, widths=(5, 18))
    check_forward(plan, draw(plan, tokens, heads=1, **drawn), draw_state(plan, 1, 1))


@pytest.mark.representative(8)
@pytest.mark.parametrize(("updates", "side", "before", "read"), QUICK, ids=str)
def test_a_chunk_and_a_tail(updates: str, side: str, before: bool, read: str) -> None:
    check_case(updates, side, before, read, 37)


@pytest.mark.slow
@pytest.mark.parametrize(("updates", "side", "before", "read"), CASES, ids=str)
@pytest.mark.parametrize("tokens", [9, 32, 75])
def test_every_form(updates: str, side: str, before: bool, read: str, tokens: int) -> None:
    check_case(updates, side, before, read, tokens)


@pytest.mark.parametrize("side", ["scalar", "key", "value"])
def test_tokens_that_forget(side: str) -> None:
    """A log decay of -inf leaves nothing, and exactly that; steep ones neither overflow nor give NaN."""
    updates = "write" if side == "value" else "delta"
    check_case(updates, side, False, "post", 37, decay=30.0, forget=0.1)


def test_a_token_that_forgets_all_starts_anew() -> None:
    plan = plan_of("delta", "scalar")
    operands = draw(plan, 37, heads=1)
    assert operands.log_decay is not None
    operands.log_decay[:, :, 20] = -torch.inf
    o, last = torch.empty(1, 1, 37, 16), torch.empty(1, 1, 16, 16)
    compiled(plan).forward(operands, 1e30 * torch.ones(1, 1, 16, 16), None, o, last)
    again, last_again = torch.empty_like(o), torch.empty_like(last)
    compiled(plan).forward(operands, torch.zeros(1, 1, 16, 16), None, again, last_again)
    assert torch.equal(o[:, :, 20:], again[:, :, 20:]) and torch.equal(last, last_again)


@pytest.mark.parametrize("updates", ["write", "delta"])
def test_packed_sequences(updates: str) -> None:
    plan = plan_of(updates, "scalar")
    offsets = [0, 3, 3, 40, 41, 53]
    check_forward(plan, draw(plan, 53), draw_state(plan, 5), offsets)


@pytest.mark.representative(8)
@pytest.mark.parametrize(("updates", "side", "before", "read"), QUICK, ids=str)
def test_a_few_tokens(updates: str, side: str, before: bool, read: str) -> None:
    plan = plan_of(updates, side, before=before, read=read, widths=(7, 20))
    check_forward(plan, draw(plan, 4), draw_state(plan, 3), [0, 1, 1, 4])


@pytest.mark.parametrize("tokens", [3, 40])
def test_the_state_in_place(tokens: int) -> None:
    plan = plan_of("delta", "key")
    operands, state = draw(plan, tokens), draw_state(plan, 1)
    _, expected = core(plan, operands, state)
    o = torch.empty(1, 2, tokens, 16)
    compiled(plan).forward(operands, state, None, o, state)
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-6)


def test_no_tokens() -> None:
    plan = plan_of("delta", "key")
    state = draw_state(plan, 1)
    o, last = torch.empty(1, 2, 0, 16), torch.empty_like(state)
    compiled(plan).forward(draw(plan, 0), state, None, o, last)
    assert torch.equal(last, state)


def test_operands_of_any_stride() -> None:
    """Tokens before heads, as projections leave them; one vector for all tokens; and NaN past the end of each."""
    plan = plan_of("delta", "none", widths=(16, 16))
    operands = draw(plan, 40)
    apart = torch.full((1, 45, 2, 16), torch.nan)
    apart[:, :40] = operands.query.transpose(1, 2)
    (key,), (value,) = operands.keys, operands.values
    assert value is not None
    query, value = apart[:, :40].transpose(1, 2), value.mT.contiguous().mT
    mixed = type(operands)(query, (key[:, :, :1].expand_as(key),), (value,), operands.erases, None)
    check_forward(plan, mixed, draw_state(plan, 1))


@pytest.mark.representative(3)
@pytest.mark.parametrize("updates", ["write", "delta"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F64])
def test_types(dtype: DType, updates: str) -> None:
    plan = plan_of(updates, "key", dtype=dtype, widths=(16, 16))
    check_forward(plan, draw(plan, 70, heads=1, decay=0.3), draw_state(plan, 1, 1))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_keys_that_are_alike(dtype: DType) -> None:
    """The hard case of the triangular system: strength 1, no decay, and keys that differ by a few percent."""
    plan = plan_of("delta", "none", dtype=dtype, widths=(32, 16))
    operands = draw(plan, 70, heads=1)
    one = torch.nn.functional.normalize(torch.ones(32) + 0.05 * torch.randn(70, 32), dim=-1).to(operands.query.dtype)
    keys = one.expand(1, 1, 70, 32)
    check_forward(plan, type(operands)(operands.query, (keys,), operands.values, (keys,), None))


@settings(max_examples=by_tier(8), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_drawn(data: st.DataObject) -> None:
    check_drawn(data)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_drawn_at_length(data: st.DataObject) -> None:
    check_drawn(data)


def check_drawn(data: st.DataObject) -> None:
    check_forward(*data.draw(calls(CASES)))
