"""Backward plans mean the gradients of the specification: executed in float64, against autograd of the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backward_interpreter import Interpreter
from formulas import VARIANTS, Sizes
from hypothesis import given, settings
from strategies import Call, cases
from tiers import by_tier

from attncc.build import check
from attncc.eager import running_sums
from attncc.ir.nodes import Attention, TensorParameter
from attncc.ir.types import FLOATS
from attncc.plan.backward import plan_backward
from attncc.plan.nodes import Target
from attncc.reference import evaluate
from attncc.runtime.arguments import Signature
from attncc.runtime.arguments import Sizes as CallSizes
from attncc.runtime.backward import Results
from attncc.runtime.captured import captured_gradients
from attncc.runtime.kernels import specialization_of

EXAMPLES = Path(__file__).parent.parent / "examples"
F64 = torch.float64
SIZES = Sizes(B=2, H=4, HKV=2, M=9, N=13, D=8, E=6)
TARGET = Target("cpp", "avx512")

SPECS = {
    "forgetting gate": "attention f(G: float[B, H, N]):\n"
    "    score = qk + G[b, h, q_idx] - G[b, h, kv_idx]\n    mask = causal\n",
    "the same tensor twice": "attention f(t: float[H]):\n    score = tanh(qk * t[h]) * t[h]\n    mask = causal\n",
    "a part within another": "attention f(t: float[H]):\n"
    "    score = qk * exp(t[h]) + t[h] * sin(q_idx - kv_idx) + log1p(t[h] * (q_idx + 1))\n    mask = causal\n",
    "in a condition too": "attention f(t: float[H]):\n    score = (qk if t[h] > 1.5 else 2 * qk) * t[h]\n",
    "dense bias": "attention f(bias: float[H, M, N]):\n    score = qk + sigmoid(bias[h, q_row, kv_idx])\n",
    "gathered bias": "attention f(bias: float[4, 4]):\n    score = qk + bias[q_idx % 4, kv_idx % 4]\n",
    "0-d scalar": "attention f(t: float[]):\n    score = softcap(qk, t)\n    mask = window(5)\n",
    "learned row sink": "attention f(s: float[H, M]):\n    weight = softmax(score, sink=s[h, q_row])\n",
    "summed weights": "attention f(t: float[H]):\n    weight = exp(t[h] * score) + 0.1\n    normalize = sum\n",
    "signed sums": "attention f():\n    weight = score\n    normalize = sum\n    mask = causal\n",
    "gain by head": "attention f(g: float[H, D], u: float[HKV, E]):\n"
    "    k = rope(k * g[h], kv_idx)\n    v = v * u[hkv]\n",
    "a part of a row within another": "attention f(g: float[H, D]):\n"
    "    q = q * exp(g[h, :]) + q * q * g[h, :] * sum(g[h, :] * q)\n",
    "a row of its own": "attention f(g: float[H, D], s: float[H, 3]):\n"
    "    q = q * softmax(g[h, :]) * max(s[h, :])\n    k = k * g[h, :] * sum(g[h, :])\n",
    "rotations of rotations": "attention f():\n"
    "    q = rope(rope(rope(q, q_idx), 2, dim=4), 3, dim=6, interleaved=true)\n",
    "gain of values": "attention f(u: float[N, E]):\n    v = tanh(v) * u[kv_idx]\n",
}


def assert_gradients(
    attention: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inputs: dict,
    q_offset: int | None = None,
) -> None:
    # Sums are taken before plans.
    inputs = {**inputs, **running_sums(attention, inputs)}
    parameters = (replace(p, summed=None) if isinstance(p, TensorParameter) else p for p in attention.parameters)
    attention = replace(attention, parameters=tuple(parameters))
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    leaves = {name: x.clone().requires_grad_() for name, x in {"q": q, "k": k, "v": v, **tensors}.items()}
    o, lse = evaluate(
        attention, leaves["q"], leaves["k"], leaves["v"], inputs | {name: leaves[name] for name in tensors}, q_offset
    )
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=generator, dtype=F64)
    loss = (o * do).sum()
    dtotal = total = None
    if lse is not None:
        total = lse.detach()
        dtotal = torch.randn(lse.shape, generator=generator, dtype=F64).where(lse.isfinite(), 0.0)
        loss = loss + (lse * dtotal).where(lse.isfinite(), 0.0).sum()
    if loss.requires_grad:
        loss.backward()

    bound = Signature(attention).bind(q, k, v, q_offset, inputs)
    program = plan_backward(attention, specialization_of(q, bound), TARGET, frozenset(tensors))
    if program.backward.normalizer == "sum" and total is not None and dtotal is not None:
        total = total.exp()
        dtotal = (dtotal / total).where(total > 0, 0.0)
    found = Interpreter(program).run(q, k, v, bound, Results(o.detach(), total, do, dtotal))
    captured = captured_gradients(program, bound, found, total, tuple(tensors)) if tensors else {}
    for name, gradient in {"q": found.dq, "k": found.dk, "v": found.dv, **captured}.items():
        expected = leaves[name].grad
        expected = torch.zeros_like(gradient) if expected is None else expected
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("name", VARIANTS)
def test_examples(name: str) -> None:
    problem = VARIANTS[name].problem(SIZES, F64)
    attention = check(EXAMPLES / f"{name}.attn", **problem.constants)
    assert_gradients(attention, problem.q, problem.k, problem.v, dict(problem.inputs))


@pytest.mark.parametrize("name", SPECS)
def test_specifications(name: str) -> None:
    attention = check(SPECS[name])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    s = SIZES
    q, k, v = normal(s.B, s.H, s.M, s.D), normal(s.B, s.HKV, s.N, s.D), normal(s.B, s.HKV, s.N, s.E)
    signature = Signature(attention)
    sizes = CallSizes(s.B, s.H, s.HKV, s.M, s.N, s.D, s.E)
    inputs = {p.name: 1.5 + 0.3 * normal(*signature.shape(p.name, sizes)) for p in attention.tensors}
    if name == "signed sums":
        q, k = q.abs(), k.abs()
    assert_gradients(attention, q, k, v, inputs)


@given(case=cases(dtype=F64, longest=20, widest=16))
@settings(max_examples=by_tier(40), deadline=None)
def test_a_drawn_specification(case: tuple[Attention, Call]) -> None:
    check_drawn(*case)


@pytest.mark.slow
@given(case=cases(dtype=F64, longest=20, widest=16))
@settings(max_examples=1000, deadline=None)
def test_many_drawn_specifications(case: tuple[Attention, Call]) -> None:
    check_drawn(*case)


def check_drawn(attention: Attention, call: Call) -> None:
    """With captured floats in float64, whatever the specification says."""
    parameters = tuple(
        replace(p, dtypes=FLOATS) if isinstance(p, TensorParameter) and p.dtypes[0] in FLOATS else p
        for p in attention.parameters
    )
    inputs = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in call.inputs.items()
    }
    assert_gradients(replace(attention, parameters=parameters), call.q, call.k, call.v, inputs, call.q_offset)
