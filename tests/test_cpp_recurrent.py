"""The C++ forward kernel of recurrent cores, against the token loop in float64 by the error rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from cpp_support import NATIVE_ARCHS
from guarded import Guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_core import core
from tiers import by_tier
from torch import Tensor
from torch.nn.functional import normalize
from triton_recurrent_support import CASES, UPDATES, draw, draw_state, plain

from attncc.error_rule import compare
from attncc.ir.types import DType
from attncc.plan.nodes import Target
from attncc.plan.recurrent import CorePlan
from attncc.runtime.cache import folder as cache_folder
from attncc.runtime.cpp_recurrent import CppCore, compile_core
from attncc.runtime.recurrent_operands import Operands

FORMS = [case for case in CASES if not (case[2] and not any(update.erase for update in UPDATES[case[0]]))]
TYPES = (DType.F32, DType.F64, DType.BF16, DType.F16)
SLOW = pytest.mark.slow
ARCHS = pytest.mark.parametrize(
    "arch", [NATIVE_ARCHS[0], *(pytest.param(arch, marks=SLOW) for arch in NATIVE_ARCHS[1:])]
)


def plan_of(
    updates: str,
    side: str,
    before: bool = False,
    read: str = "post",
    dtype: DType = DType.F32,
    widths: tuple[int, int] = (20, 40),
    arch: str = NATIVE_ARCHS[0],
) -> CorePlan:
    target = Target("cpp", arch)
    return CorePlan("recurrent", "recurrent", target, dtype, *widths, side, UPDATES[updates], before, read)  # type: ignore[arg-type]


@cache
def compiled(plan: CorePlan) -> CppCore:
    return compile_core(plan, (), cache_folder())


def run(
    plan: CorePlan, operands: Operands, state: Tensor | None = None, offsets: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """o and the last state; what the kernel does not write is NaN."""
    batch, heads, tokens, _ = operands.query.shape
    o = torch.full((batch, heads, tokens, plan.value_width), torch.nan, dtype=operands.query.dtype)
    sequences = batch if offsets is None else len(offsets) - 1
    last = torch.full_like(draw_state(plan, sequences, heads), torch.nan)
    compiled(plan).forward(operands, state, None if offsets is None else torch.tensor(offsets), o, last)
    return o, last


def check(
    plan: CorePlan, operands: Operands, state: Tensor | None = None, offsets: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """`run`, and what it gives is as close to the oracle as the error rule asks."""
    results = run(plan, operands, state, offsets)
    exact = core(plan, operands, state, offsets)
    standards = [plain(plan, operands, state, offsets)]
    if plan.dtype is DType.F64:
        # The loop is the oracle itself; the same sums in another order set the standard.
        order = torch.randperm(plan.key_width, generator=torch.Generator().manual_seed(0))
        standards.append(permuted(plan, operands, state, offsets, order))
    for name, found, oracle, *simple in zip(("o", "state"), results, exact, *standards, strict=True):
        message = compare(name, found, oracle, *simple) if oracle.numel() else None
        assert message is None, f"{plan}: {message}"
    return results


def permuted(
    plan: CorePlan, operands: Operands, state: Tensor | None, offsets: list[int] | None, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The token loop with its key channels in another order."""
    by_key = Operands(
        operands.query[..., order],
        tuple(key[..., order] for key in operands.keys),
        operands.values,
        tuple(None if x is None else x[..., order] for x in operands.erases),
        operands.log_decay[..., order] if plan.side == "key" and operands.log_decay is not None else operands.log_decay,
    )
    o, last = core(plan, by_key, None if state is None else state[:, :, order], offsets)
    return o, last[:, :, order.argsort()]


# --- forms, machines, types, sizes -----------------------------------------------------------------------------------


@pytest.mark.representative(2)
@pytest.mark.parametrize(("updates", "side", "before", "read"), FORMS[::8], ids=str)
def test_some_forms(updates: str, side: str, before: bool, read: str) -> None:
    plan = plan_of(updates, side, before, read)
    check(plan, draw(plan, 70), draw_state(plan, 1))


@SLOW
@pytest.mark.parametrize("arch", NATIVE_ARCHS)
@pytest.mark.parametrize(("updates", "side", "before", "read"), FORMS, ids=str)
def test_every_form(updates: str, side: str, before: bool, read: str, arch: str) -> None:
    for dtype in (DType.F32, DType.F64, DType.BF16):
        plan = plan_of(updates, side, before, read, dtype, arch=arch)
        check(plan, draw(plan, 70), draw_state(plan, 1))


@pytest.mark.representative(1)
@ARCHS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("updates", "side"), [("delta", "scalar"), pytest.param("write", "key", marks=SLOW)], ids=str)
def test_types(updates: str, side: str, dtype: DType, arch: str) -> None:
    plan = plan_of(updates, side, dtype=dtype, arch=arch)
    check(plan, draw(plan, 70, batch=2), draw_state(plan, 2))


