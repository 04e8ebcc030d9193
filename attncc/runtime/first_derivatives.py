"""Gradients of recurrences that nothing differentiates again.

`once_differentiable` of PyTorch says so only where the gradient that comes in requires one. Where it does not, as below
a sum, what kernels have computed of saved tensors would pass for a constant, and second derivatives lack a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.diagnostics import CallError
from attncc.runtime.recurrent_errors import RecurrenceTwice


def first_derivatives(
    compute: Callable[[], tuple[Tensor | None, ...]], of: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """`compute()`, of the tensors `of`; differentiating it by one of them raises CallError."""
    return _Computed.apply(compute, *of)


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], tuple[Tensor | None, ...]], *of: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        del ctx, of
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx, gradients
        raise CallError(RecurrenceTwice(None))
