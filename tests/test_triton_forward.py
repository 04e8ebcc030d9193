"""Generated Triton kernels, interpreted, against the reference: every strategy, shape and element type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from error_rule import check_kernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import attentions, calls
from tiers import by_tier
from torch import Tensor

import attncc
from attncc.build import backward_sources_of, from_recipe, sources_of
from attncc.ir.types import DType
from attncc.plan.build import plan_attention
from attncc.plan.nodes import ForwardPlan, Specialization, Target
from attncc.runtime.call import CompiledAttention

TARGET = "triton:interpret"
SLOW = pytest.mark.slow
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [torch.float32, torch.bfloat16, *(pytest.param(dtype, marks=SLOW) for dtype in ALL_DTYPES[2:])]
Inputs = Callable[[dict[str, int]], Mapping[str, Any]]


def nothing(_: dict[str, int]) -> Mapping[str, Any]:
    return {}


def slopes(sizes: dict[str, int]) -> Mapping[str, Any]:
    return {"slope": 2.0 ** -torch.arange(1, sizes["H"] + 1)}


def documents(sizes: dict[str, int]) -> Mapping[str, Any]:
    ids = torch.arange(sizes["N"]).mul(5).div(max(sizes["N"], 1), rounding_mode="floor")
    return {"doc": ids.expand(sizes["B"], -1).to(torch.int32)}


# Name: specification, its inputs, and the strategy that its mask should lead to.
SPECS: dict[str, tuple[str, Inputs, str]] = {
    "full": ("attention full():\n    score = qk\n", nothing, "bounds"),
    "causal": ("attention causal():\n    mask = kv_idx <= q_idx\n", nothing, "bounds"),
    "window": (
        "attention window(window: int = 150):\n    mask = kv_idx <= q_idx and q_idx - kv_idx < window\n",
        nothing,
        "bounds",
    ),
    "sink_window": (
        "attention sinks(window: int = 100):\n    mask = kv_idx <= q_idx and (kv_idx < 4 or q_idx - kv_idx < window)\n",
        nothing,
        "bounds",
    ),
    "softcap": (
        "attention softcap(cap: float = 3.0):\n    score = cap * tanh(qk / cap)\n    mask = kv_idx <= q_idx\n",
        nothing,
        "bounds",
    ),
    "alibi": (
        "attention alibi(slope: f32[H]):\n    score = qk - slope[h] * (q_idx - kv_idx)\n    mask = kv_idx <= q_idx\n",
        slopes,
        "bounds",
    ),
    "document": (
        "attention document(doc: int[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]\n",
        documents,
        "list",
    ),
    "sink": (
        "attention sink(sinks: f32[H]):\n    weight = softmax(score, sink=sinks[h])\n    mask = kv_idx <= q_idx\n",
        lambda sizes: {"sinks": torch.linspace(-2, 2, sizes["H"])},
        "bounds",
    ),
    "sigmoid": ("attention sigmoid_():\n    weight = sigmoid(score)\n    mask = kv_idx <= q_idx\n", nothing, "bounds"),
    "relu_squared": (
        "attention relu_squared():\n    weight = relu(score) ** 2\n    normalize = sum\n    mask = kv_idx <= q_idx\n",
        nothing,
        "bounds",
    ),
    "mean": (
        "attention mean():\n    weight = 1.0\n    normalize = sum\n    mask = kv_idx <= q_idx\n",
        nothing,
        "bounds",
    ),
    "positions": (
        "attention positions():\n    score = 0.01 * kv_idx\n    mask = kv_idx % 3 != 0 and kv_idx <= q_idx\n",
        nothing,
        "",
    ),
    "dilated": (
        "attention dilated(w: int = 90):\n    mask = abs(q_idx - kv_idx) < w and (q_idx - kv_idx) % 2 == 0\n",
        nothing,
        "",
    ),
}


def check(
    spec: str,
    dtype: torch.dtype,
    *,
    B: int = 1,
    H: int = 2,
    HKV: int = 1,
    M: int = 200,
    N: int = 300,
    D: int = 64,
    E: int | None = None,
    inputs: Inputs = nothing,
    q_offset: int | None = None,
    change: Callable[[Tensor], Tensor] = lambda x: x,
    values: Callable[[Tensor, Tensor, Tensor], None] = lambda q, k, v: None,
) -> Tensor:
    """Runs a specification on random operands and checks it; `change` relays them out, `values` alters them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, M, D), (B, HKV, N, D), (B, HKV, N, D if E is None else E))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    values(q, k, v)
    q, k, v = change(q), change(k), change(v)
    given_inputs = inputs({"B": B, "H": H, "HKV": HKV, "M": M, "N": N})
    attn = attncc.build(spec, target=TARGET)
    attention = attncc.check(spec)
    lse = None
    if "weight = sigmoid" in spec:
        o = attn(q, k, v, q_offset=q_offset, **given_inputs)
    else:
        o, lse = attn(q, k, v, q_offset=q_offset, return_lse=True, **given_inputs)
    check_kernel(o, lse, attention, q, k, v, given_inputs, q_offset)
    return o