@pytest.mark.representative(2)
@ARCHS
@pytest.mark.parametrize("widths", [(1, 1), (7, 3), (33, 70), (64, 64), (128, 65), (256, 20), (20, 300)], ids=str)
def test_widths(widths: tuple[int, int], arch: str) -> None:
    plan = plan_of("delta", "scalar", widths=widths, arch=arch)
    for tokens in (3, 41):
        check(plan, draw(plan, tokens), draw_state(plan, 1))


@pytest.mark.parametrize(
    ("updates", "side", "read"), [("delta", "key", "post"), ("three", "scalar", "pre"), ("nothing", "value", "pre")]
)
def test_lengths(updates: str, side: str, read: str) -> None:
    plan = plan_of(updates, side, read=read)
    for tokens in (0, 1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 49):
        check(plan, draw(plan, tokens), draw_state(plan, 1))


# --- what a call may bring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5, 40])
def test_without_an_initial_state_and_without_a_last(tokens: int) -> None:
    plan = plan_of("delta", "key")
    operands = draw(plan, tokens)
    o, _ = check(plan, operands)
    alone = torch.full_like(o, torch.nan)
    compiled(plan).forward(operands, None, None, alone, None)
    assert (alone - o).abs().max() < 1e-5  # a state that nobody asks for is not updated in place


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_the_last_state_may_take_the_place_of_the_first(tokens: int) -> None:
    plan = plan_of("delta", "scalar")
    operands, state = draw(plan, tokens), draw_state(plan, 1)
    o, last = check(plan, operands, state)
    again = torch.full_like(o, torch.nan)
    compiled(plan).forward(operands, state, None, again, state)
    assert torch.equal(again, o)
    assert torch.equal(state, last)


@pytest.mark.parametrize("side", ["key", "value"])
def test_packed_sequences(side: str) -> None:
    plan = plan_of("write", side)
    for state in (None, draw_state(plan, 5)):
        check(plan, draw(plan, 90), state, [0, 3, 3, 40, 89, 90])


def test_steps_go_where_chunks_go() -> None:
    plan = plan_of("erase and write", "key")
    operands, state = draw(plan, 40), draw_state(plan, 1)
    whole, last = check(plan, operands, state)
    outputs = []
    for t in range(40):
        o = torch.empty(1, 2, 1, plan.value_width)
        token = Operands.of(tuple(None if x is None else x[:, :, t : t + 1] for x in operands.tensors))
        compiled(plan).forward(token, state, None, o, state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
def test_nothing_to_do(batch: int, heads: int) -> None:
    plan = plan_of("delta", "scalar")
    o, last = run(plan, draw(plan, 20, batch=batch, heads=heads), draw_state(plan, batch, heads))
    assert o.shape[:2] == last.shape[:2] == (batch, heads)


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("side", ["scalar", "key"])
def test_rows_at_any_distance(side: str, tokens: int) -> None:
    """Heads within tokens, one key for all batches, one decay for all tokens, every other channel."""
    plan = plan_of("delta", side)
    drawn = draw(plan, tokens, batch=2, heads=3)
    assert drawn.log_decay is not None
    assert drawn.values[0] is not None
    spread = torch.randn(2, 3, tokens, 2 * plan.key_width)[..., ::2]
    within = drawn.values[0].transpose(1, 2).contiguous().transpose(1, 2)
    decay = drawn.log_decay[:, :, :1].expand(drawn.log_decay.shape)
    operands = Operands(spread, (drawn.keys[0][:1].expand(2, -1, -1, -1),), (within,), drawn.erases, decay)
    o, last = check(plan, operands, draw_state(plan, 2, 3))
    plainly = Operands.of(tuple(None if x is None else x.contiguous() for x in operands.tensors))
    assert all(torch.equal(a, b) for a, b in zip(run(plan, plainly, draw_state(plan, 2, 3)), (o, last), strict=True))


@pytest.mark.parametrize(("updates", "side"), [("write", "value"), ("delta", "key"), ("delta", "scalar")])
@pytest.mark.parametrize("tokens", [1, 100])
def test_threads_change_nothing(updates: str, side: str, tokens: int) -> None:
    before = torch.get_num_threads()
    plan = plan_of(updates, side, widths=(32, 150))
    operands, state = draw(plan, tokens, heads=3), draw_state(plan, 1, 3)
    results = []
    try:
        for threads in (1, 2, 3, 8, 64):
            torch.set_num_threads(threads)
            results.append(run(plan, operands, state))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("tokens", [1, 20])
def test_heads_that_a_thread_takes_in_groups(tokens: int) -> None:
    plan = plan_of("delta", "scalar", widths=(8, 8))
    operands, state = draw(plan, tokens, batch=7, heads=23), draw_state(plan, 7, 23)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(plan, operands, state)
    finally:
        torch.set_num_threads(before)


@ARCHS
@pytest.mark.parametrize("dtype", [DType.F32, pytest.param(DType.BF16, marks=SLOW)], ids=str)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    ("updates", "side", "widths"),
    [("delta", "key", (7, 5)), ("delta", "scalar", (16, 16)), ("write", "value", (1, 33))],
)
def test_nothing_outside_the_tensors_is_read(
    updates: str, side: str, widths: tuple[int, int], at_end: bool, dtype: DType, arch: str
) -> None:
    plan = plan_of(updates, side, dtype=dtype, widths=widths, arch=arch)
    guarded = Guarded()
    for tokens in (1, 16, 45):
        operands = Operands.of(
            tuple(None if x is None else guarded.copy(x, at_end=at_end) for x in draw(plan, tokens).tensors)
        )
        state = guarded.copy(draw_state(plan, 1), at_end=at_end)
        o = guarded.copy(torch.empty(1, 2, tokens, widths[1], dtype=operands.query.dtype), at_end=at_end)
        compiled(plan).forward(operands, state, None, o, state)
        assert o.isfinite().all()


