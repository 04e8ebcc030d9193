"""Training: gradients through autograd, whatever the tensors and whoever asks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_support import (
    CAUSAL,
    EVERYTHING,
    assert_as_the_reference,
    assert_close,
    gradients,
    inputs,
    leaves,
    operands,
)

import attncc

SUMMED = attncc.build(
    "attention summed():\n    weight = relu(score + 1.0) ** 2\n    normalize = sum\n    mask = causal\n"
)


# --- tensors --------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "rows before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other element": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "part of a longer one": lambda x: torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "reversed": lambda x: x.flip(2).contiguous().flip(2),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    q, k, v = operands()
    found = gradients(lambda *x: CAUSAL(*map(VIEWS[view], x)), q, k, v)
    assert_close(found, gradients(CAUSAL.reference, q, k, v))
    into = VIEWS[view](torch.ones(2, 4, 24, 16))
    x, y = leaves(q)[0], leaves(q)[0]
    CAUSAL(x, k, v).backward(into)
    CAUSAL.reference(y, k, v).backward(into.double())
    assert_close([x.grad], [y.grad])  # type: ignore[list-item]


@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
def test_gradients_of_transformed_rows_may_be_greater_than_those_of_rows(target: str) -> None:
    """Here beyond what float16 can hold."""
    spec = "attention a():\n    q = q / 1024\n    k = k / 1024\n    scale = 1048576.0\n    mask = causal\n"
    attn = attncc.build(spec, target=target)
    q, k, v = operands(dtype=torch.float16)
    do = 256 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).half()
    found, exact = leaves(q, k, v), leaves(q, k, v)
    attn(*found).backward(do)
    attn.reference(*exact).backward(do.double())
    assert exact[0].grad is not None and exact[0].grad.abs().max() * 1024 > torch.finfo(torch.float16).max
    assert_close([x.grad for x in found], [x.grad for x in exact], 0.01)  # type: ignore[misc]


def test_expanded_tensors() -> None:
    q, k, v = operands()

    def call(function: Any, q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        captured = {**inputs(), "slope": slope.expand(4)}
        return function(q.expand(2, 4, 24, 16), k.expand(2, 2, 24, 16), v.expand(2, -1, -1, -1), **captured)

    tensors = q[:, :1], k[:1, :1], v[:1], torch.tensor([0.25])
    assert_close(
        gradients(partial(call, EVERYTHING), *tensors), gradients(partial(call, EVERYTHING.reference), *tensors)
    )


def test_the_same_tensor_everywhere() -> None:
    twice = attncc.build(
        "attention twice(x: float[H], y: float[H]):\n    score = qk * x[h] + y[h] * kv_idx\n    mask = causal\n"
    )
    x = operands()[0]
    weights = torch.tensor([0.5, -0.25, 0.125, 1.0])

    def call(function: Any, x: Tensor, weights: Tensor) -> Tensor:
        return function(x, x, x, x=weights, y=weights)

    assert_close(gradients(partial(call, twice), x, weights), gradients(partial(call, twice.reference), x, weights))


@pytest.mark.representative(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_captured_tensors_of_other_types(dtype: torch.dtype) -> None:
    captured = {**inputs(), "slope": inputs()["slope"].to(dtype), "cap": inputs()["cap"].to(dtype)}
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 2e-4)
    q, k, v = operands(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_the_reference(EVERYTHING, q, k, v, captured, tolerance)


@pytest.mark.parametrize("learned", ["q", "k", "v", "slope", "cap"])
def test_one_tensor_alone(learned: str) -> None:
    values = {**dict(zip("qkv", operands(), strict=True)), **inputs()}

    def call(function: Any, x: Tensor) -> Tensor:
        return function(**{**values, learned: x})

    found = gradients(partial(call, EVERYTHING), values[learned])
    assert_close(found, gradients(partial(call, EVERYTHING.reference), values[learned]))


@pytest.mark.parametrize("number", [3.0, torch.tensor(3.0)])
def test_a_number_for_a_tensor_without_axes(number: Any) -> None:
    captured = {**inputs(), "cap": number}
    found = gradients(lambda *x: EVERYTHING(*x, **captured), *operands())
    assert_close(found, gradients(lambda *x: EVERYTHING.reference(*x, **captured), *operands()))


@pytest.mark.parametrize("attn", [CAUSAL, SUMMED], ids=["softmax", "sum"])
@pytest.mark.parametrize("used", ["o", "lse", "both"])
def test_lse_is_differentiable(attn: Any, used: str) -> None:
    def call(function: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = function(q, k, v, return_lse=True)
        return {"o": o, "lse": lse, "both": o * lse[..., None]}[used]

    q, k, v = operands()
    tensors = (q, k) if used == "lse" else (q, k, v)
    found, exact = (gradients(lambda q, k, v=v, f=f: call(f, q, k, v), *tensors) for f in (attn, attn.reference))
    assert_close(found, exact)


def test_no_gradient_where_nothing_is_used() -> None:
    q, k, v = leaves(*operands())
    _, lse = CAUSAL(q, k, v, return_lse=True)
    lse.sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))  # type: ignore[arg-type]


def test_modes_without_gradients() -> None:
    q, k, v = leaves(*operands())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not CAUSAL(q, k, v).requires_grad
            assert not EVERYTHING(q, k, v, **inputs()).requires_grad
    with torch.inference_mode():
        fresh = operands()
        assert torch.equal(CAUSAL(*fresh), CAUSAL(*operands()))


# --- who asks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpp", pytest.param("cpp:portable", marks=pytest.mark.slow)])
def test_gradcheck(target: str) -> None:
    attn = attncc.build(EVERYTHING.text, target=target)
    q, k, v = leaves(*(x[:1, :, :6, :4] for x in operands(dtype=torch.float64)))
    captured = inputs()
    slope, cap = leaves(captured["slope"].double(), captured["cap"].double())
    doc = captured["doc"][:1, :6].contiguous()

    def call(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
        return attn(q, k, v, slope=slope, cap=cap, doc=doc, window=4, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, slope, cap))
    summed = attncc.build(SUMMED.text, target=target)
    assert torch.autograd.gradcheck(lambda *x: summed(*x, return_lse=True), (q, k, v))


class Layer(nn.Module):
    """A learned attention between projections."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48, bias=False)
        self.slope = nn.Parameter(torch.full((1,), 0.1))
        self.attn = attncc.build("attention alibi_like(slope: float[H]):\n    score = qk + slope[h] * kv_idx\n")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        return self.attn(q, k, v, slope=self.slope)[:, 0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(2, 10, 16, requires_grad=True)
    tensors = (x, *layer.parameters())
    exact = torch.autograd.grad(layer(x).square().sum(), tensors)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip(tensors, exact, strict=True):
        assert torch.equal(tensor.grad, gradient)  # type: ignore[arg-type]


def test_a_module_trains() -> None:
    torch.manual_seed(0)
    layer = Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, wanted = torch.randn(2, 10, 16), torch.randn(2, 10, 16)
    losses: list[float] = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert layer.slope.item() != pytest.approx(0.1)


def test_a_module_is_copied_and_stored() -> None:
    layer = Layer()
    x = torch.randn(2, 10, 16)
    twin = copy.deepcopy(layer)
    assert twin.slope is not layer.slope
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_threads() -> None:
    """As in DataParallel: several threads go forward and backward at once, through one attention."""
    attn = attncc.build(EVERYTHING.text)

    def run(N: int) -> list[Tensor]:
        return gradients(lambda *x: attn(*x, **inputs(N)), *operands(N))

    lengths = [8, 17, 24, 40] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, lengths))
    for N, several in zip(lengths, found, strict=True):
        for x, y in zip(several, run(N), strict=True):
            assert torch.equal(x, y)


