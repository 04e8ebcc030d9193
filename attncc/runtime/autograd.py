"""Attention as PyTorch's autograd sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncc.runtime.arguments import Bound
from attncc.runtime.kernels import Kernels


def needs_gradients(q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> bool:
    """Whether autograd follows a call with these arguments."""
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bool(bound.tensors) and any(tensor.requires_grad for tensor in bound.tensors.values()))
    )


def attend(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> tuple[Tensor, Tensor | None]:
    """As `Kernels.forward` with its totals, differentiable by q, k, v and every captured tensor of floats."""
    return _Attend.apply(kernels, bound, q, k, v, *bound.tensors.values())  # type: ignore[no-any-return]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kernels: Kernels, bound: Bound, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        o, total = kernels.forward(q, k, v, bound, True)
        ctx.save_for_backward(q, k, v, o, total, *tensors)
        ctx.kernels, ctx.bound = kernels, bound
        ctx.set_materialize_grads(False)
        return o, total

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, do: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, total, *tensors = ctx.saved_tensors
        names = tuple(ctx.bound.tensors)
        bound = ctx.bound._replace(tensors=dict(zip(names, tensors, strict=True)))
        wanted = tuple(n for n, needed in zip(names, ctx.needs_input_grad[5:], strict=True) if needed)
        do = torch.zeros_like(o) if do is None else do
        dq, dk, dv, captured = ctx.kernels.backward(q, k, v, bound, o, total, do, dtotal, wanted)
        return None, None, dq, dk, dv, *(captured.get(name) for name in names)