# --- numbers ---------------------------------------------------------------------------------------------------------

HARD = [
    ("write", "scalar", "post"),
    ("write", "key", "pre"),
    ("write", "value", "post"),
    ("delta", "scalar", "post"),
    ("delta", "key", "post"),
]


@pytest.mark.parametrize("dtype", [DType.F32, pytest.param(DType.F64, marks=SLOW)], ids=str)
@pytest.mark.parametrize(("updates", "side", "read"), HARD)
def test_decays(updates: str, side: str, read: str, dtype: DType) -> None:
    plan = plan_of(updates, side, read=read, dtype=dtype)
    for decay, forget in itertools.product((0.0, 1e-6, 0.1, 1.0, 5.0, 20.0, 300.0), (0.0, 0.1)):
        check(plan, draw(plan, 70, decay=decay, forget=forget), draw_state(plan, 1))


@pytest.mark.parametrize("dtype", [DType.F32, pytest.param(DType.F64, marks=SLOW)], ids=str)
@pytest.mark.parametrize(("updates", "side", "read"), HARD)
def test_a_stroke_does_not_blur_what_follows(updates: str, side: str, read: str, dtype: DType) -> None:
    plan = plan_of(updates, side, read=read, dtype=dtype)
    for stroke in (-300.0, -3e4, -1e30, -torch.inf):
        operands = draw(plan, 64)
        assert operands.log_decay is not None
        operands.log_decay[:] = -0.01
        operands.log_decay[:, :, 5::20] = stroke
        check(plan, operands, draw_state(plan, 1))


@pytest.mark.parametrize(("updates", "read", "width"), [("delta", "post", 20), ("erase and write", "pre", 32)])
def test_small_readers_survive_decays_by_channel(updates: str, read: str, width: int) -> None:
    """Times the decay of a chunk they would be no numbers of f32; what they read has the inverse."""
    plan = plan_of(updates, "key", read=read, widths=(width, 40))
    operands = draw(plan, 40)
    assert operands.log_decay is not None
    operands = replace(
        operands,
        query=operands.query * 1e-28,
        erases=tuple(None if erase is None else erase * 1e-28 for erase in operands.erases),
        log_decay=torch.full_like(operands.log_decay, -58 / 16 * math.log(2)),
    )
    check(plan, operands, draw_state(plan, 1))


@pytest.mark.parametrize("read", ["pre", "post"])
@pytest.mark.parametrize("widths", [(64, 40), (33, 9)], ids=str)
def test_decays_by_channel_in_bf16(widths: tuple[int, int], read: str) -> None:
    """Queries and keys with their decays are rounded for products; the state is not the worse for it."""
    plan = plan_of("write", "key", read=read, dtype=DType.BF16, widths=widths)
    for tokens, decay, forget in ((9, 0.3, 0.0), (64, 0.1, 0.0), (45, 1.0, 0.01), (70, 5.0, 0.0), (40, 20.0, 0.1)):
        check(plan, draw(plan, tokens, decay=decay, forget=forget), draw_state(plan, 1))


@pytest.mark.parametrize("widths", [(16, 8), (33, 9)], ids=str)
def test_rows_of_pairs_are_padded_to_more_than_a_vector(widths: tuple[int, int]) -> None:
    """There are no log decays beside them in memory."""
    plan = plan_of("write", "key", dtype=DType.BF16, widths=widths)
    guarded = Guarded()
    for tokens, at_end in itertools.product((9, 40), (True, False)):
        drawn = draw(plan, tokens)
        operands = Operands.of(tuple(None if x is None else guarded.copy(x, at_end=at_end) for x in drawn.tensors))
        check(plan, operands, draw_state(plan, 1))


