"""A specification with every kind of input, its operands, and gradients of the reference, for the tests of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import attncc

# A learned slope per head, a learned 0-d cap, documents of each sequence, scalars of every kind.
SPEC = """\
attention everything(slope: float[H], cap: float[], doc: int[B, N], window: int = 9, rate: float = 1.0,
                     within: bool = true):
    score = cap * tanh(qk * rate / cap) - slope[h] * (q_idx - kv_idx)
    mask = causal and q_idx - kv_idx < window and (doc[b, q_idx] == doc[b, kv_idx] or not within)
"""
EVERYTHING = attncc.build(SPEC)
CAUSAL = attncc.build("attention causal_only():\n    mask = causal\n")


def operands(N: int = 24, D: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q (2, 4, N, D), k and v (2, 2, N, D)."""
    generator = torch.Generator().manual_seed(N)
    q, k, v = (torch.randn(2, heads, N, D, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2))
    return q, k, v


def inputs(N: int = 24) -> dict[str, Any]:
    """What EVERYTHING captures beside these operands."""
    return {
        "slope": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "cap": torch.tensor(3.0),
        "doc": torch.stack([torch.arange(N) // 10, torch.arange(N) // 7]),
    }


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Of the sum of squares of what `function` returns, by each of `tensors`."""
    fresh = leaves(*tensors)
    return list(torch.autograd.grad(function(*fresh).double().square().sum(), fresh))


def assert_as_the_reference(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, captured: Mapping[str, Tensor], tolerance: float = 2e-4, **others: Any
) -> None:
    """Gradients of a call by q, k, v and every captured tensor of floats are those of the reference."""
    learned = [name for name, tensor in captured.items() if tensor.is_floating_point()]
    fixed = {name: tensor for name, tensor in captured.items() if name not in learned} | others

    def call(function: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, *rest: function(q, k, v, **dict(zip(learned, rest, strict=True)), **fixed)

    tensors = (q, k, v, *(captured[name] for name in learned))
    assert_close(gradients(call(attn), *tensors), gradients(call(attn.reference), *tensors), tolerance)


def assert_close(found: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float = 2e-4) -> None:
    for x, y in zip(found, exact, strict=True):
        assert y.dtype in (x.dtype, torch.float64)
        scale = max(1.0, float(y.double().abs().max()))
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance * scale)
