"""`torch.func` and `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacrev, jvp, vmap
from torch_support import CAUSAL, EVERYTHING, assert_close, gradients, inputs, operands

import attncc
from attncc import CallError
from attncc.runtime.vmap import batch_axes

GATED = attncc.build("attention gated():\n    weight = sigmoid(score)\n    mask = causal\n")
# Looks at the batch itself: batches cannot be joined.
COUNTING = attncc.build(
    "attention counting(slope: float[H]):\n    score = qk + slope[h] * b * kv_idx\n    mask = causal\n"
)


def several(count: int = 3) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Operands and captured tensors of `count` calls; operands stacked."""
    calls = [operands(24 + i) for i in range(count)]
    stacked = [torch.stack([call[i][:, :, :20] for call in calls]) for i in range(3)]
    captured = [inputs(20) for _ in range(count)]
    for i, values in enumerate(captured):
        values["slope"] = values["slope"] * (i + 1)
        values["cap"] = values["cap"] + i
        values["doc"] = values["doc"] // (i + 1)
    return stacked, captured


def one_by_one(function: Callable[..., Any], *stacked: Tensor) -> list[Tensor]:
    """Results of a call for each slice, stacked."""
    results = [function(*slices) for slices in zip(*stacked, strict=True)]
    results = [(x,) if isinstance(x, Tensor) else x for x in results]
    return [torch.stack(slices) for slices in zip(*results, strict=True)]


# --- gradients ------------------------------------------------------------------------------------------------------


def test_grad() -> None:
    captured = inputs()

    def loss(function: Any, q: Tensor, k: Tensor, v: Tensor, slope: Tensor, cap: Tensor) -> Tensor:
        return function(q, k, v, slope=slope, cap=cap, doc=captured["doc"]).double().square().sum()

    tensors = (*operands(), captured["slope"], captured["cap"])
    found = grad(partial(loss, EVERYTHING), argnums=(0, 1, 2, 3, 4))(*tensors)
    exact = gradients(lambda q, k, v, s, c: EVERYTHING(q, k, v, slope=s, cap=c, doc=captured["doc"]), *tensors)
    for x, y in zip(found, exact, strict=True):
        assert torch.equal(x, y)


def test_grad_of_lse() -> None:
    q, k, v = operands()
    found = grad(lambda q: CAUSAL(q, k, v, return_lse=True)[1].double().square().sum())(q)
    assert_close([found], gradients(lambda q: CAUSAL.reference(q, k, v, return_lse=True)[1], q))


def test_levels() -> None:
    """What an inner level computes beside its gradient has a gradient in the outer one."""
    q, k, v = operands()
    found = grad(lambda k: grad_and_value(lambda q: CAUSAL(q, k, v).double().square().sum())(q)[1])(k)
    assert torch.equal(found, gradients(lambda k: CAUSAL(q, k, v), k)[0])


def test_jacrev() -> None:
    q, k, v = (x[:1, :2, :4, :4] for x in operands())
    found = jacrev(CAUSAL, argnums=(0, 1, 2))(q, k, v)
    exact = torch.autograd.functional.jacobian(CAUSAL, (q, k, v))
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y)


# --- vmap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", [CAUSAL, GATED], ids=["causal", "gated"])
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (2, 1, 4)])
def test_operands(attn: Any, axes: tuple[int | None, ...]) -> None:
    stacked, _ = several()
    mapped = [x[0] if axis is None else x.movedim(0, axis) for x, axis in zip(stacked, axes, strict=True)]
    slices = [x[:1].expand_as(x) if axis is None else x for x, axis in zip(stacked, axes, strict=True)]
    assert torch.equal(vmap(attn, in_dims=axes)(*mapped), one_by_one(attn, *slices)[0])


@pytest.mark.parametrize("mapped", [(), ("doc",), ("slope",), ("cap",), ("slope", "cap", "doc")])
def test_captured_tensors(mapped: tuple[str, ...]) -> None:
    (q, k, v), captured = several()
    values = {name: torch.stack([call[name] for call in captured]) for name in mapped}

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return EVERYTHING(q, k, v, return_lse=True, **{**captured[0], **dict(zip(mapped, rest, strict=True))})

    found = vmap(call)(q, k, v, *values.values())
    for x, y in zip(found, one_by_one(call, q, k, v, *values.values()), strict=True):
        assert torch.equal(x, y)


