"""Gradients of recurrent cores on Triton, interpreted, against those of the token loop in float64 by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_recurrent_support import CASES, calls, check_backward, compiled, draw, draw_state, plan_of

from attncc.emit.recurrent_triton import layout_of
from attncc.ir.types import DType
from attncc.runtime.recurrent_core import run_core
from attncc.runtime.recurrent_operands import Operands

SLOW = pytest.mark.slow
# One plan of each kind of code for each side.
QUICK = [
    case for case in CASES if case[0] in ("write", "erase and write") and case[2:] in [(True, "pre"), (False, "post")]
]


def check_case(updates: str, side: str, before: bool, read: str, tokens: int, **drawn: float) -> None:
    plan = plan_of(updates, side, before=before, read=read, widths=(5, 18))
    check_backward(plan, draw(plan, tokens, heads=1, **drawn), draw_state(plan, 1, 1))


@pytest.mark.representative(4)
@pytest.mark.parametrize(("updates", "side", "before", "read"), QUICK, ids=str)
def test_a_chunk_and_a_tail(updates: str, side: str, before: bool, read: str) -> None:
    check_case(updates, side, before, read, 37)


@pytest.mark.slow
@pytest.mark.parametrize(("updates", "side", "before", "read"), CASES, ids=str)
@pytest.mark.parametrize("tokens", [2, 32, 75])
def test_every_form(updates: str, side: str, before: bool, read: str, tokens: int) -> None:
    check_case(updates, side, before, read, tokens)


@pytest.mark.representative(2)
@pytest.mark.parametrize("side", ["scalar", "key", "value"])
def test_tokens_that_forget(side: str) -> None:
    """Steep decays and such as leave nothing: gradients are finite, and those of what was forgotten exactly 0."""
    check_case("write" if side == "value" else "delta", side, False, "post", 37, decay=10.0, forget=0.1)


def test_nothing_comes_through_a_token_that_forgets_all() -> None:
    plan = plan_of("delta", "scalar")
    operands = draw(plan, 37, heads=1)
    assert operands.log_decay is not None
    operands.log_decay[:, :, 36] = -torch.inf
    d_o = torch.zeros(1, 1, 37, 16)
    found, d_state = compiled(plan).backward(operands, None, None, d_o, torch.ones(1, 1, 16, 16))
    assert not d_state.any() and not found.keys[0][:, :, :36].any()


def test_packed_sequences() -> None:
    plan = plan_of("delta", "scalar")
    check_backward(plan, draw(plan, 53), draw_state(plan, 5), [0, 3, 3, 40, 41, 53])


@pytest.mark.parametrize(
    "dtype", [DType.BF16, pytest.param(DType.F16, marks=SLOW), pytest.param(DType.F64, marks=SLOW)]
)
def test_types(dtype: DType) -> None:
    plan = plan_of("delta", "key", dtype=dtype, widths=(16, 16))
    check_backward(plan, draw(plan, 40, heads=1, decay=0.3), draw_state(plan, 1, 1))


def test_key_channels_that_programs_divide() -> None:
    """The last program has fewer channels than the others."""
    plan = plan_of("erase and write", "key", before=True, widths=(70, 20))
    assert layout_of(plan).gradient_keys == 32
    check_backward(plan, draw(plan, 20, heads=1), draw_state(plan, 1, 1))


def test_autograd() -> None:
    """What `run_core` gives PyTorch is what the kernels give."""
    plan = plan_of("erase and write", "scalar")
    operands, state = draw(plan, 20, heads=1), draw_state(plan, 1, 1)
    leaves = [None if x is None else x.clone().requires_grad_() for x in (*operands.tensors, state)]
    o, last = run_core(compiled(plan), Operands.of(tuple(leaves[:-1])), 16, leaves[-1], None)
    d_o, d_last = torch.randn_like(o), torch.randn_like(last)
    there = [x for x in leaves if x is not None]
    found = torch.autograd.grad((o, last), there, (d_o, d_last))
    gradients, d_state = compiled(plan).backward(operands, state, None, d_o, d_last)
    expected = [x for x in (*gradients.tensors, d_state) if x is not None]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_drawn(data: st.DataObject) -> None:
    check_backward(*data.draw(calls(CASES, most=40)))


@pytest.mark.parametrize("read", ["post", "pre"])
@pytest.mark.parametrize(
    ("updates", "side"),
    [("write", "scalar"), ("write", "key"), ("write", "value"), ("delta", "scalar"), ("erase and write", "key")],
)
def test_a_decay_that_changes_nothing_in_bf16(updates: str, side: str, read: str) -> None:
    """Of a state of zeros: its gradient is 0, whatever is added afterwards and rounded where it is stored."""
    plan = plan_of(updates, side, read=read, dtype=DType.BF16)
    check_backward(plan, draw(plan, 1, heads=1))


@pytest.mark.parametrize("side", ["scalar", "key", "value"])
def test_a_state_that_decays_alone_in_bf16(side: str) -> None:
    """Nothing else rounds: the gradient has the digits of the initial and the last state."""
    plan = plan_of("write", side, read="pre", dtype=DType.BF16)
    check_backward(plan, draw(plan, 1, heads=1), draw_state(plan, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [(DType.F32, DType.F64), (DType.BF16,)])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_drawn_at_length(dtypes: Sequence[DType], data: st.DataObject) -> None:
    check_backward(*data.draw(calls(CASES, dtypes=dtypes)))
