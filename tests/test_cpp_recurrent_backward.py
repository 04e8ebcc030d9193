"""Gradients of recurrent cores on the C++ target, against automatic differentiation of the token loop in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import recurrent_chunked
import torch
from cpp_support import NATIVE_ARCHS
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_core import core
from tiers import by_tier
from torch import Tensor
from triton_recurrent_support import UPDATES, draw, draw_state, plain

from attncc.error_rule import compare
from attncc.ir.types import DType
from attncc.plan.nodes import Target
from attncc.plan.recurrent import CorePlan
from attncc.runtime.cache import folder as cache_folder
from attncc.runtime.cpp_recurrent import compile_core
from attncc.runtime.cpp_recurrent_backward import CppGradients, compile_gradients
from attncc.runtime.recurrent_core import run_core
from attncc.runtime.recurrent_operands import Operands

SIDES = ("none", "scalar", "key", "value")
FORMS = [
    (updates, side, before, read)
    for updates, side, before, read in itertools.product(UPDATES, SIDES, (False, True), ("post", "pre"))
    if not (side == "value" and any(update.erase for update in UPDATES[updates]))
    and not (before and not any(update.erase for update in UPDATES[updates]))
]


def plan_of(
    updates: str,
    side: str,
    before: bool = False,
    read: str = "post",
    dtype: DType = DType.F32,
    widths: tuple[int, int] = (20, 9),
    arch: str = NATIVE_ARCHS[0],
) -> CorePlan:
    target = Target("cpp", arch)
    return CorePlan("recurrent", "recurrent", target, dtype, *widths, side, UPDATES[updates], before, read)


@cache
def compiled(plan: CorePlan) -> CppGradients:
    return compile_gradients(plan, (), cache_folder())


def check_gradients(
    plan: CorePlan,
    operands: Operands,
    state: Tensor | None = None,
    offsets: list[int] | None = None,
    *,
    with_last: bool = True,
) -> None:
    """The gradients are as close to the oracle's as the error rule asks."""
    batch, heads, tokens, _ = operands.query.shape
    sequences = batch if offsets is None else len(offsets) - 1
    zero = torch.zeros(sequences, heads, plan.key_width, plan.value_width, dtype=draw_state(plan, 1).dtype)
    initial = zero if state is None else state
    d_o = torch.randn(batch, heads, tokens, plan.value_width, generator=torch.Generator().manual_seed(2))
    d_o = d_o.to(operands.query.dtype)
    d_last = draw_state(plan, sequences, heads, seed=3) if with_last else zero

    found, d_state = compiled(plan).run(
        operands, state, None if offsets is None else torch.tensor(offsets), d_o, d_last if with_last else None
    )
    for gradient, x in zip(found.tensors, operands.tensors, strict=True):
        assert (gradient is None) == (x is None)
        assert x is None or (gradient.dtype is x.dtype and gradient.is_contiguous())
    wide = Operands.of(tuple(x if x is None else x.double() for x in operands.tensors))
    oracles = differentiated(core, plan, wide, initial.double(), offsets, d_o.double(), d_last.double())
    standards = [differentiated(plain, plan, operands, initial, offsets, d_o, d_last)]
    if plan.dtype is DType.F64:
        # The loop is the oracle itself; what another order of sums gives sets the standard.
        gradients, by_state = recurrent_chunked.backward(plan, wide, initial, offsets, d_o, d_last)
        standards.append([x for x in (*gradients.tensors, by_state) if x is not None])
    names = [f"d_operand_{i}" for i, x in enumerate(operands.tensors) if x is not None] + ["d_state"]
    tensors = [x for x in (*found.tensors, d_state) if x is not None]
    for name, x, oracle, *others in zip(names, tensors, oracles, *standards, strict=True):
        message = compare(name, x, oracle, *others) if oracle.numel() else None
        assert message is None, f"{plan}: {message}"


