"""What the strategies promise: well-formed attentions, calls that fit, reads within bounds, tame numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from strategies import Call, cases, masks
from tiers import by_tier

from attncc.ir.nodes import Attention, Expr, Load
from attncc.ir.rewrite import contains
from attncc.ir.verify import verify
from attncc.reference import evaluate


@settings(deadline=None, max_examples=by_tier(150))
@given(cases())
def test_drawn_cases_evaluate(case: tuple[Attention, Call]) -> None:
    attention, call = case
    verify(attention)
    o, lse = evaluate(attention, call.q, call.k, call.v, call.inputs, call.q_offset)
    assert o.isfinite().all()
    assert lse is None or not lse.isnan().any()
    assert o.numel() == 0 or o.abs().max() < 1e6


@settings(deadline=None, max_examples=100)
@given(masks(tensors=False))
def test_plain_masks_read_no_tensor(mask: Expr) -> None:
    assert not contains(mask, lambda node: isinstance(node, Load))


def test_typical_masks_keep_something() -> None:
    """Most of what is drawn attends to something: else the tests that draw it would show little."""
    kept: list[bool] = []

    @settings(deadline=None, max_examples=by_tier(200), database=None, derandomize=True)
    @given(cases(longest=20, widest=4))
    def collect(case: tuple[Attention, Call]) -> None:
        attention, call = case
        o, _ = evaluate(attention, call.q, call.k, call.v, call.inputs, call.q_offset)
        if o.numel() and call.k.shape[2]:
            kept.append(bool(torch.any(o != 0)))

    collect()
    assert sum(kept) > 0.6 * len(kept)
