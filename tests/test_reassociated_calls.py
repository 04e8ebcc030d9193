"""Pairwise attentions whose weights separate: calls with as many queries as keys run as recurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc.eager import eager
from attncc.error_rule import compare
from attncc.gradients import compare_gradients
from attncc.runtime.call import CompiledAttention
from attncc.runtime.recurrent_kernels import RecurrentKernels

N = 70
RETENTION = "attention a(gamma: float[H]):\n    weight = qk * gamma[h] ** (q_idx - kv_idx)\n    mask = causal\n"
GATED = (
    "attention a(G: float[B, H, N]):\n    q = elu(q) + 1\n    k = elu(k) + 1\n    mask = causal\n"
    "    weight = qk * exp(G[b, h, q_idx] - G[b, h, kv_idx])\n    normalize = sum\n"
)
BIDIRECTIONAL = "attention a():\n    q = elu(q) + 1\n    k = elu(k) + 1\n    weight = qk\n    normalize = sum\n"
SPECS = {
    RETENTION: lambda: {"gamma": torch.rand(4) * 0.3 + 0.7},
    # Down to e^-300 in all: no exponential of G itself is any number.
    GATED: lambda: {"G": (-torch.rand(2, 4, N) * 8).cumsum(-1)},
    BIDIRECTIONAL: dict,
}


def problem(spec: str, dtype: torch.dtype = torch.float32) -> tuple[CompiledAttention, list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    attn = attncc.build(spec)
    assert isinstance(attn, CompiledAttention)
    rows = [torch.randn(2, heads, N, width).to(dtype) for heads, width in ((4, 16), (2, 16), (2, 12))]
    return attn, rows, SPECS[spec]()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call that ran as a recurrence."""
    found: list[int] = []
    run = RecurrentKernels.run

    def noted(self: RecurrentKernels, q: Tensor, *rest: Any) -> Any:
        found.append(q.shape[2])
        return run(self, q, *rest)

    monkeypatch.setattr(RecurrentKernels, "run", noted)
    return found


@pytest.mark.representative(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_results_are_those_of_the_pairs(spec: str, dtype: torch.dtype, runs: list[int]) -> None:
    attn, rows, inputs = problem(spec, dtype)
    message = compare("o", attn(*rows, **inputs), attn.reference(*rows, **inputs), eager(attn.attention, *rows, inputs))
    assert message is None, message
    assert runs == [N]


@pytest.mark.representative(1)
@pytest.mark.parametrize("spec", SPECS)
def test_gradients(spec: str, runs: list[int]) -> None:
    attn, rows, inputs = problem(spec)
    message = compare_gradients(attn.attention, attn, *rows, inputs)
    assert message is None, message
    assert runs == [N]


@pytest.mark.parametrize(
    "arguments",
    [{"return_lse": True}, {"q_offset": 1}, {"dropout_p": 0.5, "seed": 1}],
    ids=str,
)
def test_what_the_recurrence_has_not_runs_on_pairs(arguments: dict[str, Any], runs: list[int]) -> None:
    attn, rows, inputs = problem(GATED)
    if "q_offset" in arguments:
        rows[0] = rows[0][:, :, 1:]
    o = attn(*rows, **arguments, **inputs)
    expected = attn.reference(*rows, **arguments, **inputs)
    o, expected = (x[0] if isinstance(x, tuple) else x for x in (o, expected))
    assert torch.allclose(o.double(), expected, rtol=1e-4, atol=1e-5)
    assert not runs


def test_decoding_runs_on_pairs(runs: list[int]) -> None:
    attn, (q, k, v), inputs = problem(RETENTION)
    whole = attn(q, k, v, **inputs)
    last = attn(q[:, :, -1:], k, v, **inputs)
    assert torch.allclose(last, whole[:, :, -1:], rtol=1e-4, atol=1e-5)
    assert runs == [N]


def test_a_decay_that_changes_its_sign_runs_on_pairs(runs: list[int]) -> None:
    attn, rows, _ = problem(RETENTION)
    gamma = torch.tensor([0.9, -0.9, 0.5, 1.0])
    assert torch.allclose(attn(*rows, gamma=gamma).double(), attn.reference(*rows, gamma=gamma), rtol=1e-4, atol=1e-4)
    assert not runs


def test_a_softmax_stays_pairwise(runs: list[int]) -> None:
    attn = attncc.build("attention a():\n    mask = causal\n")
    attn(*(torch.randn(1, 1, 8, 8) for _ in range(3)))
    assert not runs