@pytest.mark.representative(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = leaves(*operands())
    captured = inputs()
    with torch.autocast("cpu", dtype):
        o, lse = EVERYTHING(q, k, v, return_lse=True, **captured)
        assert (
            torch.nn.functional.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)).dtype
            == dtype
        )
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(o, EVERYTHING(q.to(dtype), k.to(dtype), v.to(dtype), **captured))
    o.float().square().sum().backward()
    exact = gradients(lambda *x: EVERYTHING(*(y.to(dtype) for y in x), **captured), q, k, v)
    for x, y in zip((q, k, v), exact, strict=True):
        assert torch.equal(x.grad, y)  # type: ignore[arg-type]


def test_autocast_of_operands_that_differ() -> None:
    q, k, v = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert CAUSAL(q.bfloat16(), k, v.half()).dtype == torch.bfloat16
        assert CAUSAL(q.double(), k.double(), v.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert CAUSAL(q, k, v).dtype == torch.float32


def test_backward_within_autocast() -> None:
    captured = inputs()
    tensors = leaves(*operands(), captured["slope"], captured["cap"])
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, slope, cap = tensors
        EVERYTHING(q, k, v, **{**captured, "slope": slope, "cap": cap}).float().square().sum().backward()
    found = [x.grad for x in tensors]
    q, k, v, slope, cap = leaves(*tensors)
    EVERYTHING(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), **{**captured, "slope": slope, "cap": cap}
    ).float().square().sum().backward()
    for x, y in zip(found, (q, k, v, slope, cap), strict=True):
        assert torch.equal(x, y.grad)  # type: ignore[arg-type]