def test_captured_tensors_alone() -> None:
    (q, k, v), captured = several()
    slopes = torch.stack([call["slope"] for call in captured])

    def call(slope: Tensor) -> Tensor:
        return EVERYTHING(q[0], k[0], v[0], **{**captured[0], "slope": slope})

    assert torch.equal(vmap(call)(slopes), one_by_one(call, slopes)[0])


def test_a_batch_within_a_batch() -> None:
    (q, k, v), _ = several()
    twice = [torch.stack([x, x.flip(0)]) for x in (q, k, v)]
    found = vmap(vmap(CAUSAL))(*twice)
    assert torch.equal(found, torch.stack([one_by_one(CAUSAL, *slices)[0] for slices in zip(*twice, strict=True)]))


def test_attention_that_looks_at_the_batch() -> None:
    (q, k, v), captured = several()
    call = partial(COUNTING, slope=captured[0]["slope"])
    assert torch.equal(vmap(call)(q, k, v), one_by_one(call, q, k, v)[0])


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        ("attention a():\n    mask = causal\n", {}),
        ("attention a(doc: int[B, N]):\n    mask = doc[b, kv_idx] == 0\n", {"doc": 0}),
        ("attention a(x: f32[H, B]):\n    score = qk * x[h, b]\n", {"x": 1}),
        ("attention a(x: f32[H]):\n    score = qk * x[h]\n", {"x": None}),
        ("attention a(x: f32[H]):\n    score = qk * x[b]\n", None),
        ("attention a(doc: int[B, N]):\n    mask = doc[0, kv_idx] == 0\n", None),
        ("attention a(doc: int[B + 1, N]):\n    mask = doc[b + 1, kv_idx] == 0\n", None),
        ("attention a(x: f32[B, B]):\n    score = qk * x[b, b]\n", None),
        ("attention a():\n    mask = kv_idx < B\n", None),
        ("attention a(i: int[B], x: f32[B]):\n    score = qk * x[i[b]]\n", None),
    ],
)
def test_where_batches_can_be_joined(spec: str, axes: dict[str, int | None] | None) -> None:
    assert batch_axes(attncc.build(spec).attention) == axes


@pytest.mark.parametrize("learned", [(), ("slope", "cap")])
def test_gradients_of_each_sample(learned: tuple[str, ...]) -> None:
    """As in differential privacy: the gradients of weights that samples share, for each sample by itself."""
    (q, k, v), captured = several()

    def loss(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return EVERYTHING(q, k, v, **{**captured[0], **dict(zip(learned, rest, strict=True))}).square().sum()

    each = grad(loss, argnums=tuple(range(3 + len(learned))))
    shared = [captured[0][name] for name in learned]
    found = vmap(each, in_dims=(0, 0, 0, *(None for _ in shared)))(q, k, v, *shared)
    for x, y in zip(found, one_by_one(lambda *call: each(*call, *shared), q, k, v), strict=True):
        assert torch.equal(x, y)


def test_gradients_of_a_tensor_of_each_batch() -> None:
    biased = attncc.build("attention biased(bias: float[B, N]):\n    score = qk + bias[b, kv_idx]\n")
    (q, k, v), _ = several()
    bias = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    each = grad(lambda q, k, v, bias: biased(q, k, v, bias=bias).square().sum(), argnums=(0, 3))
    for x, y in zip(vmap(each)(q, k, v, bias), one_by_one(each, q, k, v, bias), strict=True):
        torch.testing.assert_close(x, y)


# --- what there is not ----------------------------------------------------------------------------------------------


def _dual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return CAUSAL(forward_ad.make_dual(q, q), k, v)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: jvp(lambda q: CAUSAL(q, k, v), (q,), (q,)),
        lambda q, k, v: hessian(lambda q: CAUSAL(q, k, v).sum())(q),
        lambda q, k, v: grad(lambda q: grad(lambda q: CAUSAL(q, k, v).sum())(q).sum())(q),
        _dual,
    ],
    ids=["jvp", "hessian", "grad of grad", "dual numbers"],
)
def test_other_derivatives_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(CallError) as caught:
        function(*operands(4))
    assert [d.code for d in caught.value.diagnostics] == ["A0611"]
