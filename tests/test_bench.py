"""What `bench` compares with computes the same thing, and what it measures makes sense."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from formulas import VARIANTS, Sizes
from rich.console import Console

from attncc.bench import Result, Row, bench, table
from attncc.build import build, check
from attncc.error_rule import compare
from attncc.peak import peak
from attncc.peers import Call, NotApplicable, count_kept_pairs, flex, sdpa
from attncc.runtime.cpp_toolchain import find_compiler
from attncc.timing import Timing, alternate

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = Sizes(B=1, H=2, HKV=1, M=96, N=144, D=16, E=16)

# Which peer can express which example; the rest has sinks, weights or norms that it has not.
SDPA = set(VARIANTS) - {
    *("softcap", "attention_sink", "softmax_off_by_one", "sigmoid", "relu_squared"),
    *("qk_norm", "rope", "yarn", "longrope", "cosine"),
}
FLEX = SDPA | {"cosine", "longrope", "qk_norm", "rope", "softcap", "yarn"}


def call_of(name: str) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """A call, what it gives in float64, and what the plain formula gives."""
    problem = VARIANTS[name].problem(SIZES, torch.float32)
    exact, _ = VARIANTS[name].evaluate(problem, torch.float64)
    plain, _ = VARIANTS[name].evaluate(problem)
    return Call(problem.q, problem.k, problem.v, problem.inputs), exact, plain


@pytest.mark.parametrize("name", VARIANTS)
def test_sdpa(name: str) -> None:
    attention = check(EXAMPLES / f"{name}.attn", **VARIANTS[name].constants)
    call, exact, plain = call_of(name)
    peer = sdpa(attention, call)
    assert isinstance(peer, NotApplicable) == (name not in SDPA)
    if not isinstance(peer, NotApplicable):
        assert (message := compare("o", peer(), exact, plain)) is None, message


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_flex(name: str) -> None:
    attention = check(EXAMPLES / f"{name}.attn", **VARIANTS[name].constants)
    call, exact, plain = call_of(name)
    peer = flex(attention, call)
    assert isinstance(peer, NotApplicable) == (name not in FLEX)
    if not isinstance(peer, NotApplicable):
        assert (message := compare("o", peer(), exact, plain)) is None, message


@pytest.mark.parametrize("name", ["causal", "document", "bigbird"])
def test_count_of_pairs(name: str) -> None:
    """One for each pair whose value shows in the output: v = 1 at one key at a time."""
    attention = check(EXAMPLES / f"{name}.attn", **VARIANTS[name].constants)
    call, _, _ = call_of(name)
    sums, keys = 0, call.k.shape[2]
    unit = torch.eye(keys).expand(1, 1, keys, keys)
    problem = VARIANTS[name].problem(SIZES, torch.float32)
    o, _ = VARIANTS[name].evaluate(type(problem)(call.q, call.k, unit, problem.inputs, problem.constants))
    sums = int((o > 0).sum())
    assert count_kept_pairs(attention, call) == sums


def test_bench() -> None:
    attn = build(EXAMPLES / "softcap.attn", target="cpp")
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    ticks: list[str] = []
    result = bench(
        attn.attention,
        lambda: attn(q, k, v),
        Call(q, k, v, {}),
        against=("eager", "sdpa"),
        repeat=3,
        compiler=find_compiler().command[0],
        tick=ticks.append,
    )
    own, eager_row, sdpa_row = result.rows
    assert result.pairs == 2 * 64 * 65 // 2
    assert own.timing is not None
    assert own.ratio == 1.0
    assert own.gflops == pytest.approx(2 * result.pairs * 32 / own.timing.median / 1e9)
    assert eager_row.ratio is not None
    assert sdpa_row.timing is None
    assert "cannot express it" in sdpa_row.note
    assert "attncc" in ticks
    assert table(result).row_count == 3


def test_the_points_of_all_times_are_below_one_another() -> None:
    rows = tuple(
        Row(name, name, Timing(seconds, seconds, 3, undisturbed), 1.0, gflops, None)
        for name, seconds, undisturbed, gflops in (("attncc", 0.0012, True, 9.96), ("eager", 0.123, False, 100.0))
    )
    result = Result("drawn", {"B": 1}, "f32", 2, 1, False, None, "a machine", "2", rows)
    console = Console(width=110, file=StringIO(), record=True)
    console.print(table(result))
    lines = [line.split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    assert len(lines) == 2
    for column in (2, 4):  # times and rates
        assert len({line[column].index(".") for line in lines}) == 1, lines


def test_a_peer_that_fails_is_a_note() -> None:
    attn = build(EXAMPLES / "causal.attn", target="cpp")
    q, k, v = (torch.randn(1, 1, 0, 16) for _ in range(3))
    result = bench(attn.attention, lambda: attn(q, k, v), Call(q, k, v, {}), against=("flex",), repeat=3, compiler=None)
    assert "empty" in result.rows[1].note


def test_timing_is_that_of_the_function() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the wall clock, which sleeping takes
    try:
        timings = alternate({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, repeat=3)
    finally:
        torch.set_num_threads(threads)
    assert 0.001 <= timings["short"].median < timings["long"].median
    assert timings["long"].median >= 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_peak(dtype: torch.dtype) -> None:
    """Above what a matrix product reaches, and within what a processor can do."""
    compiler = find_compiler().command[0]
    rate = peak(dtype, compiler)
    assert 1e9 < rate < 1e14
    if dtype == torch.float64:
        assert rate < peak(torch.float32, compiler)