def strategy_of(spec: str) -> str:
    attention = attncc.check(spec)
    tensors = tuple((tensor.name, tensor.dtypes[0]) for tensor in attention.tensors)
    program = plan_attention(attention, Specialization(DType.F32, 64, 64, tensors), Target("triton", "interpret"))
    assert isinstance(program.forward, ForwardPlan)
    return program.forward.blocks.strategy


@pytest.mark.representative(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_and_dtype(name: str, dtype: torch.dtype) -> None:
    spec, inputs, strategy = SPECS[name]
    if strategy:
        assert strategy_of(spec) == strategy
    sizes = {"M": 300} if "doc[b, q_idx]" in spec else {}
    check(spec, dtype, inputs=inputs, **sizes)


@pytest.mark.parametrize("sink", [float("inf"), 3e38, -3e38])
def test_a_sink_without_bounds(sink: float) -> None:
    check(SPECS["sink"][0], torch.float32, M=40, N=50, inputs=lambda sizes: {"sinks": torch.full((sizes["H"],), sink)})


def test_the_specs_above_use_every_strategy() -> None:
    assert {strategy_of(spec) for spec, _, _ in SPECS.values()} == {"bounds", "scan", "list"}


@pytest.mark.parametrize(
    ("D", "E"), [(1, 1), (3, 5), (16, 17), (24, 8), (72, 40), (80, 80), (96, 33), (120, 144), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)], ids=str)
def test_widths(D: int, E: int, dtype: torch.dtype) -> None:
    check(SPECS["causal"][0], dtype, D=D, E=E, M=130, N=140, H=1)


@pytest.mark.parametrize(("H", "HKV"), [(1, 1), (6, 1), (6, 2), (6, 3), (3, 3)])
def test_query_groups(H: int, HKV: int) -> None:
    check(SPECS["alibi"][0], torch.float32, B=2, H=H, HKV=HKV, M=40, N=140, D=16, inputs=slopes)


@pytest.mark.representative(12)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 300), (300, 1), (128, 128), (129, 127), (256, 257), (5, 1000)])
@pytest.mark.parametrize(
    "name", ["window", "sink_window", "dilated", *(pytest.param(name, marks=SLOW) for name in ("causal", "full"))]
)
def test_lengths(name: str, M: int, N: int) -> None:
    check(SPECS[name][0], torch.float32, M=M, N=N, D=16)


@pytest.mark.parametrize("q_offset", [-400, -100, -1, 0, 7, 128, 500])
@pytest.mark.parametrize("name", ["causal", *(pytest.param(name, marks=SLOW) for name in ("window", "sink_window"))])
def test_offsets(name: str, q_offset: int) -> None:
    """Rows before the first key have nothing to attend to: their output is 0 and their lse -inf."""
    o = check(SPECS[name][0], torch.float32, D=16, q_offset=q_offset)
    if q_offset == -400:
        assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize(("B", "H", "M", "N"), [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 0, 0, 0)])
def test_empty(B: int, H: int, M: int, N: int) -> None:
    q, k = torch.randn(B, H, M, 16), torch.randn(B, H, N, 16)
    o, lse = attncc.build(SPECS["causal"][0], target=TARGET)(q, k, k, return_lse=True)
    assert torch.equal(o, torch.zeros(B, H, M, 16)) and torch.equal(lse, torch.full((B, H, M), -torch.inf))