def differentiated(
    formula: object,
    plan: CorePlan,
    operands: Operands,
    state: Tensor,
    offsets: Sequence[int] | None,
    d_o: Tensor,
    d_last: Tensor,
) -> list[Tensor]:
    """The gradients of all operands that there are, and of the initial state."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (*operands.tensors, state)]
    results = formula(plan, Operands.of(tuple(leaves[:-1])), leaves[-1], offsets)
    inputs = [x for x in leaves if x is not None]
    depending = [(x, d_x) for x, d_x in zip(results, (d_o, d_last), strict=True) if x.requires_grad]
    outputs, gradients = zip(*depending, strict=True)
    return list(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True, materialize_grads=True))


@pytest.mark.slow
@pytest.mark.parametrize("arch", NATIVE_ARCHS[1:])
@pytest.mark.parametrize(("updates", "side", "before", "read"), FORMS[::3], ids=str)
def test_each_machine(updates: str, side: str, before: bool, read: str, arch: str) -> None:
    plan = plan_of(updates, side, before, read, arch=arch)
    check_gradients(plan, draw(plan, 150), draw_state(plan, 1))


@pytest.mark.representative(2)
@pytest.mark.parametrize(("updates", "side", "before", "read"), FORMS[::14], ids=str)
def test_some_forms(updates: str, side: str, before: bool, read: str) -> None:
    plan = plan_of(updates, side, before, read)
    check_gradients(plan, draw(plan, 150), draw_state(plan, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("updates", "side", "before", "read"), FORMS, ids=str)
def test_every_form(updates: str, side: str, before: bool, read: str) -> None:
    for dtype in (DType.F32, DType.F64):
        plan = plan_of(updates, side, before, read, dtype)
        check_gradients(plan, draw(plan, 150), draw_state(plan, 1))


@pytest.mark.representative(8)
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.1, 5.0, 20.0])
@pytest.mark.parametrize("forget", [0.0, 0.1], ids=["", "forgetting"])
@pytest.mark.parametrize(
    ("updates", "side", "before", "read"),
    [
        ("write", "scalar", False, "post"),
        ("write", "value", False, "post"),
        ("delta", "key", False, "post"),
        ("erase and write", "key", True, "pre"),
        pytest.param("write", "key", False, "pre", marks=pytest.mark.slow),
        pytest.param("delta", "scalar", False, "post", marks=pytest.mark.slow),
        pytest.param("erase and write", "key", True, "post", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decays(updates: str, side: str, before: bool, read: str, decay: float, forget: float) -> None:
    plan = plan_of(updates, side, before, read)
    check_gradients(plan, draw(plan, 150, decay=decay, forget=forget), draw_state(plan, 1))


@pytest.mark.representative(1)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64], ids=str)
@pytest.mark.parametrize(
    ("updates", "side"),
    [
        ("delta", "scalar"),
        pytest.param("three", "scalar", marks=pytest.mark.slow),
        pytest.param("write", "value", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_types(updates: str, side: str, dtype: DType) -> None:
    plan = plan_of(updates, side, dtype=dtype)
    check_gradients(plan, draw(plan, 150, batch=2), draw_state(plan, 2))


@pytest.mark.representative(1)
@pytest.mark.parametrize("widths", [(1, 1), (33, 70), pytest.param((128, 65), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    ("updates", "side"), [("delta", "key"), pytest.param("write", "value", marks=pytest.mark.slow)], ids=str
)
def test_widths(updates: str, side: str, widths: tuple[int, int]) -> None:
    plan = plan_of(updates, side, widths=widths)
    check_gradients(plan, draw(plan, 41), draw_state(plan, 1))


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("side", ["none", "key"])
def test_lengths(side: str, tokens: int) -> None:
    plan = plan_of("delta", side)
    check_gradients(plan, draw(plan, tokens), draw_state(plan, 1))


@pytest.mark.representative(1)
@pytest.mark.parametrize("updates", ["write", "delta"])
def test_more_chunks_than_a_thread_keeps(updates: str) -> None:
    """Every token is a chunk of its own: states are found anew, run by run."""
    plan = plan_of(updates, "scalar", widths=(16, 16))
    operands = draw(plan, 300)
    check_gradients(plan, Operands.of((*operands.tensors[:-1], torch.full((1, 2, 300), -30.0))), draw_state(plan, 1))


@pytest.mark.parametrize("side", ["key", "value"])
def test_packed_sequences(side: str) -> None:
    plan = plan_of("write", side)
    check_gradients(plan, draw(plan, 90), draw_state(plan, 5), [0, 3, 3, 40, 89, 90])


def test_no_initial_state_and_no_gradient_of_the_last() -> None:
    for side in SIDES:
        plan = plan_of("write", side)
        check_gradients(plan, draw(plan, 40), with_last=False)


def test_rows_at_any_distance() -> None:
    """Heads within tokens, one key for all batches, every other channel."""
    plan = plan_of("delta", "key")
    drawn = draw(plan, 40, batch=2, heads=3)
    assert drawn.log_decay is not None
    spread = torch.randn(2, 3, 40, 2 * plan.key_width)[..., ::2]
    within = drawn.values[0].transpose(1, 2).contiguous().transpose(1, 2)
    decay = drawn.log_decay[..., :1].expand(drawn.log_decay.shape)
    operands = Operands(spread, (drawn.keys[0][:1].expand(2, -1, -1, -1),), (within,), drawn.erases, decay)
    check_gradients(plan, operands, draw_state(plan, 2, 3))


@pytest.mark.representative(1)
@pytest.mark.parametrize(("updates", "side"), [("write", "value"), ("delta", "key")])
def test_threads_change_nothing(updates: str, side: str) -> None:
    before = torch.get_num_threads()
    plan = plan_of(updates, side, widths=(32, 32))
    operands, state = draw(plan, 100, heads=5), draw_state(plan, 1, 5)
    d_o = torch.randn(1, 5, 100, 32)
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            gradients, d_state = compiled(plan).run(operands, state, None, d_o, state)
            results.append([x for x in (*gradients.tensors, d_state) if x is not None])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.representative(3)
@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize(
    ("updates", "side", "before", "read"),
    [
        ("write", "value", False, "pre"),
        ("delta", "scalar", False, "post"),
        pytest.param("write", "none", False, "post", marks=pytest.mark.slow),
        pytest.param("erase and write", "key", True, "pre", marks=pytest.mark.slow),
        pytest.param("three", "scalar", False, "post", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_threads_share_a_head(updates: str, side: str, before: bool, read: str, threads: int) -> None:
    """Each has some columns of the values, and what it adds to the gradients of queries and keys is added up after."""
    plan = plan_of(updates, side, before, read, widths=(100, 70) if side == "value" else (20, 100))
    earlier = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_gradients(plan, draw(plan, 150, heads=1), draw_state(plan, 1, 1))
        check_gradients(plan, draw(plan, 150, heads=1), draw_state(plan, 2, 1), [0, 50, 150])
        whole = replace(plan, dtype=DType.BF16)
        check_gradients(whole, draw(whole, 150, heads=1), with_last=False)
    finally:
        torch.set_num_threads(earlier)


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("updates", "side", "before", "read"),
    [("write", "value", False, "post"), ("delta", "key", False, "post"), ("erase and write", "scalar", True, "pre")],
    ids=str,
)
def test_forward_and_backward_agree(updates: str, side: str, before: bool, read: str) -> None:
    plan = plan_of(updates, side, before, read, DType.F64, (3, 2))
    whole = compile_core(plan, (), cache_folder())
    operands = draw(plan, 9, heads=1)
    leaves = [x for x in (*operands.tensors, draw_state(plan, 2, 1)) if x is not None]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *given, state = tensors
        rows = iter(given)
        full = Operands.of(tuple(None if x is None else next(rows) for x in operands.tensors))
        return run_core(whole, full, plan.value_width, state, torch.tensor([0, 4, 9]))

    assert torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in leaves], fast_mode=True)


forms = st.sampled_from(FORMS)
types = st.sampled_from([DType.BF16, DType.F16, DType.F32, DType.F64])
calls = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 50), min_size=1, max_size=3),
        "heads": st.integers(1, 3),
        "decay": st.sampled_from([0.0, 0.01, 0.3, 3.0, 20.0]),
        "forget": st.sampled_from([0.0, 0.05]),
        "seed": st.integers(0, 1000),
    }
)


def check_drawn(plan: CorePlan, lengths: list[int], heads: int, **drawn: float) -> None:
    offsets = list(itertools.accumulate(lengths, initial=0))
    operands = draw(plan, offsets[-1], heads=heads, **drawn)
    check_gradients(plan, operands, draw_state(plan, len(lengths), heads), offsets)


@settings(max_examples=by_tier(20), deadline=None)
@given(call=calls)
def test_drawn_calls(call: dict[str, float]) -> None:
    check_drawn(plan_of("erase and write", "key", True, "pre"), **call)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(form=forms, dtype=types, widths=st.sampled_from([(4, 20), (16, 16), (40, 17)]), call=calls)
def test_drawn_forms(
    form: tuple[str, str, bool, str], dtype: DType, widths: tuple[int, int], call: dict[str, float]
) -> None:
    check_drawn(plan_of(*form, dtype, widths), **call)
