"""Gradients of a call, by its kernels or by a formula, and the error rule for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attncc.error_rule import compare

Outputs: TypeAlias = tuple[Tensor, Tensor | None]
# From q, k, v and the captured inputs by name.
Formula: TypeAlias = Callable[[Mapping[str, Any]], Outputs]


def gradients(
    formula: Formula, arguments: Mapping[str, Any], do: Tensor, dlse: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of sum(do * o) + sum(dlse * lse) by each argument that is a tensor of floats."""
    leaves = {
        name: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    o, lse = formula(leaves)
    loss = (o * do.to(o.dtype)).sum()
    if dlse is not None:
        assert lse is not None
        loss = loss + (lse * dlse.to(lse.dtype)).where(lse > -torch.inf, 0.0).sum()
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(wanted.items(), found, strict=True)
    }


def assert_gradients(found: Mapping[str, Tensor], oracle: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
    """The error rule for each gradient; `oracle` in float64, `plain` in the type of the call."""
    assert found.keys() == oracle.keys()
    messages = [
        message
        for name in found
        if (message := compare(f"d{name}", found[name], oracle[name].double(), plain[name])) is not None
    ]
    assert not messages, "\n".join(messages)
