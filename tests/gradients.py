"""Gradients of formulas, and the error rule for those of kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attncc.error_rule import compare

# From q, k, v and the captured inputs by name to o and lse.
Formula: TypeAlias = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor | None]]


def gradients(
    formula: Formula, arguments: Mapping[str, Any], do: Tensor, dlse: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradients, by each argument that is a tensor of floats, of what has the gradient `do` by o and `dlse` by lse.
    Rows without a sum have no lse to differentiate."""
    leaves = {name: x.detach().requires_grad_() if _is_float(x) else x for name, x in arguments.items()}
    o, lse = formula(leaves)
    outputs, upstream = [o], [do.to(o.dtype)]
    if dlse is not None:
        assert lse is not None
        outputs.append(lse)
        upstream.append(dlse.to(lse.dtype).where(lse > -torch.inf, 0.0))
    wanted = {name: x for name, x in leaves.items() if _is_float(x)}
    found = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def assert_gradients(
    found: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor] | None = None,
) -> None:
    """The error rule for each gradient; `oracle` in float64, `plain` in the type of the call. rounded: the oracle with
    transformed rows in that type, the second standard of gradients that are more precise than it."""
    assert found.keys() == oracle.keys()
    messages: list[str | None] = []
    for name, x in found.items():
        finer = rounded is not None and x.dtype.itemsize > found["q"].dtype.itemsize
        standards = (plain[name], rounded[name]) if finer else (plain[name],)
        messages.append(compare(f"d{name}", x, oracle[name].double(), *standards))
    assert not any(messages), "\n".join(filter(None, messages))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
