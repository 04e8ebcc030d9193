"""C++ cores without erasures: tokens stream by the state, with decays folded into operands where that is safe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpp_support import NATIVE_ARCHS
from test_cpp_recurrent import check, plan_of
from torch import Tensor
from triton_recurrent_support import WRITE, draw, draw_state

from attncc.emit.core_machine import core_machine
from attncc.emit.recurrent_cpp import render_core
from attncc.ir.types import DType
from attncc.plan.recurrent import CorePlan
from attncc.runtime.recurrent_operands import Operands

CHUNK = core_machine(plan_of("write", "scalar")).chunk
FOLDING = pytest.mark.parametrize("side", ["scalar", "key", "value"])
READS = pytest.mark.parametrize("read", ["post", "pre"])


def decays(operands: Operands, log2: Tensor) -> Operands:
    """`operands` whose log2 decay is one for all channels."""
    log_decay = operands.log_decay
    assert log_decay is not None
    by_token = (log2 * torch.tensor(2.0).log()).to(log_decay.dtype).view(1, 1, -1, *[1] * (log_decay.dim() - 3))
    return replace(operands, log_decay=by_token.expand_as(log_decay).contiguous())


@pytest.mark.parametrize(
    ("updates", "side", "dtype", "arch", "streams"),
    [
        ("write", "scalar", DType.F32, "avx512", True),
        ("nothing", "none", DType.F64, "avx2", True),
        ("write", "value", DType.BF16, "avx512_bf16", True),
        ("write", "key", DType.BF16, "avx512_bf16", False),
        ("write", "scalar", DType.BF16, "avx512_bf16", False),  # pairs of bf16 are multiplied twice as quickly
        ("delta", "scalar", DType.F32, "avx512", False),
    ],
)
def test_what_streams(updates: str, side: str, dtype: DType, arch: str, streams: bool) -> None:
    plan = plan_of(updates, side, dtype=dtype, arch=arch)
    assert core_machine(plan).streams == streams
    assert ("find_scores" not in render_core(plan)) == streams


@FOLDING
@READS
@pytest.mark.parametrize("per_token", [0.0, -1.5, -2.5, -28.0, 0.2, 1.0])
def test_decays_that_fold_and_that_do_not(side: str, read: str, per_token: float) -> None:
    """Of a chunk 2^0, 2^-48, 2^-80 (too much), far too much, 2^6.4 and 2^32 (too much)."""
    plan = plan_of("write", side, read=read)
    tokens = 3 * CHUNK + 5
    log2 = torch.full((tokens,), per_token)
    log2[CHUNK : 2 * CHUNK] = 0  # Chunks differ.
    check(plan, decays(draw(plan, tokens), log2), draw_state(plan, 1))


@FOLDING
def test_small_numbers_survive_growth(side: str) -> None:
    plan = plan_of("write", side)
    operands = draw(plan, 2 * CHUNK)
    tiny = replace(operands, values=tuple(None if x is None else x * 1e-36 for x in operands.values))
    check(plan, decays(tiny, torch.full((2 * CHUNK,), 1.0)))


@pytest.mark.representative(3)
@FOLDING
@READS
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_small_queries_survive_decays(side: str, read: str, dtype: DType) -> None:
    """Times the decay of a chunk they would be no number of f32; what is read has the inverse."""
    plan = plan_of("write", side, read=read, dtype=dtype)
    operands = draw(plan, 2 * CHUNK)
    small = replace(operands, query=(operands.query.double() * 1e-28).to(operands.query.dtype))
    check(plan, decays(small, torch.full((2 * CHUNK,), -60 / CHUNK)), draw_state(plan, 1))


@FOLDING
@READS
def test_what_overflows_only_folded(side: str, read: str) -> None:
    """A value of 1e30 is written where the chunk has decayed by 2^-60: by the last token, which no output may show."""
    plan = plan_of("write", side, read=read)
    operands = draw(plan, CHUNK)
    value = operands.values[0]
    assert value is not None
    value[:, :, -1] *= 1e30
    _, state = check(plan, decays(operands, torch.full((CHUNK,), -60 / CHUNK)), draw_state(plan, 1))
    assert state.isfinite().all()


@pytest.mark.parametrize("side", ["none", "scalar", "key", "value"])
@READS
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_earlier_tokens_of_the_chunk_keep_their_outputs(side: str, read: str, poison: float) -> None:
    plan = plan_of("write", side, read=read)
    operands = draw(plan, 2 * CHUNK)
    clean, _ = check(plan, operands)
    for rows in (operands.values[0], operands.keys[0]):
        assert rows is not None
        kept = rows[0, 0, CHUNK + 7, 1].item()
        rows[0, 0, CHUNK + 7, 1] = poison
        o, _ = check(plan, operands)
        before = CHUNK + 7 + (read == "pre")
        torch.testing.assert_close(o[:, :, :before], clean[:, :, :before], rtol=1e-5, atol=1e-6)
        assert not o[0, 0, before:].isfinite().all()
        torch.testing.assert_close(o[0, 1], clean[0, 1], rtol=0, atol=0)
        rows[0, 0, CHUNK + 7, 1] = kept


@pytest.mark.parametrize(("side", "read"), [("none", "post"), ("scalar", "pre"), ("key", "post"), ("value", "pre")])
@pytest.mark.parametrize("width", [1, 20])
def test_an_infinite_value_does_not_meet_what_fills_up_rows(side: str, read: str, width: int) -> None:
    """Of a sum of infinities of one sign the zeros behind the last channel would make NaN."""
    plan = plan_of("write", side, read=read, widths=(width, 40))
    operands = draw(plan, 2 * CHUNK)
    (value,) = operands.values
    assert value is not None
    value[0, 0, CHUNK + 7, 1] = torch.inf
    positive = replace(operands, query=operands.query.abs() + 0.1, keys=(operands.keys[0].abs() + 0.1,))
    o, state = check(plan, positive)
    assert (o[0, 0, CHUNK + 8 :, 1] == torch.inf).all()
    assert (state[0, 0, :, 1] == torch.inf).all()


@pytest.mark.representative(3)
@pytest.mark.parametrize("arch", dict.fromkeys((NATIVE_ARCHS[0], NATIVE_ARCHS[-1])))
@pytest.mark.parametrize(("side", "read"), [("scalar", "post"), ("key", "pre"), ("value", "post"), ("none", "pre")])
def test_two_writes_of_a_token(side: str, read: str, arch: str) -> None:
    plan: CorePlan = replace(plan_of("write", side, read=read, arch=arch), updates=(WRITE, WRITE))
    for decay in (0.1, 5.0):
        check(plan, draw(plan, CHUNK + 9, decay=decay), draw_state(plan, 1))
