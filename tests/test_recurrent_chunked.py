"""The algebra of the chunked backward pass, in float64, against automatic differentiation of the token loop."""

from __future__ import annotations

import itertools

import pytest
import recurrent_chunked
import torch
from recurrent_core import core
from torch import Tensor

from attncc.ir.types import DType
from attncc.plan.nodes import Target
from attncc.plan.recurrent import CorePlan, CoreUpdate
from attncc.runtime.recurrent_operands import Operands

WRITE, DELTA, ERASE = CoreUpdate(True, False), CoreUpdate(True, True), CoreUpdate(False, True)
UPDATES = {"write": (WRITE,), "delta": (DELTA,), "erase and write": (ERASE, WRITE), "two": (DELTA, DELTA)}
CASES = [
    (updates, side, before, read)
    for updates, side, before, read in itertools.product(
        UPDATES, ("none", "scalar", "key", "value"), (False, True), ("post", "pre")
    )
    if not (side == "value" and updates != "write") and not (before and updates == "write")
]


@pytest.mark.representative(90)
@pytest.mark.parametrize("decay", [0.3, 4.0, 20.0, float("inf")], ids=str)
@pytest.mark.parametrize(("updates", "side", "before", "read"), CASES, ids=str)
def test_gradients(updates: str, side: str, before: bool, read: str, decay: float) -> None:
    plan = CorePlan(
        "recurrent_backward", "", Target("cpp", "avx2"), DType.F64, 4, 3, side, UPDATES[updates], before, read
    )
    operands, state = draw(plan, 13, decay)
    offsets = [0, 5, 5, 13]
    o, last = core(plan, operands, state, offsets)
    d_o, d_last = torch.randn_like(o), torch.randn_like(last)
    leaves = [x for x in (*operands.tensors, state) if x is not None]
    expected = torch.autograd.grad((o, last), leaves, (d_o, d_last), allow_unused=True, materialize_grads=True)

    plain = Operands.of(tuple(x if x is None else x.detach() for x in operands.tensors))
    gradients, d_state = recurrent_chunked.backward(plan, plain, state.detach(), offsets, d_o, d_last)
    found = [x for x in (*gradients.tensors, d_state) if x is not None]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def draw(plan: CorePlan, tokens: int, decay: float) -> tuple[Operands, Tensor]:
    """Operands of one batch and two heads that require gradients, and a state for each of three sequences."""
    torch.manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.randn(1, 2, tokens, width, dtype=torch.float64) / width**0.5

    d, e = plan.key_width, plan.value_width
    log_decay = None
    if plan.side != "none":
        log_decay = -rows({"scalar": 1, "key": d, "value": e}[plan.side]).abs() * min(decay, 1e6)
        if decay == float("inf"):
            log_decay = torch.where(torch.rand_like(log_decay) < 0.2, -torch.inf, log_decay / 1e6)
        log_decay = log_decay[..., 0] if plan.side == "scalar" else log_decay
    operands = Operands(
        rows(d),
        tuple(rows(d) for _ in plan.updates),
        tuple(rows(e) if update.value else None for update in plan.updates),
        tuple(rows(d) if update.erase else None for update in plan.updates),
        log_decay,
    )
    state = torch.randn(3, 2, d, e, dtype=torch.float64).requires_grad_()
    return Operands.of(tuple(x if x is None else x.requires_grad_() for x in operands.tensors)), state
