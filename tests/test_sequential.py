"""Recurrences without a normal form: their statements, token by token, on both targets, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpp_support import NATIVE_ARCHS
from sequential_cases import CASES, Case
from tiers import tiered
from torch import Tensor

import attncc
from attncc.error_rule import compare
from attncc.ir.recurrence import Recurrence
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.passes.normal_form import Sequential, normal_form
from attncc.recurrent_reference import evaluate
from attncc.runtime import sequential_gradient
from attncc.runtime.arguments import Signature
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_arguments import GivenToRecurrence, bind_recurrence
from attncc.runtime.sequential import SequentialKernels

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
INTERPRETED = "triton:interpret"
TARGETS = (*(f"cpp:{arch}" for arch in NATIVE_ARCHS), INTERPRETED)

_built: dict[tuple[str, str], RecurrentAttention] = {}


def built(case: Case, target: str) -> RecurrentAttention:
    """The recurrence of a case, compiled once for each target."""
    key = case.source, target
    if key not in _built:
        attn = attncc.build(case.source, target=target)
        assert isinstance(attn, RecurrentAttention)
        assert isinstance(normal_form(attn.attention), Sequential)
        _built[key] = attn
    return _built[key]


def draw(
    case: Case,
    dtype: torch.dtype,
    tokens: int = 9,
    widths: tuple[int, int] = (5, 19),
    heads: tuple[int, int, int] = (2, 2, 2),
    batch: int = 2,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """q, k and v; the inputs that the case reads; a state."""
    generator = torch.Generator().manual_seed(0)
    D, E = widths
    sizes = {"B": batch, "H": max(heads), "N": tokens, "D": D, "E": E}
    wide = torch.promote_types(dtype, F32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64) / 2

    rows = [normal(batch, h, tokens, w).to(dtype) for h, w in zip(heads, (D, D, E), strict=True)]
    inputs = {
        name: normal(*(sizes[axis] for axis in axes.split(", "))).to(wide) for name, axes in case.parameters.items()
    }
    return rows, inputs, normal(batch, max(heads), D, E).to(wide)


def assert_close(what: str, found: Tensor, exact: Tensor, plain: Tensor) -> None:
    message = compare(what, found, exact.detach(), plain.detach())
    assert message is None, message


def assert_right(case: Case, target: str, rows: list[Tensor], inputs: dict[str, Tensor], state: Tensor) -> None:
    """Output and last state by the error rule."""
    attn = built(case, target)
    found = attn(*rows, initial_state=state, return_state=True, **inputs)
    exact = attn.reference(*rows, initial_state=state, return_state=True, **inputs)
    plain = case.run(*rows, inputs, state)
    for what, *results in zip(("o", "state"), found, exact, plain, strict=True):
        assert_close(what, *results)
    assert found[0].dtype is rows[0].dtype
    assert found[1].dtype is state.dtype


CASE = pytest.mark.parametrize("name", CASES)
# One of each.
CPP_AND_TRITON = pytest.mark.parametrize("target", [TARGETS[0], INTERPRETED])


# Decays along both channels, value channels that depend on each other, rows that are transformed before.
SOME = {"both_channels", "softmax_of_keys", "normalized_rows"}


@pytest.mark.representative(12)
@pytest.mark.parametrize(
    ("name", "target"),
    tiered(lambda name, target: target in (TARGETS[0], INTERPRETED) or name in SOME, CASES, TARGETS),
)
def test_every_case(name: str, target: str) -> None:
    assert_right(CASES[name], target, *draw(CASES[name], F32))


@pytest.mark.representative(12)
@CPP_AND_TRITON
@pytest.mark.parametrize(
    ("name", "dtype"),
    tiered(lambda name, dtype: dtype == BF16 or (dtype == F64 and name in SOME), CASES, (BF16, F64, F16)),
    ids=str,
)
def test_every_type(name: str, target: str, dtype: torch.dtype) -> None:
    assert_right(CASES[name], target, *draw(CASES[name], dtype))


@pytest.mark.representative(8)
@pytest.mark.parametrize("name", ["bounded", "by_value_channels", "squared"])
@CPP_AND_TRITON
@pytest.mark.parametrize("widths", [(1, 1), (16, 32), (3, 64), (64, 40), (130, 5)], ids=str)
def test_every_width(name: str, target: str, widths: tuple[int, int]) -> None:
    assert_right(CASES[name], target, *draw(CASES[name], F32, tokens=5, widths=widths, batch=1))


@CPP_AND_TRITON
@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 2, 4), (1, 2, 4)], ids=str)
def test_heads_may_share_rows(target: str, heads: tuple[int, int, int]) -> None:
    assert_right(CASES["normalized_rows"], target, *draw(CASES["normalized_rows"], F32, heads=heads))


@CPP_AND_TRITON
def test_no_tokens_no_heads_no_batch(target: str) -> None:
    case = CASES["bounded"]
    for arguments in ({"tokens": 0}, {"batch": 0}, {"tokens": 1}):
        rows, inputs, state = draw(case, F32, **arguments)
        attn = built(case, target)
        o, last = attn(*rows, initial_state=state, return_state=True, **inputs)
        assert o.shape == (*rows[2].shape[:2], rows[2].shape[2], rows[2].shape[3])
        if rows[0].shape[2] == 0:
            assert torch.equal(last, state)


@pytest.mark.representative(8)
@CASE
@CPP_AND_TRITON
def test_rows_inputs_and_states_in_any_layout(name: str, target: str) -> None:
    rows, inputs, state = draw(CASES[name], F32)
    scattered, odd = [spread(x) for x in rows], {name: spread(x) for name, x in inputs.items()}
    assert_right(CASES[name], target, scattered, odd, spread(state))


def spread(x: Tensor) -> Tensor:
    """The same numbers with gaps between them and the axes the other way round in memory."""
    backwards = x.permute(*reversed(range(x.dim()))).contiguous()
    gaps = torch.stack([backwards, backwards.new_full(backwards.shape, 9.0)], -1)
    return gaps[..., 0].permute(*reversed(range(x.dim())))


@pytest.mark.representative(12)
@pytest.mark.parametrize("name", [name for name in CASES if name != "by_position"])  # `t` is a place in a call
@CPP_AND_TRITON
def test_a_sequence_may_be_split_and_resumed(name: str, target: str) -> None:
    case = CASES[name]
    rows, inputs, state = draw(case, F32)
    attn = built(case, target)
    exact = attn.reference(*rows, initial_state=state, return_state=True, **inputs)
    plain = case.run(*rows, inputs, state)
    parts = []
    for tokens in (slice(0, 4), slice(4, 5), slice(5, 5), slice(5, None)):
        of_part = {n: x[:, :, tokens] if "N" in case.parameters[n] else x for n, x in inputs.items()}
        given = (x[:, :, tokens] for x in rows)
        o, state = attn(*given, initial_state=state, return_state=True, q_offset=tokens.start, **of_part)
        parts.append(o)
    for what, *results in zip(("o", "state"), (torch.cat(parts, 2), state), exact, plain, strict=True):
        assert_close(what, *results)


@CASE
@CPP_AND_TRITON
def test_packed_sequences_are_sequences_of_their_own(name: str, target: str) -> None:
    case, offsets = CASES[name], torch.tensor([0, 4, 4, 9])
    rows, inputs, _ = draw(case, F32, batch=1)
    states = torch.randn(3, 2, 5, 19, generator=torch.Generator().manual_seed(1))
    attn = built(case, target)
    arguments: dict[str, Any] = {"initial_state": states, "return_state": True, "cu_seqlens": offsets, **inputs}
    found, exact = attn(*rows, **arguments), attn.reference(*rows, **arguments)
    for what, a, b in zip(("o", "state"), found, exact, strict=True):
        assert_close(what, a, b, b.to(F32))


@CPP_AND_TRITON
def test_a_step_changes_the_state_in_place(target: str) -> None:
    case = CASES["bounded"]
    rows, inputs, state = draw(case, F32, tokens=3)
    attn = built(case, target)
    whole, last = attn(*rows, initial_state=state, return_state=True, **inputs)
    given = state
    for t in range(3):
        of_token = {n: x[:, :, t : t + 1] if "N" in case.parameters[n] else x for n, x in inputs.items()}
        o = attn.step(*(x[:, :, t : t + 1] for x in rows), state=state, q_offset=t, **of_token)
        assert torch.equal(o, whole[:, :, t : t + 1])
    assert given is state
    assert torch.equal(state, last)


def test_it_does_not_matter_how_many_threads_there_are() -> None:
    case = CASES["by_value_channels"]
    rows, inputs, state = draw(case, F32, heads=(7, 7, 7))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(built(case, TARGETS[0])(*rows, initial_state=state, **inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# What no specification can write yet, and the IR can.


@CPP_AND_TRITON
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_outputs_divided_by_the_sum_of_weights(target: str, dtype: torch.dtype) -> None:
    recurrence = replace(built(CASES["bounded"], target).attention, normalizer="sum")
    rows, inputs, _ = draw(CASES["bounded"], dtype)
    state = torch.rand(2, 2, 5, 20, generator=torch.Generator().manual_seed(1)) + 0.5
    rows = [rows[0].abs(), rows[1].abs(), rows[2]]  # no sum of weights lies near 0
    assert_ir_right(recurrence, target, rows, inputs, state)


@CPP_AND_TRITON
@pytest.mark.parametrize("queries", [0, 4, 11])
def test_queries_that_read_what_all_tokens_leave(target: str, queries: int) -> None:
    recurrence = replace(built(CASES["bounded"], target).attention, bidirectional=True)
    rows, inputs, state = draw(CASES["bounded"], F32)
    rows[0] = torch.randn(2, 2, queries, 5, generator=torch.Generator().manual_seed(1))
    assert_ir_right(recurrence, target, rows, inputs, state)


def assert_ir_right(
    recurrence: Recurrence, target: str, rows: list[Tensor], inputs: dict[str, Tensor], state: Tensor
) -> None:
    """Output, last state and gradients by the error rule; what is exact sets the standard by its own rounding."""
    verify_recurrence(recurrence)
    leaves = [x.requires_grad_() for x in (*rows, state)]
    bound = bind_recurrence(Signature(recurrence), GivenToRecurrence(*rows, state, None, 0, inputs))
    found = SequentialKernels(recurrence, target, ()).run(*rows, bound)
    exact = evaluate(recurrence, *rows, inputs, state)
    for what, a, b in zip(("o", "state"), found, exact, strict=True):
        assert_close(what, a, b, b.to(a.dtype))
    upstream = upstream_of(found)
    for a, b in zip(gradients(found, leaves, upstream), gradients(exact, leaves, upstream), strict=True):
        assert_close("gradient", a, b.to(F64), b)


# Gradients.


def upstream_of(results: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of results, exact in their types."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype).to(F64) for x in results]


def gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    # Where there are no tokens, there may be an output that nothing is part of.
    pairs = [(result, x.to(result.dtype)) for result, x in zip(results, upstream, strict=True) if result.requires_grad]
    made, given = zip(*pairs, strict=True)
    return torch.autograd.grad(made, leaves, given, allow_unused=True, materialize_grads=True)


def assert_gradients(
    case: Case, target: str, rows: list[Tensor], inputs: dict[str, Tensor], state: Tensor, **arguments: Any
) -> None:
    leaves = [x.requires_grad_() for x in (*rows, state, *inputs.values())]
    attn = built(case, target)
    found = attn(*rows, initial_state=state, return_state=True, **arguments, **inputs)
    exact = attn.reference(*rows, initial_state=state, return_state=True, **arguments, **inputs)
    upstream = upstream_of(found)
    of_found, of_exact = gradients(found, leaves, upstream), gradients(exact, leaves, upstream)
    # Packed sequences have no formula by hand: the rounding of what is exact sets the standard.
    of_plain = of_exact if arguments else gradients(case.run(*rows, inputs, state), leaves, upstream)
    names = ("q", "k", "v", "state", *inputs)
    for name, leaf, a, b, c in zip(names, leaves, of_found, of_exact, of_plain, strict=True):
        assert a.dtype is leaf.dtype
        assert_close(f"gradient of {name}", a, b.to(F64), c)


@pytest.mark.representative(10)
@CASE
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    assert_gradients(CASES[name], TARGETS[0], *draw(CASES[name], dtype, tokens=11))


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_gradients_of_few_tokens(tokens: int) -> None:
    assert_gradients(CASES["bounded"], TARGETS[0], *draw(CASES["bounded"], F32, tokens=tokens))


def test_gradients_of_packed_sequences() -> None:
    case, offsets = CASES["by_value_channels"], torch.tensor([0, 4, 4, 9])
    rows, inputs, _ = draw(case, F64, batch=1)
    states = torch.randn(3, 2, 5, 19, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert_gradients(case, TARGETS[0], rows, inputs, states, cu_seqlens=offsets)


def test_gradients_hold_states_of_the_square_root_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    stretches: list[int] = []

    def counted(plan: Any, operands: Any, state: Tensor, count: int) -> tuple[Tensor, Tensor]:
        stretches.append(count)
        return stretch(plan, operands, state, count)

    stretch = sequential_gradient._stretch
    monkeypatch.setattr(sequential_gradient, "_stretch", counted)
    rows, inputs, state = draw(CASES["bounded"], F32, tokens=100)
    rows[0].requires_grad_()
    built(CASES["bounded"], TARGETS[0])(*rows, initial_state=state, **inputs).sum().backward()
    assert stretches == [10] * 10


def test_gradients_are_the_same_every_time() -> None:
    rows, inputs, state = draw(CASES["softmax_of_keys"], F32)
    leaves = [x.requires_grad_() for x in (rows[0], rows[2], state)]
    attn = built(CASES["softmax_of_keys"], TARGETS[0])
    twice = []
    for _ in range(2):
        o = attn(*rows, initial_state=state, **inputs)
        twice.append(torch.autograd.grad(o.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
