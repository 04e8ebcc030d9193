"""Gradients of the oracle: finite differences, and zeros where the mathematics has zeros."""

from __future__ import annotations

import pytest
import torch

import attncc
from attncc.reference import evaluate

F64 = torch.float64
B, HEADS, HKV, M, N, D, E = 1, 2, 1, 4, 5, 4, 3
SHAPES = {
    "q": (B, HEADS, M, D),
    "k": (B, HKV, N, D),
    "v": (B, HKV, N, E),
    "tau": (HEADS,),
    "bias": (HEADS, M, N),
    "gain": (HEADS, D),
    "column": (B, N),
    "sinks": (HEADS,),
}


def normal(name: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], dtype=F64, generator=generator).requires_grad_()


SPECS = {
    "plain": "attention a():\n    mask = causal\n",
    "soft cap": "attention a():\n    score = 2 * tanh(qk / 2)\n    mask = window(3)\n",
    "sink": "attention a(sinks: float[H]):\n    weight = softmax(score, sink=sinks[h])\n    mask = window(2)\n",
    "sink beside empty rows": "attention a(sinks: float[H]):\n    weight = softmax(score, sink=sinks[h])\n"
    "    mask = kv_idx > q_idx + 1\n",
    "empty rows": "attention a():\n    mask = kv_idx > q_idx + 1\n",
    "biases": "attention a(bias: float[H, M, N], tau: float[H]):\n    scale = exp(tau[h])\n"
    "    score = qk + bias[h, q_row, kv_idx] * sigmoid(tau[h])\n    mask = causal\n",
    "sum": "attention a(tau: float[H]):\n    weight = exp(score * tau[h]) + 0.5\n"
    "    normalize = sum\n    mask = causal\n",
    "none": "attention a(column: float[B, N]):\n    weight = sigmoid(score) * column[b, kv_idx]\n    mask = causal\n",
    "rmsnorm and rope": "attention a(gain: float[H, D]):\n    q = rope(rmsnorm(q) * gain[h, :], q_idx)\n"
    "    k = rope(l2norm(k), kv_idx)\n    mask = causal\n",
    "softmax of rows": "attention a(tau: float[H]):\n    q = softmax(q * tau[h])\n    v = v * sigmoid(v)\n",
    "two branches": "attention a(column: float[B, N]):\n"
    "    score = qk * column[b, kv_idx] if q_idx > kv_idx else qk + 1 / (1 + abs(q_idx - kv_idx))\n",
    "choice of a root": "attention a():\n    score = sqrt(qk) if qk > 0.01 else 0.1 * qk\n    mask = causal\n",
    "choice of a logarithm": "attention a():\n    weight = log(score) if score > 0.05 else 0.5\n    mask = causal\n",
    "choice within rows": "attention a():\n    q = sqrt(q) if q > 0 else -q * q\n",
}


@pytest.mark.representative(5)
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_limits_of_differences(name: str) -> None:
    attention = attncc.check(SPECS[name])
    names = ("q", "k", "v", *(tensor.name for tensor in attention.tensors))

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o, lse = evaluate(attention, *tensors[:3], dict(zip(names[3:], tensors[3:], strict=True)))
        return (o,) if lse is None else (o, lse.where(lse.isfinite(), 0.0))

    assert torch.autograd.gradcheck(outputs, tuple(normal(name) for name in names), eps=1e-5, atol=1e-6, rtol=1e-5)