def spread(x: Tensor) -> Tensor:
    """The same elements with NaN all around each row."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 8, x.shape[3] + 8), torch.nan, dtype=x.dtype)
    inner = wide[:, :, 3 : 3 + x.shape[2], 3 : 3 + x.shape[3]]
    return inner.copy_(x)


@pytest.mark.parametrize(
    "change",
    [spread, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[:, :1].expand(x.shape)],
    ids=["within NaN", "heads inside", "expanded"],
)
@pytest.mark.parametrize("name", ["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)], ids=str)
def test_strides(name: str, dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
    check(SPECS[name][0], dtype, B=2, D=72, E=40, N=140, M=50, change=change)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("name", ["full", "causal", "softcap"])
def test_huge_scores(name: str, size: float) -> None:
    def scale(q: Tensor, k: Tensor, v: Tensor) -> None:
        q.mul_(size)

    check(SPECS[name][0], torch.float32, D=16, values=scale)


def test_scores_of_minus_infinity() -> None:
    spec = "attention hidden(bias: f32[N]):\n    score = qk + bias[kv_idx]\n    mask = kv_idx <= q_idx\n"

    def some(sizes: dict[str, int]) -> Mapping[str, Any]:
        return {"bias": torch.where(torch.arange(sizes["N"]) < 150, -torch.inf, 0.0)}

    o = check(spec, torch.float32, M=300, D=16, inputs=some)
    assert not o[:, :, :150].any() and o[:, :, 150:].any()


@pytest.mark.parametrize("name", ["causal", "window", "document", "relu_squared", "sink"])
def test_keys_that_no_query_sees_may_hold_anything(name: str) -> None:
    spec, inputs, _ = SPECS[name]

    def poison(q: Tensor, k: Tensor, v: Tensor) -> None:
        k[:, :, 200:] = torch.nan
        v[:, :, 200:] = torch.nan
        v[:, :, 250:] = torch.inf

    def without_the_last(sizes: dict[str, int]) -> Mapping[str, Any]:
        given_inputs = dict(inputs(sizes))
        if "doc" in given_inputs:
            given_inputs["doc"] = (torch.arange(sizes["N"]) < 200).to(torch.int32).expand(sizes["B"], -1)
        return given_inputs

    o = check(spec, torch.float32, D=16, M=200, q_offset=0, inputs=without_the_last, values=poison)
    assert o.isfinite().all()


@pytest.mark.representative(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "document", "dilated", "relu_squared"])
def test_missing_and_infinite_numbers_reach_the_rows_that_see_them(name: str, dtype: torch.dtype) -> None:
    spec, inputs, _ = SPECS[name]

    def poison(q: Tensor, k: Tensor, v: Tensor) -> None:
        k[:, :, 150] = torch.nan
        q[:, :, 17] = torch.nan
        v[:, :, 40, 3] = torch.inf
        v[:, :, 130, 4] = -torch.inf
        v[:, :, 135, 4] = torch.inf
        v[:, :, 100, 5] = torch.nan

    check(spec, dtype, D=16, M=300, inputs=inputs, values=poison)


def test_lengths_and_scalars_share_a_kernel() -> None:
    attn = attncc.build(SPECS["window"][0], target=TARGET)
    kernels = set()
    for length, window in ((5, 1), (130, 7), (200, 500)):
        q = torch.randn(1, 1, length, 16)
        attn(q, q, q, window=window)
        kernels.add(tuple(attn.source().values()))
    assert len(kernels) == 1


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), dtype=st.sampled_from(ALL_DTYPES))
def test_many_random_specs(data: st.DataObject, dtype: torch.dtype) -> None:
    check_random(data, dtype)


@settings(max_examples=by_tier(15), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), dtype=st.sampled_from(ALL_DTYPES))
def test_random_specs(data: st.DataObject, dtype: torch.dtype) -> None:
    check_random(data, dtype)


def check_random(data: st.DataObject, dtype: torch.dtype) -> None:
    attention = data.draw(attentions())
    call = data.draw(calls(attention, dtype=dtype, longest=80, widest=33))
    compiled = CompiledAttention(attention, "", TARGET, (), sources_of, backward_sources_of, from_recipe, "{}")
    lse = None
    if type(attention.normalizer).__name__ == "Elementwise":
        o = compiled(call.q, call.k, call.v, q_offset=call.q_offset, **call.inputs)
    else:
        o, lse = compiled(call.q, call.k, call.v, q_offset=call.q_offset, return_lse=True, **call.inputs)
    if lse is not None:
        # One drawn row may come out exact in half precision by luck: what its own rounding allows, then.
        lse = lse.to(dtype)
    check_kernel(o, lse, attention, call.q, call.k, call.v, call.inputs, call.q_offset)