@pytest.mark.parametrize("side", ["scalar", "key"])
def test_an_infinity_that_no_output_sees(side: str) -> None:
    """The last token of several updates writes it, after its query has read. What rounding takes from it is NaN."""
    write = UPDATES["write"]
    plan = replace(plan_of("write", side, read="pre", dtype=DType.BF16, widths=(32, 40)), updates=write * 2)
    for tokens in (16, 40):
        operands = draw(plan, tokens)
        assert operands.values[0] is not None
        operands.values[0][0, 0, -1, 0] = torch.inf
        check(plan, operands, draw_state(plan, 1))


@pytest.mark.parametrize(("updates", "side", "read"), HARD)
def test_growth(updates: str, side: str, read: str) -> None:
    plan = plan_of(updates, side, read=read)
    operands = draw(plan, 64, decay=0.5)
    assert operands.log_decay is not None
    operands.log_decay[:, :, ::3] *= -1
    check(plan, operands, draw_state(plan, 1))


@pytest.mark.parametrize(("updates", "side"), [("write", "scalar"), ("delta", "key"), ("write", "value")])
def test_no_decay_for_long(updates: str, side: str) -> None:
    """A decay of 1 takes nothing away, however often it is applied."""
    plan = plan_of(updates, side)
    operands = draw(plan, 4100, heads=1)
    assert operands.log_decay is not None
    check(plan, Operands.of((*operands.tensors[:-1], torch.zeros_like(operands.log_decay))), draw_state(plan, 1, 1))


@pytest.mark.representative(2)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nearly_equal_keys(dtype: DType) -> None:
    """Each token replaces what all before it have written."""
    plan = plan_of("delta", "none", dtype=dtype, widths=(32, 32))
    drawn = draw(plan, 200)
    for spread in (0.0, 0.1):
        key = normalize(torch.ones(1, 2, 200, 32) + spread * drawn.query.float(), dim=-1).to(drawn.query.dtype)
        check(plan, Operands(drawn.query, (key,), drawn.values, (key,), None), draw_state(plan, 1))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize(("updates", "side", "read"), HARD)
def test_infinities_and_nan_reach_what_depends_on_them(updates: str, side: str, read: str, poison: float) -> None:
    """One element of one operand at a time; the error rule asks for them where the oracle has them, and nowhere else.

    1e38 stays a number by itself: products overflow in f32 where the oracle does not, and only some channels do."""
    plan = plan_of(updates, side, read=read)
    for operand in range(len(draw(plan, 1).tensors)):
        operands = draw(plan, 40, heads=1)
        x = operands.tensors[operand]
        if x is None:
            continue
        x[0, 0, (21, 3) if x.dim() == 4 else 21] = poison
        exact = core(plan, operands)
        for found, oracle in zip(run(plan, operands), exact, strict=True):
            untouched = oracle.isfinite() & (oracle.abs() < 1e30)
            assert found[untouched].isfinite().all()
            if poison != 1e38:
                assert not found[~untouched].isfinite().any()
                torch.testing.assert_close(found[untouched], oracle[untouched].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("updates", "side", "read"), HARD)
def test_a_state_with_an_infinite_element(updates: str, side: str, read: str) -> None:
    plan = plan_of(updates, side, read=read)
    state = draw_state(plan, 1)
    state[0, 0, 3, 7] = torch.inf
    for tokens in (3, 40):
        operands = draw(plan, tokens)
        for found, oracle in zip(run(plan, operands, state), core(plan, operands, state), strict=True):
            assert torch.equal(found.isfinite(), oracle.isfinite())


# --- drawn calls -----------------------------------------------------------------------------------------------------

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
    check(plan, draw(plan, offsets[-1], heads=heads, **drawn), draw_state(plan, len(lengths), heads), offsets)  # type: ignore[arg-type]


@settings(max_examples=by_tier(40), deadline=None)
@given(call=calls)
def test_drawn_calls(call: dict[str, float]) -> None:
    for form in (("erase and write", "key", True, "post"), ("three", "scalar", False, "pre")):
        check_drawn(plan_of(*form), **call)  # type: ignore[arg-type]


@SLOW
@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(TYPES),
    arch=st.sampled_from(NATIVE_ARCHS),
    widths=st.sampled_from([(12, 20), (16, 16), (40, 17)]),
    call=calls,
)
def test_drawn_forms(
    form: tuple[str, str, bool, str], dtype: DType, arch: str, widths: tuple[int, int], call: dict[str, float]
) -> None:
    check_drawn(plan_of(*form, dtype, widths, arch), **call)  # type: ignore[arg-type]
