"""`bench` of recurrences: the token loop computes the same, and GFLOP/s are those of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attncc
from attncc.bench import RECURRENT_PEERS, bench_recurrence, core_operations, table
from attncc.cli import main
from attncc.error_rule import compare
from attncc.ir.types import DType
from attncc.peers import Call, NotApplicable
from attncc.plan.nodes import Target
from attncc.plan.recurrent import CorePlan, CoreUpdate, gradient_of
from attncc.runtime.cpp_toolchain import find_compiler
from attncc.runtime.recurrent import RecurrentAttention

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "recurrent"
BOUNDED = "attention bounded():\n    recurrence:\n        S = tanh(S + outer(k, v))\n        out = q @ S\n"


def recurrence(spec: str | Path) -> RecurrentAttention:
    attn = attncc.build(spec)
    assert isinstance(attn, RecurrentAttention)
    return attn


@pytest.mark.parametrize("spec", [EXAMPLES / "deltanet.attn", EXAMPLES / "linear_attention.attn", BOUNDED])
def test_the_token_loop_computes_the_same(spec: str | Path) -> None:
    attn = recurrence(spec)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 6)
    inputs = {"beta": torch.rand(1, 4, 9)} if attn.attention.tensors else {}
    peer = RECURRENT_PEERS["eager"][1](attn.attention, Call(q, k, v, inputs))
    assert not isinstance(peer, NotApplicable)
    exact = attn.reference(q, k, v, **inputs)
    assert (message := compare("o", peer(), exact, exact.float())) is None, message


@pytest.mark.parametrize(("heads", "heads_k", "heads_v", "runs"), [(4, 2, 2, True), (2, 4, 4, False), (2, 2, 4, False)])
def test_softmax_of_the_same_rows(heads: int, heads_k: int, heads_v: int, runs: bool) -> None:
    attn = recurrence(EXAMPLES / "linear.attn")
    q, k, v = (torch.randn(1, count, 5, 8) for count in (heads, heads_k, heads_v))
    peer = RECURRENT_PEERS["sdpa"][1](attn.attention, Call(q, k, v, {}))
    assert isinstance(peer, NotApplicable) != runs
    if not isinstance(peer, NotApplicable):
        causal = attncc.build("attention causal_one():\n    mask = causal\n")
        assert torch.allclose(peer(), causal(q, k, v), atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("variant", "update"), [("gla", CoreUpdate(True, False)), ("deltanet", CoreUpdate(True, True))]
)
def test_operations_are_those_of_the_benchmarks(
    variant: str, update: CoreUpdate, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from recurrent_cases import operations

    target = Target("cpp", "avx2")
    plan = CorePlan("recurrent", "recurrent", target, DType.F32, 64, 128, "none", (update,), False, "post")
    plan = gradient_of(plan) if backward else plan
    assert core_operations(plan, 16) == operations(variant, backward, 16, 64, 128)


@pytest.mark.parametrize("backward", [False, True])
def test_bench(backward: bool) -> None:
    attn = recurrence(EXAMPLES / "retnet.attn")
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=backward) for _ in range(3))
    call = Call(q, k, v, {"gamma": torch.rand(2)})
    result = bench_recurrence(attn, call, repeat=3, backward=backward, compiler=find_compiler().command[0])
    own, loop, softmax = result.rows
    assert result.pairs is None
    assert own.timing is not None
    assert own.gflops is not None
    # Whatever chunks are: at least the state, written and read; and no more than in chunks of all tokens.
    state = 2 * 20 * 4 * 16 * 16
    assert state * 0.999 < own.gflops * own.timing.median * 1e9 < 20 * state
    assert own.peak_share is not None
    assert loop.ratio is not None
    assert loop.gflops is None
    assert softmax.title == "SDPA: another function"
    assert softmax.ratio is not None
    assert table(result).row_count == 3


def test_without_a_core_nothing_is_counted() -> None:
    q, k, v = torch.randn(3, 1, 1, 5, 8)
    result = bench_recurrence(recurrence(BOUNDED), Call(q, k, v, {}), against=("eager",), repeat=3)
    assert [row.gflops for row in result.rows] == [None, None]
    assert result.counted == ""
    assert "GFLOP/s of" not in str(table(result).caption)


def test_bench_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(EXAMPLES / "mamba2.attn"), "--shape", "1,2,2,20,20,8", "--repeat", "3", "--dtype", "f32"]
    assert main([*arguments, "--json", "-"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["attncc", "eager", "sdpa"]
    assert main(arguments) == 0
    assert "PyTorch, token by token" in capsys.readouterr().out
    assert main([*arguments, "--against", "flex"]) == 1
    assert "the peers are eager, sdpa" in capsys.readouterr().err
