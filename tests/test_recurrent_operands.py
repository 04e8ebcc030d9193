"""Operands and a core make the recurrence: every example in float64, with its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recurrent_core import core
from recurrent_formulas import FORMULAS

from attncc.build import check
from attncc.ir.recurrence import Recurrence
from attncc.ir.types import DType
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.passes.updates import update_form
from attncc.plan.nodes import Target
from attncc.plan.recurrent import plan_core
from attncc.recurrent_reference import evaluate
from attncc.runtime.recurrent_operands import prepare

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
B, N, D, E = 2, 6, 5, 3


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_operands_and_core_are_the_recurrence(name: str, heads: tuple[int, int, int]) -> None:
    recurrence = check(EXAMPLES / f"{name}.attn")
    assert isinstance(recurrence, Recurrence)
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm)
    updates = update_form(form)
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, h, N, w, dtype=torch.float64) for h, w in zip(heads, (D, D, E), strict=True))
    inputs = FORMULAS[name].draw(B, max(heads), N, D, E)
    state = torch.randn(B, max(heads), D, E, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, state, *inputs.values())]

    prepared = prepare(recurrence, updates, q, k, v, inputs, q_offset=0)
    plan = plan_core(updates, "recurrent", Target("cpp", "avx2"), DType.F64, D, E)
    output, last = core(plan, prepared.operands, state)
    found = prepared.finished(output), last
    expected = evaluate(recurrence, q, k, v, inputs, state)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)

    upstream = [torch.randn_like(x) for x in found]
    gradients = [
        torch.autograd.grad(results, leaves, upstream, allow_unused=True, materialize_grads=True)
        for results in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_rows_and_captured_tensors_are_not_copied() -> None:
    recurrence = check(EXAMPLES / "gla.attn")
    assert isinstance(recurrence, Recurrence)
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm)
    q, k, v, g = (torch.randn(1, 2, N, D) for _ in range(4))
    operands = prepare(recurrence, update_form(form), q, k, v, {"g": g}, q_offset=0).operands
    assert operands.keys[0].data_ptr() == k.data_ptr()
    assert operands.log_decay is not None
    assert operands.log_decay.data_ptr() == g.data_ptr()


def test_a_rule_that_erases_what_it_writes_along_is_one_update() -> None:
    updates = {}
    for path in EXAMPLES.glob("*.attn"):
        recurrence = check(path)
        assert isinstance(recurrence, Recurrence)
        form = normal_form(recurrence)
        assert isinstance(form, NormalForm)
        updates[path.stem] = [(u.value is not None, u.erase is not None) for u in update_form(form).updates]
    assert updates["gla"] == [(True, False)]
    assert updates["gated_deltanet"] == [(True, True)]
    assert updates["gated_delta_product"] == [(True, True)] * 2
    assert updates["rwkv7"] == [(False, True), (True, False)]