def gradients(spec: str, upstream: torch.Tensor | None = None, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of the sum of o, or of o weighted by `upstream`."""
    attention = attncc.check(spec)
    tensors = {name: normal(name) for name in ("q", "k", "v", *(tensor.name for tensor in attention.tensors))}
    tensors |= {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    captured = {tensor.name: tensors[tensor.name] for tensor in attention.tensors}
    o, _ = evaluate(attention, tensors["q"], tensors["k"], tensors["v"], captured)
    upstream = torch.ones_like(o) if upstream is None else upstream
    found = torch.autograd.grad(o, list(tensors.values()), upstream, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def finite(found: dict[str, torch.Tensor]) -> bool:
    return all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(
    "clauses",
    [
        "score = sqrt(qk) if qk > 0 else -1.0",
        "score = log(relu(qk)) if qk > 0 else qk",
        "score = qk / relu(qk) if qk > 0 else qk",
        "score = (1 / column[b, kv_idx] if column[b, kv_idx] > 0 else 2 * column[b, kv_idx]) + qk",
        "weight = sqrt(score) if score > 0 else 0.25\n    normalize = sum",
        "weight = pow(relu(score), 0.5) if score > 0 else 0.0",
        "q = sqrt(q) if q > 0 else q",
        "q = q / sum(q * relu(q)) if sum(relu(q)) > 0 else q",
        "q = q if q_row > 1 else log(relu(q) * relu(-q) + 1)",
        "k = k * log(column[b, kv_idx]) if column[b, kv_idx] > 0 else k",
        "scale = rsqrt(column[b, kv_idx]) if column[b, kv_idx] > 0 else 1.0",
    ],
)
def test_what_where_leaves_out_has_no_gradient(clauses: str) -> None:
    column = torch.tensor([[0.5, 0.0, -1.0, 2.0, 0.0]], dtype=F64)
    qk = torch.tensor([[[[-1.0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0]]]]).double().repeat(1, 2, 1, 1)
    parameters = "column: float[B, N]" if "column" in clauses else ""
    given = {"column": column} if parameters else {}
    assert finite(gradients(f"attention a({parameters}):\n    {clauses}\n", q=qk, **given))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "clauses",
    [
        "mask = kv_idx < 3",
        "mask = kv_idx < 3\n    k = l2norm(k)\n    v = v / (1 + sum(v * v))",
        "mask = kv_idx < 3\n    k = rope(rmsnorm(k) * gain[h, :], kv_idx)",
        "mask = kv_idx < 3\n    score = tanh(qk) + column[b, kv_idx]",
        "mask = kv_idx < 3\n    weight = exp(score)\n    normalize = sum",
        "mask = kv_idx < 3\n    weight = sigmoid(score)",
    ],
)
def test_masked_keys_have_zero_gradients_whatever_they_hold(clauses: str, poison: float) -> None:
    used = {"gain": "gain: float[H, D]", "column": "column: float[B, N]"}
    spec = f"attention a({', '.join(text for key, text in used.items() if key in clauses)}):\n    {clauses}\n"
    names = ["k", "v", *(["column"] if "column" in clauses else [])]
    clean = {name: normal(name) for name in names}
    poisoned = {name: x.detach().clone() for name, x in clean.items()}
    for name, x in poisoned.items():
        if name == "column":
            x[:, 3:] = poison
        else:
            x[:, :, 3:] = poison
    expected, found = gradients(spec, **clean), gradients(spec, **poisoned)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)
    assert (found["k"][:, :, 3:] == 0).all()
    assert (found["v"][:, :, 3:] == 0).all()


@pytest.mark.parametrize(
    "normalize", ["", "\n    weight = exp(score)\n    normalize = sum", "\n    weight = sigmoid(score)"]
)
def test_queries_that_keep_nothing_have_zero_gradients_whatever_they_hold(normalize: str) -> None:
    """Nor does what is handed back to their outputs reach anything."""
    spec = f"attention a():\n    q = l2norm(q)\n    mask = kv_idx > q_row + 1{normalize}\n"
    q, upstream = normal("q").detach().clone(), torch.ones(B, HEADS, M, E, dtype=F64)
    expected = gradients(spec, upstream, q=q)
    q[:, :, 3], upstream[:, :, 3] = torch.nan, torch.inf
    found = gradients(spec, upstream, q=q)
    assert (found["q"][:, :, 3] == 0).all()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)


def test_what_is_handed_back_reaches_kept_keys_alone() -> None:
    upstream = torch.ones(B, HEADS, M, E, dtype=F64)
    upstream[:, :, 0] = torch.nan
    found = gradients("attention a():\n    mask = kv_idx <= q_row\n", upstream)
    assert found["v"][:, :, 0].isnan().all() and found["v"][:, :, 1:].isfinite().all()
    assert found["k"][:, :, 0].isnan().all() and found["k"][:, :, 1:].isfinite().all()
    assert found["q"][:, :, 0].isnan().all() and found["q"][:, :, 1:].isfinite().all()


@pytest.mark.parametrize(
    "clauses",
    ["weight = sqrt(relu(score))\n    normalize = sum", "weight = score\n    normalize = sum", "score = log(relu(qk))"],
)
def test_rows_without_a_sum_have_zero_gradients(clauses: str) -> None:
    """All weights of row 0 are 0, where a root and a logarithm have infinite derivatives."""
    q, k = normal("q").detach().abs(), normal("k").detach().abs()
    q[:, :, 0] = 0.0
    found = gradients(f"attention a():\n    {clauses}\n", q=q, k=k)
    assert (found["q"][:, :, 0] == 0).all()
    assert finite(found)
    assert (found["q"][:, :, 1:] != 0).any()
